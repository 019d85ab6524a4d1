"""The loss and the main metric of one model on hard labels, from its logits.

R rows, P positions, C classes, numbers, or labels that each are yes or no.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from student_train.metrics.labels import LabelPredictions, task_numbers
from student_train.metrics.names import MetricName
from student_train.metrics.rows import (
    mean_squared_error,
    multi_label_numbers,
    regression_numbers,
)


@dataclass(frozen=True, slots=True)
class Scores:
    """What one model scores: mean cross-entropy in nats, of numbers the mean squared error; the
    main metric of the task."""

    loss: float | None = None
    metric: MetricName | None = None
    value: float | None = None


def class_scores(
    row_P: np.ndarray, labels_P: np.ndarray, logits_PC: np.ndarray, names: Sequence[str]
) -> Scores:
    """One class at each position; a metric only where the classes have names."""
    logprobs_PC = torch.from_numpy(logits_PC).double().log_softmax(-1)
    loss = -float(logprobs_PC.gather(1, torch.from_numpy(labels_P)[:, None]).mean())
    if not names:
        return Scores(loss)
    best_P = logprobs_PC.max(dim=1)
    confidence_P = best_P.values.exp().numpy()
    predictions = LabelPredictions(row_P, labels_P, best_P.indices.numpy(), confidence_P)
    return _main(loss, task_numbers(predictions, names))


def multi_label_scores(labels_RC: np.ndarray, logits_RC: np.ndarray) -> Scores:
    """Yes or no for each label of a row; a logit is that of yes."""
    loss = float((np.logaddexp(0, logits_RC) - logits_RC * labels_RC).mean())
    yes_RC = torch.from_numpy(logits_RC).sigmoid().numpy()
    return _main(loss, multi_label_numbers(labels_RC, yes_RC, None))


def number_scores(labels_RC: np.ndarray, values_RC: np.ndarray) -> Scores:
    """Numbers of each row."""
    loss = mean_squared_error(labels_RC, values_RC)
    return _main(loss, regression_numbers(labels_RC, values_RC, None))


def _main(loss: float, numbers: dict[str, Any]) -> Scores:
    return Scores(loss, numbers["metric"], numbers[numbers["metric"]])
