"""`plan --html` and `inspect --html`: one self-contained page each, from the same numbers as text.

Everything reaches the page through templates that escape it: a corpus may contain markup.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.pages import drawing
from shared.pages.drawing import Axis, Chart, Series, log_axis
from shared.pages.pages import write_page
from shared.targets.kinds import KINDS
from shared.targets.spec import TargetSpec
from teacher_cache.tools.report import (
    CHOICE_NOTES,
    choice_table,
    recommendation,
    size,
    spec_of,
    targets_text,
    teacher_text,
)

_COLOURS = {kind: number for number, kind in enumerate(KINDS)}
_LARGER_BATCH = 100  # times as many positions: what the dashed lines are for
_LEAST_ERROR = 1e-4  # drawn; below it is dense, which loses its rounding only


def write_plan(numbers: dict[str, Any], path: Path) -> None:
    """What `estimate` found; needs --calibrate."""
    choices = numbers["choices"]
    table = choice_table(choices)
    write_page(
        "teacher_cache",
        "plan.html",
        path,
        asked=numbers["asked"],
        subtitle=f"{numbers['documents']:,} documents, {numbers['classes']:,} classes; "
        f"{numbers['sampled_documents']:,} documents looked at",
        tiles=_plan_tiles(numbers),
        recommendation=_sentence(recommendation(numbers)),
        charts=_plan_charts(numbers),
        chart_note="The ring marks what was asked for. Solid: a batch of "
        f"{numbers.get('measured_positions', 0):,} positions, as measured; dashed: of "
        f"{_LARGER_BATCH} times as many, where little but the bias is left. "
        f"Errors below {_LEAST_ERROR:g} are not drawn.",
        table=table,
        rows=list(zip(table[1:], [choice["asked"] for choice in choices], strict=True)),
        notes=[_sentence(note) for note in CHOICE_NOTES],
        parts=_bars({n: b for n, b in numbers["bytes_per_position"].items() if b}, "{:.1f}"),
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _plan_tiles(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    tiles = [
        (size(numbers["bytes"]), f"on disk; {size(numbers['free_bytes'])} free"),
        (f"{numbers['tokens']:,}", "tokens"),
        (f"{numbers['positions']:,}", "positions"),
        (f"{numbers['shards']:,}", "shards"),
    ]
    if numbers["calibrated"]:
        tiles += [
            (f"{numbers['hours']:.2f} h", f"at {numbers['tokens_per_s']:,} tokens/s"),
            (f"{numbers['entropy']:.2f} nats", "entropy of the teacher"),
            (f"{numbers['disk_mb_per_s']:,} MB/s", "written by the disk"),
        ]
    return tiles


def _plan_charts(numbers: dict[str, Any]) -> list[Chart]:
    if not numbers["choices"]:
        return []
    charts = [
        _gradient_chart(numbers["choices"], student)
        for student in numbers["choices"][0]["gradient_error"]
    ]
    return [
        *(chart for chart in charts if chart is not None),
        _kept_chart(numbers),
        drawing.histogram("Entropy of the teacher", "nats", numbers["entropy_histogram"]),
    ]


def _gradient_chart(choices: Sequence[dict[str, Any]], student: str) -> Chart | None:
    """Bytes against gradient error, a line for each kind; now, and with a much larger batch.

    None where there is no error to draw: of few classes all are kept.
    """
    series: list[Series] = []
    marked = []
    for kind, colour in _COLOURS.items():
        found = [choice for choice in choices if choice["kind"] == kind]
        found = [c for c in found if c["gradient_error"][student]["error"] >= _LEAST_ERROR]
        found.sort(key=lambda choice: choice["bytes_per_position"])
        if found:
            of_kind, asked = _gradient_series(kind, colour, found, student)
            series += of_kind
            marked += asked
    points = [point for one in series for point in one.points]
    if not points:
        return None
    kl = choices[0]["gradient_error"][student]["student_kl"]
    chart = drawing.lines(
        f"Gradient error, student at KL {kl:.1f}",
        log_axis("bytes of the targets of a position", [x for x, _ in points]),
        log_axis("relative error", [y for _, y in points]),
        series,
        marked,
    )
    chart.legend[:] = [entry for entry in chart.legend if not entry["dashed"]]
    return chart


def _gradient_series(
    kind: str, colour: int, found: Sequence[dict[str, Any]], student: str
) -> tuple[list[Series], list[tuple[float, float, str]]]:
    """The two lines of a kind, and the marks of what was asked for."""
    now, later, titles, marked = [], [], [], []
    for choice in found:
        error = choice["gradient_error"][student]
        left = (error["bias"] ** 2 + error["deviation"] ** 2 / _LARGER_BATCH) ** 0.5
        now.append((choice["bytes_per_position"], error["error"]))
        later.append((choice["bytes_per_position"], max(left, _LEAST_ERROR)))
        titles.append(f"{choice['text']}: {now[-1][0]:.1f} bytes, error {now[-1][1]:.4f}")
        if choice["asked"]:
            marked.append((*now[-1], f"asked for: {titles[-1]}"))
    lines = [
        Series(kind, now, colour, titles=titles),
        Series(f"{kind}, larger batch", later, colour, dashed=True),
    ]
    return lines, marked


def _kept_chart(numbers: dict[str, Any]) -> Chart:
    series = [
        Series(f"T = {t}", [(float(k), mass) for k, mass in by_k.items()], index % 6)
        for index, (t, by_k) in enumerate(numbers["kept_mass_by_k"].items())
    ]
    marked = [
        (choice["size"], mass, f"asked for: k = {choice['size']}, T = {t}: {mass:.1%}")
        for choice in numbers["choices"]
        if choice["asked"] and "top_k" in KINDS[choice["kind"]].reads
        for t, mass in choice["kept_mass"].items()
    ]
    most = max(x for one in series for x, _ in one.points)
    return drawing.lines(
        "Mass of the k largest classes",
        Axis("k", 1.0, max(2.0, most), log=True),
        Axis("kept mass", 0.0, 1.0, percent=True),
        series,
        marked,
    )


def write_inspection(numbers: dict[str, Any], path: Path) -> None:
    """What `inspect` found."""
    histograms, spec = numbers.get("histograms"), spec_of(numbers)
    write_page(
        "teacher_cache",
        "inspect.html",
        path,
        cache_id=numbers["cache_id"][:16],
        subtitle=_subtitle(numbers),
        tiles=_inspection_tiles(numbers),
        completeness=_completeness(numbers),
        missing=_missing(numbers),
        charts=_inspection_charts(histograms, spec) if histograms is not None else [],
        kept=_kept(numbers) if spec.has_targets else [],
        kept_note="Of the classes kept as they are; all others may be drawn."
        if spec.sampled
        else "Mean probability of the entries.",
        chart_note=_histogram_note(histograms) if histograms is not None else "",
        columns=_bars(numbers["column_bytes_per_position"], "{:.2f}"),
        facts=_facts(numbers),
        rows_shown=numbers["rows_shown"],
    )


def _completeness(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    share = numbers["shards"] / numbers["num_shards"]
    text = f"{numbers['shards']:,} of {numbers['num_shards']:,}"
    return [{"name": "shards", "share": share, "text": text}]


def _missing(numbers: dict[str, Any]) -> str:
    """The numbers of the missing shards, as far as they are listed."""
    missing = numbers["missing_shards"]
    if not missing:
        return ""
    more = " and more" if numbers["num_shards"] - numbers["shards"] > len(missing) else ""
    return f"Missing: {', '.join(map(str, missing))}{more}"


def _kept(numbers: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": f"T = {t}", "share": min(1.0, mass), "text": f"{mass:.1%}"}
        for t, mass in numbers["kept_mass"].items()
    ]


def _histogram_note(histograms: dict[str, Any]) -> str:
    return (
        f"The histograms are over {histograms['positions']:,} positions in "
        f"{histograms['blocks']:,} blocks spread over the cache."
    )


def _subtitle(numbers: dict[str, Any]) -> str:
    if spec_of(numbers).has_targets:
        return targets_text(numbers)
    return "hard labels only, no teacher" if numbers["teacher"] is None else "hidden states alone"


def _inspection_tiles(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    tiles = [
        (
            "complete" if numbers["complete"] else "INCOMPLETE",
            f"format {numbers['format_version']}",
        ),
        (size(numbers["bytes"]), f"{numbers['bytes_per_position']:.1f} bytes a position"),
        (f"{numbers['rows']:,}", "rows"),
        (f"{numbers['tokens']:,}", "tokens"),
        (f"{numbers['positions']:,}", "positions"),
    ]
    if numbers["teacher_mse"] is not None:
        tiles.append((f"{numbers['teacher_mse']:.4g}", "mean squared error of the teacher"))
    elif spec_of(numbers).distributions:
        tiles += [
            (f"{numbers['kept_mass']['1']:.1%}", "kept mass at T = 1"),
            (f"{numbers['entropy']:.2f} nats", "entropy of the teacher"),
        ]
        if numbers["teacher_loss"] is not None:
            loss = f"{numbers['teacher_loss']:.2f} nats"
            tiles.append((loss, "its loss on the hard labels"))
    return tiles


def _inspection_charts(histograms: dict[str, Any], spec: TargetSpec) -> list[Chart]:
    tail = "Mass left to the drawn entries" if spec.sampled else "Tail mass"
    charts = [drawing.histogram("Entropy of the teacher", "nats", histograms["entropy"])]
    if "entries" in histograms:
        charts.append(drawing.histogram("Entries of a position", "entries", histograms["entries"]))
    if not spec.every_temperature:
        charts.append(drawing.histogram(tail, "mass", histograms["tail_mass"], percent=True))
    return charts


def _facts(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    """Every field of the manifest's sections."""
    facts = [("cache id", numbers["cache_id"]), ("task", numbers["task"])]
    facts.append(("teacher", teacher_text(numbers["teacher"])))
    for section in ("teacher", "tokenizer", "corpus", "preprocessing", "targets", "hidden", "plan"):
        for name, value in (numbers[section] or {}).items():
            facts.append((f"{section} {name.replace('_', ' ')}", _plain(value)))
    for name, count in numbers["counters"].items():
        facts.append((f"counted {name.replace('_', ' ')}", f"{count:,}"))
    return facts


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value)) or "none"
    return "none" if value is None else str(value)


def _bars(values: dict[str, float], form: str) -> list[dict[str, Any]]:
    largest = max(values.values(), default=0.0) or 1.0
    return [
        {"name": name, "share": value / largest, "text": form.format(value)}
        for name, value in values.items()
    ]
