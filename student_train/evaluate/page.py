"""`train-student evaluate --html`: one page of a student's numbers, calibration and worst rows."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared.cache import Cache
from shared.pages import drawing
from shared.pages.drawing import Axis, Chart, Series
from shared.pages.pages import write_page
from student_train.metrics.names import TITLES
from student_train.metrics.reliability import NUM_BINS
from student_train.tasks.base import MOST_MARKED

_STUDENT, _TEACHER, _PERFECT = 0, 1, 2  # colours
_OUTSIDE = "O"
_NAMES: dict[str, str] = {
    **{str(name): title for name, title in TITLES.items()},
    "macro_f1": "macro F1",
    "subset_accuracy": "rows with every label right",
    "loss": "loss, nats",
    "perplexity": "perplexity",
    "kl": "KL to the teacher, nats",
    "kl_bucketed": "KL to the teacher over the kept classes, nats",
    "agreement": "agreement with the teacher",
    "ece": "calibration error (ECE)",
    "student_entropy": "entropy, nats",
}
_OF_TEACHER = {"student_entropy": "teacher_entropy"}  # any other: teacher_ before its name


def write_evaluation(numbers: dict[str, Any], cache: Cache, path: Path) -> None:
    """What `evaluate` found, with its details."""
    details, targets = numbers["details"], cache.manifest.targets
    whose = f"teacher: {targets.text}" if cache.has_targets else "no teacher"
    write_page(
        "student_train",
        "evaluate.html",
        path,
        student=numbers["student"],
        subtitle=f"{cache.manifest.task}, {numbers['positions']:,} positions in "
        f"{cache.num_rows:,} rows of {cache.path} ({cache.cache_id[:12]}); {whose}",
        tiles=_tiles(numbers),
        table=table_of_numbers(numbers),
        has_teacher=cache.has_targets,
        has_interval="metric" in numbers,
        charts=[reliability_chart(details), _counts_chart(details)],
        chart_note=_calibration_note(numbers),
        classes=details.get("classes", []),
        confusions=details.get("confusions", []),
        worst=[_shown(row) for row in details["worst"]],
        worst_by="KL to the teacher" if details["worst_by"] == "kl" else "loss",
        of_labels="classes" in details,
        most_marked=MOST_MARKED,
    )


def table_of_numbers(numbers: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """Name, student's number, its interval, teacher's number; empty where there is none."""
    lines = []
    teacher = dict(numbers)
    if "teacher_loss" in numbers:
        teacher["teacher_perplexity"] = math.exp(min(numbers["teacher_loss"], 700.0))
    main = numbers.get("metric")
    for name in sorted(_NAMES, key=lambda name: name != main):  # the main one first
        if name not in numbers:
            continue
        interval = ""
        if f"{name}_low" in numbers:
            interval = f"{_text(numbers[f'{name}_low'])} to {_text(numbers[f'{name}_high'])}"
        of_teacher = teacher.get(_OF_TEACHER.get(name, f"teacher_{name}"))
        shown = "" if of_teacher is None else _text(of_teacher)
        lines.append((_NAMES[name], _text(numbers[name]), interval, shown))
    return lines


def _text(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"


def _tiles(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    main = numbers.get("metric")
    tiles = [] if main is None else [(f"{numbers[main]:.1%}", _NAMES[main])]
    tiles.append((f"{numbers['loss']:.3f} nats", "loss on the hard labels"))
    if "agreement" in numbers:
        tiles.append((f"{numbers['agreement']:.1%}", "agreement with the teacher"))
    tiles.append((f"{numbers['ece']:.1%}", "calibration error (ECE)"))
    tiles.append((f"{numbers['parameters']:,}", "parameters"))
    return tiles


def _calibration_note(numbers: dict[str, Any]) -> str:
    teacher = ""
    if "teacher_ece" in numbers:
        teacher = f", the teacher's {numbers['teacher_ece']:.4f}"
    return (
        "Bars: how often the most probable class is the hard label, for answers of about the same "
        "probability; on the dashed line it is as often as the probability says. The expected "
        f"calibration error over {NUM_BINS} bins is {numbers['ece']:.4f}{teacher}."
    )


def reliability_chart(details: dict[str, Any]) -> Chart:
    """Share right by probability; bars for the student, dots for the teacher."""
    columns = [
        (b["low"], b["high"], b["right"], _bin_text(b))
        for b in details["reliability"]
        if b["count"]
    ]
    series = [Series("as sure as right", [(0.0, 0.0), (1.0, 1.0)], _PERFECT, True, dots=False)]
    found = [b for b in details.get("teacher_reliability", []) if b["count"]]
    if found:
        points = [(b["confidence"], b["right"]) for b in found]
        series.append(Series("teacher", points, _TEACHER, titles=[_bin_text(b) for b in found]))
    x = Axis("probability of the answer", 0.0, 1.0, percent=True)
    y = Axis("share right", 0.0, 1.0, percent=True)
    chart = drawing.bars("Reliability", x, y, columns, series)
    chart.legend.insert(0, {"name": "student", "colour": _STUDENT, "dashed": False})
    return chart


def _bin_text(found: dict[str, Any]) -> str:
    return (
        f"{found['low']:.0%} to {found['high']:.0%}: {found['count']:,} positions, "
        f"{found['right']:.1%} right, {found['confidence']:.1%} said"
    )


def _counts_chart(details: dict[str, Any]) -> Chart:
    bins = details["reliability"]
    total = sum(b["count"] for b in bins) or 1
    columns = [
        (b["low"], b["high"], b["count"] / total, f"{b['count']:,} positions ({share:.1%})")
        for b in bins
        for share in [b["count"] / total]
    ]
    most = max(share for _, _, share, _ in columns)
    series = []
    found = details.get("teacher_reliability", [])
    if found:
        shares = [b["count"] / (sum(b["count"] for b in found) or 1) for b in found]
        most = max(most, *shares)
        middles = [(b["low"] + b["high"]) / 2 for b in found]
        points = list(zip(middles, shares, strict=True))
        texts = [f"teacher: {b['count']:,} positions" for b in found]
        series.append(Series("teacher", points, _TEACHER, titles=texts))
    x = Axis("probability of the answer", 0.0, 1.0, percent=True)
    y = Axis("share of positions", 0.0, most * 1.08 or 1.0, percent=True)
    chart = drawing.bars("How sure it is", x, y, columns, series)
    chart.legend.insert(0, {"name": "student", "colour": _STUDENT, "dashed": False})
    return chart


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """A worst row for the template: its text in pieces, each with the answer about it or none."""
    about = {a["token"]: a for a in row["answers"] if a["token"] is not None}
    of_row = [answer for answer in row["answers"] if answer["token"] is None]
    pieces = _pieces(row["tokens"], about)
    listed = of_row or sorted(row["answers"], key=lambda answer: -answer["loss"])
    return row | {"pieces": pieces, "listed": listed}


def _pieces(tokens: Sequence[str], about: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """The text in pieces: those that an answer is about, and all that lies between."""
    pieces: list[dict[str, Any]] = []
    done = 0
    for start, answer in sorted(about.items()):
        pieces.append({"text": "".join(tokens[done:start]), "answer": None})
        done = answer["token_end"]
        text = "".join(tokens[start:done])
        pieces.append({"text": text, "answer": answer, "tagged": _is_tagged(answer)})
    return [*pieces, {"text": "".join(tokens[done:]), "answer": None}]


def _is_tagged(answer: dict[str, Any]) -> bool:
    """Whether somebody says more of a word than that it is outside of everything."""
    said = {answer["label"], answer["student"], answer.get("teacher", _OUTSIDE)}
    return said != {_OUTSIDE}
