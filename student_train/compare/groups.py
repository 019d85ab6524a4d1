"""Runs that answer one question together: several seeds, and what a teacher adds to labels.

Runs belong together where only their seed and their folder differ. The baseline of a student is the
same student trained on the hard labels alone.
"""

import statistics
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from student_train.metrics.names import MetricName

_FREE = ("seed", "out")


def options_but_seed(options: Mapping[str, Any]) -> str:
    """Equal for runs that differ in seed and folder only."""
    return repr(sorted((k, v) for k, v in options.items() if k not in _FREE))


def is_baseline(result: Mapping[str, Any]) -> bool:
    """Whether a run learnt from hard labels alone, at every step."""
    scheduled = result.get("scheduled", {})
    return not any(
        result["weights"].get(name) or any(scheduled.get(f"{name}_weight", ()))
        for name in ("soft", "hidden")
    )


def score(numbers: Mapping[str, Any], metric: MetricName | None, prefix: str = "") -> float | None:
    """The main metric of a task, more being better: of a language model minus its loss."""
    if metric is not None:
        value: float | None = numbers.get(f"{prefix}{metric}")
        return value
    loss = numbers.get(f"{prefix}loss")
    return None if loss is None else -loss


def recovered(student: float, baseline: float, teacher: float) -> float | None:
    """Share of the teacher's gain over the baseline; None where there is no gain to recover."""
    return (student - baseline) / (teacher - baseline) if teacher > baseline else None


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation of a sample of two or more (n - 1 in the denominator)."""
    return statistics.fmean(values), statistics.stdev(values)


def common_name(names: Sequence[str]) -> str:
    """What the names of runs begin with: `distilled` of distilled-0 and distilled-1."""
    same = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in same).rstrip("-_.=") or " + ".join(names)
