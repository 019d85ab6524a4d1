"""`train-student compare`: what finished runs say side by side, and their means over seeds."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from shared.errors import CacheMismatch, ConfigError, IncompleteCache
from shared.storage.local import LocalStorage
from student_train.compare.groups import (
    common_name,
    is_baseline,
    mean_and_deviation,
    options_but_seed,
    recovered,
    score,
)
from student_train.config import CompareConfig
from student_train.metrics.names import MetricName
from student_train.run_files import (
    CONFIG,
    METRICS,
    RESULT,
    kl_of,
    read_metrics,
    read_options,
    read_result,
)

LineKind = Literal["teacher", "run", "seeds"]
HARD_LABELS_ONLY, NO_GAIN = "hard labels only", "no gain to recover"


@dataclass(frozen=True, slots=True)
class Numbers:
    """The numbers of one model on the held-out cache; None where one does not exist."""

    loss: float | None = None
    kl: float | None = None
    agreement: float | None = None
    metric: float | None = None
    metric_low: float | None = None
    metric_high: float | None = None
    ece: float | None = None


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table: the teacher, a run, or the mean over the seeds of the same options.

    `deviation`: standard deviations over these seeds. `recovered`: the share of the teacher's gain
    over the hard-label `baseline`, in the main metric of the task; None also where there is
    no gain, which `note` then says.
    """

    kind: LineKind
    name: str
    parameters: int | None
    seconds: float | None
    weights: str
    numbers: Numbers
    before: Numbers | None = None
    deviation: Numbers | None = None
    runs: tuple[str, ...] = ()
    is_baseline: bool = False
    baseline: str | None = None
    recovered: float | None = None
    note: str = ""
    student: str = ""
    curve: tuple[tuple[int, float], ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Students evaluated on one held-out cache, after their teacher; `metric`: of their task."""

    targets: str
    positions: int
    lines: tuple[Line, ...]
    metric: MetricName | None = None


def compare(config: CompareConfig) -> Comparison:
    """Reads the results of finished runs; they must share their held-out cache."""
    if not config.runs:
        raise ConfigError("compare: name the folders of the runs")
    results = [(path, _result(path)) for path in config.runs]
    held_out = {result["validation_cache_id"] for _, result in results}
    if len(held_out) > 1:
        listed = ", ".join(
            f"{path}: {result['validation_cache_id'][:12]}" for path, result in results
        )
        raise CacheMismatch(
            f"compare: these runs were evaluated on different held-out caches ({listed}), so their "
            "numbers do not compare. Evaluate each with train-student evaluate on one cache."
        )
    first = results[0][1]["validation"]
    runs = [_student_line(path, result) for path, result in results]
    lines = [*runs, *_lines_of_seeds(list(zip(config.runs, runs, strict=True)))]
    teacher = _teacher_line(results) if "teacher_loss" in first else None
    if teacher is not None:
        lines = [teacher, *_with_recovered(lines, teacher, first.get("metric"))]
    return Comparison(
        first.get("targets", "none"), first["positions"], tuple(lines), first.get("metric")
    )


def _result(path: Path) -> dict[str, Any]:
    storage = LocalStorage(path)
    if not storage.exists(RESULT):
        raise IncompleteCache(
            f"{path}: no finished run here (result.json is missing). Run train-student run --out "
            f"{path} to its end."
        )
    result = read_result(storage)
    if "validation" not in result:
        raise CacheMismatch(
            f"{path}: this run has no held-out numbers. Run it with --validation-cache."
        )
    return result


def _student_line(path: Path, result: dict[str, Any]) -> Line:
    curve = tuple(
        (int(line["step"]), float(line["hard"] if line.get("hard") is not None else line["loss"]))
        for line in read_metrics(path / METRICS)
        if line["kind"] == "train"
    )
    baseline, before = is_baseline(result), result.get("before")
    return Line(
        kind="run",
        name=path.name,
        parameters=result["parameters"],
        seconds=result["seconds"],
        weights=HARD_LABELS_ONLY if baseline else _weights_text(result),
        numbers=_numbers(result["validation"]),
        before=None if before is None else _numbers(before),
        is_baseline=baseline,
        student=result.get("student") or "",
        curve=curve,
    )


def _numbers(of: dict[str, Any]) -> Numbers:
    metric = of.get("metric")
    ends = (None, None) if metric is None else (of.get(f"{metric}_{e}") for e in ("low", "high"))
    low, high = ends
    value = None if metric is None else of.get(metric)
    return Numbers(of["loss"], kl_of(of), of.get("agreement"), value, low, high, of.get("ece"))


def _weights_text(result: dict[str, Any]) -> str:
    """`soft 1-0.2 hard 0.5`: first and last value of what was scheduled."""
    parts = []
    for name, weight in result["weights"].items():
        start, end = result.get("scheduled", {}).get(f"{name}_weight", (weight, weight))
        if start or end:
            parts.append(f"{name} {start:g}" if start == end else f"{name} {start:g}-{end:g}")
    return " ".join(parts)


def _teacher_line(results: Sequence[tuple[Path, dict[str, Any]]]) -> Line:
    numbers = results[0][1]["validation"]
    sizes = [r["teacher_parameters"] for _, r in results if r.get("teacher_parameters")]
    metric = numbers.get(f"teacher_{numbers.get('metric')}")
    of_values = numbers.get("metric") == "pearson"
    kl, agreement = (None, None) if of_values else (0.0, 1.0)
    return Line(
        kind="teacher",
        name="teacher",
        parameters=sizes[0] if sizes else None,
        seconds=None,
        weights="as cached",
        numbers=Numbers(loss=numbers["teacher_loss"], kl=kl, agreement=agreement, metric=metric),
    )


def _lines_of_seeds(runs: Sequence[tuple[Path, Line]]) -> list[Line]:
    """A line for all runs of the same options that were run with more than one seed."""
    groups: dict[str, list[Line]] = defaultdict(list)
    for path, line in runs:
        storage = LocalStorage(path)
        # A folder without its options stands alone.
        known = storage.exists(CONFIG)
        groups[options_but_seed(read_options(storage)) if known else str(path)].append(line)
    return [_mean_line(lines) for lines in groups.values() if len(lines) > 1]


def _mean_line(lines: Sequence[Line]) -> Line:
    names = [line.name for line in lines]
    numbers, deviation = _over_seeds([line.numbers for line in lines])
    befores = [line.before for line in lines if line.before is not None]
    before = _over_seeds(befores)[0] if len(befores) == len(lines) else None
    return replace(
        lines[0],
        kind="seeds",
        name=f"{common_name(names)}, {len(lines)} seeds",
        seconds=mean_and_deviation([line.seconds or 0.0 for line in lines])[0],
        numbers=numbers,
        before=before,
        deviation=deviation,
        runs=tuple(names),
        curve=(),
    )


def _over_seeds(seeds: Sequence[Numbers]) -> tuple[Numbers, Numbers]:
    """Means and deviations; the interval of one seed's rows says nothing about others."""
    found = {}
    for name in ("loss", "kl", "agreement", "metric", "ece"):
        values = [value for value in (asdict(one)[name] for one in seeds) if value is not None]
        if len(values) == len(seeds):
            found[name] = mean_and_deviation(values)
    means, deviations = ({name: both[i] for name, both in found.items()} for i in (0, 1))
    return Numbers(**means), Numbers(**deviations)


def _with_recovered(lines: Sequence[Line], teacher: Line, metric: MetricName | None) -> list[Line]:
    """Each line with the share of the teacher's gain over the best baseline of its student.

    A mean over seeds is compared with a mean over seeds where there is one.
    """
    best = _score(teacher, metric)
    found = []
    for line in lines:
        baselines = [b for b in lines if b.is_baseline and b.student == line.student]
        baselines = [b for b in baselines if b.kind == "seeds"] or baselines
        baselines = [b for b in baselines if _score(b, metric) is not None]
        own = _score(line, metric)
        if not line.is_baseline and baselines and own is not None and best is not None:
            baseline = max(baselines, key=lambda b: _score(b, metric) or 0.0)
            share = recovered(own, _score(baseline, metric) or 0.0, best)
            note = NO_GAIN if share is None else ""
            line = replace(line, baseline=baseline.name, recovered=share, note=note)
        found.append(line)
    return found


def _score(line: Line, metric: MetricName | None) -> float | None:
    numbers = {"loss": line.numbers.loss}
    return score(numbers if metric is None else {metric: line.numbers.metric}, metric)
