"""`train-student compare`: many students side by side, as a table and as one HTML file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from shared.errors import CacheMismatch, ConfigError, IncompleteCache
from student_train.config import CompareConfig
from student_train.metrics import TITLES, MetricName
from student_train.run_folder import RunFolder, kl_of


@dataclass(frozen=True, slots=True)
class Line:
    """One model of the table; None where a number does not exist."""

    name: str
    parameters: int | None
    loss: float
    kl: float | None
    agreement: float | None
    seconds: float | None
    weights: str
    metric: float | None = None
    curve: tuple[tuple[int, float], ...] = ()


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
    lines = [_student_line(path, result) for path, result in results]
    if "teacher_loss" in first:
        lines.insert(0, _teacher_line(results))
    metric = first.get("metric")
    return Comparison(first.get("targets", "none"), first["positions"], tuple(lines), metric)


def _result(path: Path) -> dict[str, Any]:
    folder = RunFolder(path)
    result = folder.result(0)
    if result is None:
        raise IncompleteCache(
            f"{path}: no finished run here (result.json is missing). Run train-student run --out "
            f"{path} to its end."
        )
    if "validation" not in result:
        raise CacheMismatch(
            f"{path}: this run has no held-out numbers. Run it with --validation-cache."
        )
    return result


def _student_line(path: Path, result: dict[str, Any]) -> Line:
    numbers = result["validation"]
    curve = tuple(
        (int(line["step"]), float(line["hard"] if line.get("hard") is not None else line["loss"]))
        for line in RunFolder(path).metrics()
        if line["kind"] == "train"
    )
    return Line(
        path.name,
        result["parameters"],
        numbers["loss"],
        kl_of(numbers),
        numbers.get("agreement"),
        result["seconds"],
        _weights_text(result),
        None if "metric" not in numbers else numbers.get(numbers["metric"]),
        curve,
    )


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
    parameters = sizes[0] if sizes else None
    metric = numbers.get(f"teacher_{numbers.get('metric')}")
    of_values = numbers.get("metric") == "pearson"
    kl, agreement = (None, None) if of_values else (0.0, 1.0)
    return Line(
        "teacher", parameters, numbers["teacher_loss"], kl, agreement, None, "as cached", metric
    )


def headers(comparison: Comparison) -> tuple[str, ...]:
    """Those of `cells`; the first and the last column are text."""
    metric = () if comparison.metric is None else (TITLES[comparison.metric],)
    names = ("model", "parameters", "loss", "KL to teacher", "agreement")
    return (*names, *metric, "seconds", "weights")


def table(comparison: Comparison) -> str:
    """The comparison as aligned text."""
    rows = [headers(comparison), *(cells(line, comparison.metric) for line in comparison.lines)]
    last = len(rows[0]) - 1
    widths = [max(len(row[column]) for row in rows) for column in range(last + 1)]
    text = [
        "  ".join(
            cell.ljust(width) if column in (0, last) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([*text, note(comparison)])


def note(comparison: Comparison) -> str:
    """What the numbers are over."""
    if comparison.metric == "pearson":
        return f"held-out loss: mean squared error over {comparison.positions:,} positions"
    whole = comparison.targets == "dense" or comparison.targets.startswith("sample")
    over = "all classes, from" if whole else "the cells of"
    return (
        f"held-out loss in nats over {comparison.positions:,} positions; KL over {over} "
        f"{comparison.targets}"
    )


def cells(line: Line, metric: MetricName | None) -> tuple[str, ...]:
    """One line of the table as text; with a column for the metric of the task where it has one."""
    value = "" if line.metric is None else f"{line.metric:.4f}"
    return (
        line.name,
        "" if line.parameters is None else f"{line.parameters:,}",
        f"{line.loss:.4f}",
        "" if line.kl is None else f"{line.kl:.4f}",
        "" if line.agreement is None else f"{line.agreement:.1%}",
        *(() if metric is None else (value,)),
        "" if line.seconds is None else f"{line.seconds:.1f}",
        line.weights,
    )


def as_json(comparison: Comparison) -> str:
    """Everything but the curves."""
    lines = [
        {name: getattr(line, name) for name in line.__slots__ if name != "curve"}
        for line in comparison.lines
    ]
    return json.dumps(
        {
            "targets": comparison.targets,
            "positions": comparison.positions,
            "metric": comparison.metric,
            "models": lines,
        }
    )


def write_html(comparison: Comparison, path: Path) -> None:
    """One self-contained file: the table, held-out loss, training loss as curves."""
    environment = Environment(loader=PackageLoader("student_train"), autoescape=True)
    html = environment.get_template("compare.html").render(
        headers=headers(comparison),
        rows=[cells(line, comparison.metric) for line in comparison.lines],
        note=note(comparison),
        picture=_picture(comparison),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")


def _picture(comparison: Comparison) -> str:
    """An SVG of two panels."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("--html needs matplotlib: pip install 'teacher-cache[report]'") from None
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    dots, curves = figure.subplots(1, 2)
    shown = comparison.lines
    names, losses = [line.name for line in shown], [line.loss for line in shown]
    colours = [f"C{index}" for index in range(len(shown))]
    dots.scatter(losses, names, color=colours, s=70, zorder=3)
    for name, loss in zip(names, losses, strict=True):
        dots.annotate(f"{loss:.3f}", (loss, name), (9, 0), textcoords="offset points", va="center")
    dots.margins(x=0.25, y=0.25)
    dots.grid(axis="y", linestyle=":", zorder=0)
    dots.invert_yaxis()
    unit = "squared error" if comparison.metric == "pearson" else "nats"
    dots.set_xlabel(f"held-out loss, {unit}")
    for line, colour in zip(shown, colours, strict=True):
        if line.curve:
            steps, values = zip(*_smooth(line.curve), strict=True)
            curves.plot(steps, values, color=colour, label=line.name)
    curves.set_xlabel("step")
    curves.set_ylabel(f"training loss on hard labels, {unit}")
    if curves.lines:
        curves.legend(frameon=False)
    for axes in (dots, curves):
        axes.spines[["top", "right"]].set_visible(False)
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _smooth(curve: Sequence[tuple[int, float]], points: int = 100) -> list[tuple[float, float]]:
    """Means over equal stretches of steps."""
    size = max(1, len(curve) // points)
    stretches = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [
        (sum(step for step, _ in s) / len(s), sum(value for _, value in s) / len(s))
        for s in stretches
    ]
