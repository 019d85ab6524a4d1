"""How sure a metric is: its interval over draws of the rows with replacement.

These are the percentiles of the bootstrap (Efron and Tibshirani 1993). Rows are drawn, because the
positions of one are not independent. R rows.
"""

from collections.abc import Callable

import numpy as np

_RESAMPLES = 1000
_INTERVAL = (2.5, 97.5)  # percent


def bootstrap_interval(
    numerator_R: np.ndarray, denominator_R: np.ndarray, *, seed: int
) -> tuple[float, float]:
    """The interval of `ratio` over draws of as many rows, with replacement."""

    def of_rows(rows_R: np.ndarray) -> float:
        return ratio(numerator_R[rows_R], denominator_R[rows_R])

    return interval_of(of_rows, len(numerator_R), seed=seed)


def interval_of(
    metric: Callable[[np.ndarray], float], rows: int, *, seed: int
) -> tuple[float, float]:
    """The interval of a metric, a function of row numbers, over draws with replacement."""
    rng = np.random.default_rng(seed)
    if not rows:
        return 0.0, 0.0
    values = [metric(rng.integers(0, rows, rows)) for _ in range(_RESAMPLES)]
    low, high = np.percentile(values, _INTERVAL)
    return float(low), float(high)


def ratio(numerator_R: np.ndarray, denominator_R: np.ndarray) -> float:
    """One sum by the other; 0 where there is nothing to divide by."""
    whole = float(denominator_R.sum())
    return float(numerator_R.sum()) / whole if whole else 0.0
