"""A comparison in words: the columns of its table, the notes below it, and its JSON."""

import json
from collections.abc import Callable
from dataclasses import asdict

from student_train.compare.report import Comparison, Line, Numbers
from student_train.metrics.names import TITLES
from student_train.run_files import kind_of_text

_Cell = Callable[[Line], str]


def columns(comparison: Comparison) -> list[tuple[str, _Cell]]:
    """Header and text of each column; those that no line has anything in are left out.

    The first and the last column are text.
    """
    metric = "" if comparison.metric is None else TITLES[comparison.metric]
    every: list[tuple[str, _Cell]] = [
        ("model", lambda line: line.name),
        ("parameters", lambda line: "" if line.parameters is None else f"{line.parameters:,}"),
        ("loss before", lambda line: _number(line.before, None, "loss")),
        ("loss", lambda line: _number(line.numbers, line.deviation, "loss")),
        ("KL to teacher", lambda line: _number(line.numbers, line.deviation, "kl")),
        ("agreement", lambda line: _number(line.numbers, line.deviation, "agreement")),
        (f"{metric} before", lambda line: _number(line.before, None, "metric")),
        (metric, lambda line: _number(line.numbers, line.deviation, "metric")),
        ("95 % interval", _interval),
        ("ECE", lambda line: _number(line.numbers, line.deviation, "ece")),
        ("gain recovered", _recovered),
        ("seconds", lambda line: "" if line.seconds is None else f"{line.seconds:.1f}"),
        ("weights", lambda line: line.weights),
    ]
    always = ("model", "parameters", "KL to teacher", "agreement", "seconds")
    return [
        (name, cell)
        for name, cell in every
        if name in always or any(cell(line) for line in comparison.lines)
    ]


def _number(numbers: Numbers | None, deviation: Numbers | None, name: str) -> str:
    value = None if numbers is None else asdict(numbers)[name]
    if value is None:
        return ""
    text = "{:.1%}" if name == "agreement" else "{:.4f}"
    spread = None if deviation is None else asdict(deviation)[name]
    return text.format(value) + ("" if spread is None else f" ± {text.format(spread)}")


def _interval(line: Line) -> str:
    low, high = line.numbers.metric_low, line.numbers.metric_high
    return "" if low is None or high is None else f"{low:.4f} to {high:.4f}"


def _recovered(line: Line) -> str:
    return line.note if line.recovered is None else f"{line.recovered:.0%}"


def rows(comparison: Comparison) -> list[tuple[str, ...]]:
    """The headers, then the cells of every line."""
    shown = columns(comparison)
    cells = [tuple(cell(line) for _, cell in shown) for line in comparison.lines]
    return [tuple(name for name, _ in shown), *cells]


def table(comparison: Comparison) -> str:
    """The comparison as aligned text."""
    found = rows(comparison)
    last = len(found[0]) - 1
    widths = [max(len(row[column]) for row in found) for column in range(last + 1)]
    text = [
        "  ".join(
            cell.ljust(width) if column in (0, last) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in found
    ]
    return "\n".join([*text, *notes(comparison)])


def notes(comparison: Comparison) -> list[str]:
    """What the numbers are over, and how they came about."""
    found = [_loss_note(comparison)]
    if any(line.kind == "seeds" for line in comparison.lines):
        found.append("seeds: mean and standard deviation over runs that differ in their seed only")
    names = sorted({line.baseline for line in comparison.lines if line.baseline is not None})
    if names:
        metric = "loss" if comparison.metric is None else TITLES[comparison.metric]
        found.append(
            f"gain recovered: (student - baseline) / (teacher - baseline) of the {metric}; "
            f"baseline, the same student on hard labels only: {'; '.join(names)}"
        )
    return found


def _loss_note(comparison: Comparison) -> str:
    if comparison.metric == "cosine":
        return f"held-out loss is 1 - cosine, the mean over {comparison.positions:,} states"
    if comparison.metric == "pearson":
        return f"held-out loss: mean squared error over {comparison.positions:,} positions"
    kind = kind_of_text(comparison.targets)
    whole = kind is not None and (kind.every_temperature or kind.sampled)
    over = "all classes, from" if whole else "the cells of"
    return (
        f"held-out loss in nats over {comparison.positions:,} positions; KL over {over} "
        f"{comparison.targets}"
    )


def as_json(comparison: Comparison) -> str:
    """Everything but the curves."""
    models = []
    for line in comparison.lines:
        model = asdict(line)
        del model["curve"]
        models.append(model | model.pop("numbers"))
    return json.dumps(
        {
            "targets": comparison.targets,
            "positions": comparison.positions,
            "metric": comparison.metric,
            "models": models,
        }
    )
