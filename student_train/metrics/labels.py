"""Metrics of the tasks over labels: pure functions of arrays, for student and teacher alike.

Entity F1 is written here, by hand: `seqeval` would bring scikit-learn and scipy for thirty lines.

Shapes: P positions in the order of their rows, R rows, C classes, S spans.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from student_train.metrics.bootstrap import bootstrap_interval, ratio
from student_train.metrics.names import MetricName
from student_train.metrics.reliability import NUM_BINS, bin_of

_OUTSIDE = "O"


@dataclass(frozen=True, slots=True)
class LabelPredictions:
    """What student and teacher say at P positions; positions of a row stand together, in order."""

    row_P: np.ndarray  # i64, the row of each position: any numbers that differ between rows
    labels_P: np.ndarray  # i64, the hard labels
    predicted_P: np.ndarray  # i64, the student's most probable class
    confidence_P: np.ndarray  # f64, its probability
    teacher_P: np.ndarray | None = None  # i64, the teacher's most probable class


def task_numbers(
    answers: LabelPredictions, names: Sequence[str], *, seed: int = 0
) -> dict[str, Any]:
    """Every metric that the labels allow; `metric` names the main one, which has an interval.

    Of the main one more is better: early stopping relies on it. It is entity F1 where the labels
    are BIO tags, else accuracy. The interval holds 95 % of its values over draws of R
    rows with replacement (bootstrap.py).
    """
    metric: MetricName = "entity_f1" if is_bio(names) else "accuracy"
    labels_P, predicted_P = answers.labels_P, answers.predicted_P
    _, row_P = np.unique(answers.row_P, return_inverse=True)
    shares = _shares(metric, labels_P, predicted_P, row_P, names)
    low, high = bootstrap_interval(*shares, seed=seed)
    numbers: dict[str, Any] = {
        "metric": metric,
        "accuracy": accuracy(labels_P, predicted_P),
        "macro_f1": macro_f1(labels_P, predicted_P),
        metric: ratio(*shares),
        f"{metric}_low": low,
        f"{metric}_high": high,
        "ece": calibration_error(answers.confidence_P, predicted_P == labels_P),
    }
    if answers.teacher_P is not None:
        teacher = _shares(metric, labels_P, answers.teacher_P, row_P, names)
        numbers[f"teacher_{metric}"] = ratio(*teacher)
    return numbers


def accuracy(labels_P: np.ndarray, predicted_P: np.ndarray) -> float:
    """Share of positions where the prediction is the label; 0 without positions."""
    return float((labels_P == predicted_P).mean()) if len(labels_P) else 0.0


def macro_f1(labels_P: np.ndarray, predicted_P: np.ndarray) -> float:
    """Mean F1 of the classes that are a label or a prediction anywhere, each counted once.

    A class that is in neither has no F1; scikit-learn leaves it out as well.
    """
    size = int(max(labels_P.max(initial=-1), predicted_P.max(initial=-1))) + 1
    label_C, predicted_C, both_C = (
        np.bincount(classes, minlength=size)
        for classes in (labels_P, predicted_P, labels_P[labels_P == predicted_P])
    )
    there_C = label_C + predicted_C > 0
    f1_C = 2 * both_C[there_C] / (label_C + predicted_C)[there_C]
    return float(f1_C.mean()) if len(f1_C) else 0.0


def is_bio(names: Sequence[str]) -> bool:
    """Whether the classes are tags of spans: O, B-X and I-X, and nothing else."""
    spans = [name for name in names if name != _OUTSIDE]
    begin = any(name.startswith("B-") for name in spans)
    return begin and all(name.startswith(("B-", "I-")) for name in spans)


@dataclass(frozen=True, slots=True)
class Entities:
    """Entities, by the positions of their first and last tag; `kind_S` numbers what they are."""

    first_S: np.ndarray
    last_S: np.ndarray
    kind_S: np.ndarray


def bio_spans(tags_P: np.ndarray, row_P: np.ndarray, names: Sequence[str]) -> Entities:
    """The entities that tags stand for, as the CoNLL script reads them (Sang and Buchholz 2000).

    One begins at B-X, and at an I-X that continues no X: after O, after another kind, or at the
    start of a row. It ends before the next one, before O, and with its row.
    """
    kinds = sorted({name[2:] for name in names if name != _OUTSIDE})
    # -1 for O; `begins` for B-X.
    kind_C = np.array([-1 if name == _OUTSIDE else kinds.index(name[2:]) for name in names])
    begins_C = np.array([name.startswith("B-") for name in names])
    kind_P, begins_P = kind_C[tags_P], begins_C[tags_P]
    goes_on_P = np.zeros(len(tags_P), bool)
    goes_on_P[1:] = (kind_P[1:] == kind_P[:-1]) & (row_P[1:] == row_P[:-1]) & ~begins_P[1:]
    inside_P = kind_P >= 0
    goes_on_P &= inside_P
    first_S = np.flatnonzero(inside_P & ~goes_on_P)
    last_S = np.flatnonzero(inside_P & ~np.append(goes_on_P[1:], False))
    return Entities(first_S, last_S, kind_P[first_S])


def calibration_error(confidence_P: np.ndarray, right_P: np.ndarray) -> float:
    """Expected calibration error over 15 bins of equal width (Guo et al. 2017, equation 3).

    The mean, weighted by positions, of how far a bin's share of right answers is from its mean
    confidence.
    """
    if not len(confidence_P):
        return 0.0
    gaps = np.bincount(bin_of(confidence_P), weights=right_P - confidence_P, minlength=NUM_BINS)
    return float(np.abs(gaps).sum() / len(confidence_P))


def _shares(
    metric: MetricName,
    labels_P: np.ndarray,
    predicted_P: np.ndarray,
    row_P: np.ndarray,
    names: Sequence[str],
) -> tuple[np.ndarray, np.ndarray]:
    """What the metric sums up in each row and what it divides by, [R] each."""
    rows = int(row_P.max(initial=-1)) + 1
    if metric == "accuracy":
        right_R = np.bincount(row_P, weights=labels_P == predicted_P, minlength=rows)
        return right_R, np.bincount(row_P, minlength=rows)
    label, predicted = (bio_spans(tags_P, row_P, names) for tags_P in (labels_P, predicted_P))
    # Spans of one tagging never overlap, so the first position names one.
    _, ours, theirs = np.intersect1d(label.first_S, predicted.first_S, return_indices=True)
    equal = label.last_S[ours] == predicted.last_S[theirs]
    equal &= label.kind_S[ours] == predicted.kind_S[theirs]
    found_R, label_R, predicted_R = (
        np.bincount(row_P[first_S], minlength=rows)
        for first_S in (label.first_S[ours][equal], label.first_S, predicted.first_S)
    )
    return 2 * found_R, label_R + predicted_R  # F1 = 2 TP / (labels + predictions)
