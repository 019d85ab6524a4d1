"""Metrics of rows with several labels, or with numbers: pure functions of arrays.

The rank correlation is written here: scipy would come for ten lines.

Shapes: R rows, C labels or numbers of each.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from student_train.metrics.bootstrap import bootstrap_interval, interval_of, ratio
from student_train.metrics.labels import calibration_error

_YES = 0.5  # a label is answered with yes above this probability


def multi_label_numbers(
    labels_RC: np.ndarray,
    probs_RC: np.ndarray,
    teacher_RC: np.ndarray | None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics of yes or no for each label; `probs_RC` and `teacher_RC` are probabilities of yes.

    The main one is micro F1, with a bootstrap interval over rows as in `labels.task_numbers`.
    `ece` is over all answers: how far the probability of an answer is from how often it is right.
    """
    labels_RC, said_RC = labels_RC == 1, probs_RC > _YES
    shares = _f1_shares(labels_RC, said_RC, axis=1)
    low, high = bootstrap_interval(*shares, seed=seed)
    confidence_RC = np.where(said_RC, probs_RC, 1 - probs_RC)
    numbers: dict[str, Any] = {
        "metric": "micro_f1",
        "micro_f1": ratio(*shares),
        "micro_f1_low": low,
        "micro_f1_high": high,
        "macro_f1": macro_f1(labels_RC, said_RC),
        "subset_accuracy": subset_accuracy(labels_RC, said_RC),
        "ece": calibration_error(confidence_RC.ravel(), (said_RC == labels_RC).ravel()),
    }
    if teacher_RC is not None:
        numbers["teacher_micro_f1"] = ratio(*_f1_shares(labels_RC, teacher_RC > _YES, axis=1))
    return numbers


def macro_f1(labels_RC: np.ndarray, said_RC: np.ndarray) -> float:
    """Mean F1 of the labels that some row has, or is said to have, each counted once."""
    both_C, either_C = _f1_shares(labels_RC, said_RC, axis=0)
    there_C = either_C > 0
    return float((both_C[there_C] / either_C[there_C]).mean()) if there_C.any() else 0.0


def subset_accuracy(labels_RC: np.ndarray, said_RC: np.ndarray) -> float:
    """Share of rows of which every label is right."""
    return float((labels_RC == said_RC).all(axis=1).mean()) if len(labels_RC) else 0.0


def regression_numbers(
    labels_RC: np.ndarray,
    values_RC: np.ndarray,
    teacher_RC: np.ndarray | None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Metrics of numbers, of several the means of theirs; the main one is Pearson's correlation."""

    def of_rows(rows_R: np.ndarray) -> float:
        return pearson(labels_RC[rows_R], values_RC[rows_R])

    low, high = interval_of(of_rows, len(labels_RC), seed=seed)
    numbers: dict[str, Any] = {
        "metric": "pearson",
        "pearson": pearson(labels_RC, values_RC),
        "pearson_low": low,
        "pearson_high": high,
        "spearman": spearman(labels_RC, values_RC),
        "mse": mean_squared_error(labels_RC, values_RC),
    }
    if teacher_RC is not None:
        for name, metric in _OF_TEACHER.items():
            numbers[f"teacher_{name}"] = metric(labels_RC, teacher_RC)
    return numbers


def pearson(one_RC: np.ndarray, other_RC: np.ndarray) -> float:
    """Correlation over the rows, the mean over C; 0 where one of the two does not vary."""
    if not len(one_RC):
        return 0.0
    one_RC, other_RC = one_RC - one_RC.mean(axis=0), other_RC - other_RC.mean(axis=0)
    scale_C = np.sqrt(np.square(one_RC).sum(axis=0) * np.square(other_RC).sum(axis=0))
    varies_C = scale_C > 0
    product_C = (one_RC * other_RC).sum(axis=0)
    return float(np.divide(product_C, scale_C, out=np.zeros(len(scale_C)), where=varies_C).mean())


def spearman(one_RC: np.ndarray, other_RC: np.ndarray) -> float:
    """Pearson's correlation of the ranks; equal numbers share the mean of their ranks."""
    return pearson(*(np.apply_along_axis(_ranks, 0, each) for each in (one_RC, other_RC)))


def mean_squared_error(one_RC: np.ndarray, other_RC: np.ndarray) -> float:
    """The mean over rows and numbers alike."""
    return float(np.square(one_RC - other_RC).mean()) if one_RC.size else 0.0


_OF_TEACHER: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "pearson": pearson,
    "spearman": spearman,
    "mse": mean_squared_error,
}


def _ranks(values_R: np.ndarray) -> np.ndarray:
    _, place_R, counts = np.unique(values_R, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place_R]


def _f1_shares(
    labels_RC: np.ndarray, said_RC: np.ndarray, *, axis: int
) -> tuple[np.ndarray, np.ndarray]:
    """2 TP and labels + answers, over the labels of each row or the rows of each label."""
    both = 2 * (labels_RC & said_RC).sum(axis=axis)
    return both, labels_RC.sum(axis=axis) + said_RC.sum(axis=axis)
