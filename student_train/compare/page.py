"""`train-student compare --html`: the table, held-out numbers before and after, training loss."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shared.pages import drawing
from shared.pages.drawing import Axis, Chart, Series
from shared.pages.pages import write_page
from student_train.compare.report import Comparison, Line
from student_train.compare.table import notes, rows
from student_train.metrics.names import TITLES

_COLOURS = 6  # of charts.html


def write_html(comparison: Comparison, path: Path) -> None:
    """One self-contained file."""
    headers, *cells = rows(comparison)
    metric = comparison.metric
    unit = "squared error" if metric == "pearson" else "nats"
    strips = [_strip(comparison.lines, "loss", f"Held-out loss, {unit}")]
    if metric is not None:
        title = TITLES[metric][:1].upper() + TITLES[metric][1:]
        strips.insert(0, _strip(comparison.lines, "metric", f"{title} on held-out rows"))
    write_page(
        "student_train",
        "compare.html",
        path,
        headers=headers,
        lines=list(zip(comparison.lines, cells, strict=True)),
        notes=[note[:1].upper() + note[1:] for note in notes(comparison)],
        strips=strips,
        charts=_curves(comparison.lines, unit),
    )


def _strip(lines: Sequence[Line], name: str, title: str) -> dict[str, Any]:
    """One number of every model on a common scale, places in percent of its width."""
    values = [asdict(line.numbers)[name] for line in lines]
    befores = [None if line.before is None else asdict(line.before)[name] for line in lines]
    ends = [_ends(line, name) for line in lines]
    known = [v for v in (*values, *befores, *(e for both in ends for e in both)) if v is not None]
    low, high = min(known, default=0.0), max(known, default=1.0)
    margin = 0.04 * ((high - low) or 1.0)

    def place(value: float | None) -> str | None:
        if value is None:
            return None
        return f"{100 * (value - low + margin) / (high - low + 2 * margin):.2f}"

    items = []
    for line, value, before, (first, last) in zip(lines, values, befores, ends, strict=True):
        item: dict[str, Any] = {"name": line.name, "kind": line.kind, "at": place(value)}
        item["text"] = "" if value is None else f"{value:.4f}"
        item["before"] = place(before)
        item["before_text"] = "" if before is None else f"before: {before:.4f}"
        item["low"], item["high"] = place(first), place(last)
        items.append(item)
    return {"title": title, "items": items}


def _ends(line: Line, name: str) -> tuple[float | None, float | None]:
    """The ends of the interval of a run's metric, or of one standard deviation over seeds."""
    value = asdict(line.numbers)[name]
    spread = None if line.deviation is None else asdict(line.deviation)[name]
    if value is not None and spread is not None:
        return value - spread, value + spread
    if name != "metric":
        return None, None
    return line.numbers.metric_low, line.numbers.metric_high


def _curves(lines: Sequence[Line], unit: str) -> list[Chart]:
    """Training loss by step; more runs than colours share them."""
    series = [
        Series(line.name, _smooth(line.curve), index % _COLOURS, dots=False)
        for index, line in enumerate(line for line in lines if line.kind == "run")
        if line.curve
    ]
    points = [point for one in series for point in one.points]
    if not points:
        return []
    highest = max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    room = 0.05 * ((high - low) or 1.0)
    x = Axis("step", 0.0, max(1.0, highest))
    y = Axis(f"loss on hard labels, {unit}", max(0.0, low - room), high + room)
    return [drawing.lines("Training loss", x, y, series)]


def _smooth(curve: Sequence[tuple[int, float]], points: int = 100) -> list[tuple[float, float]]:
    """Means over equal stretches of steps."""
    size = max(1, len(curve) // points)
    stretches = [curve[start : start + size] for start in range(0, len(curve), size)]
    return [
        (sum(step for step, _ in s) / len(s), sum(value for _, value in s) / len(s))
        for s in stretches
    ]
