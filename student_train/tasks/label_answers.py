"""What metrics of label spaces are computed from: what was answered at every position.

N positions of a batch, P of all batches, R rows, C labels or numbers of a row.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.cache import Cache
from student_train.data.collate import MicroBatch
from student_train.metrics.labels import LabelPredictions, task_numbers
from student_train.metrics.rows import multi_label_numbers, regression_numbers
from student_train.processes import of_all_processes


class LabelAnswers:
    """Answers over labels: row, label, prediction, its probability and the teacher's choice."""

    def __init__(self, cache: Cache) -> None:
        self._names = cache.manifest.labels
        self._has_targets = cache.has_targets
        self._answers: list[Tensor] = []

    def add(self, output: Mapping[str, Tensor], batch: MicroBatch) -> None:
        """Keeps i64 [N, 5].

        The probability by its bits as a float64: one tensor is what travels between processes.
        Equal logits, the student's or the teacher's, leave the choice to the smaller class.
        """
        logits_NC = output["logits"].cpu()
        confidence_N, predicted_N = logits_NC.double().softmax(dim=-1).max(dim=-1)
        row_N = batch["row_ids"][batch["position_index"] // batch["input_ids"].shape[1]]
        teacher_N = torch.full_like(predicted_N, -1)
        if "target_ids" in batch:
            best_N1 = batch["target_logprobs"].argmax(dim=-1, keepdim=True)
            teacher_N = batch["target_ids"].gather(1, best_N1)[:, 0].long()
        confidence_N = confidence_N.view(torch.int64)
        columns = [row_N, batch["labels"], predicted_N, confidence_N, teacher_N]
        self._answers.append(torch.stack(columns, dim=1))

    def numbers(self, device: torch.device) -> dict[str, Any]:
        """The metrics of metrics/labels.py."""
        of_positions = torch.cat([torch.zeros(0, 5, dtype=torch.int64), *self._answers])
        columns = of_all_processes(of_positions, device).numpy().T
        row_P, labels_P, predicted_P, confidence_P, teacher_P = columns
        confidence_P = np.ascontiguousarray(confidence_P).view(np.float64)
        teacher = teacher_P if self._has_targets else None
        return task_numbers(
            LabelPredictions(row_P, labels_P, predicted_P, confidence_P, teacher), self._names
        )


class _OutputAnswers:
    """Answers where each output of a row is a position: label, student's, teacher's."""

    def __init__(self, cache: Cache) -> None:
        self._num_outputs = len(cache.manifest.labels)
        self._has_targets = cache.has_targets
        self._answers: list[Tensor] = []

    def keep(self, labels_N: Tensor, said_N: Tensor, teacher_N: Tensor | None) -> None:
        """Keeps f64 [N, 3]."""
        if teacher_N is None:
            teacher_N = torch.zeros_like(said_N)
        self._answers.append(torch.stack([labels_N.double(), said_N, teacher_N], dim=1))

    def by_row(self, metrics: Callable[..., dict[str, Any]], device: torch.device) -> Any:
        """The metrics of [R, C] each; a row's positions stand together, in the order of C."""
        of_positions = torch.cat([torch.zeros(0, 3, dtype=torch.float64), *self._answers])
        everyones = of_all_processes(of_positions, device).numpy()
        labels_RC, said_RC, teacher_RC = (
            column.reshape(-1, self._num_outputs) for column in everyones.T
        )
        return metrics(labels_RC, said_RC, teacher_RC if self._has_targets else None)


class MultiLabelAnswers(_OutputAnswers):
    """Answers of yes or no: the probability of yes."""

    def add(self, output: Mapping[str, Tensor], batch: MicroBatch) -> None:
        """Keeps the sigmoid of the second of the logits (0, z), and the teacher's probability."""
        teacher_N = None
        if "target_logprobs" in batch:
            teacher_N = batch["target_logprobs"][:, 1].double().exp()
        self.keep(batch["labels"], output["logits"][:, -1].double().cpu().sigmoid(), teacher_N)

    def numbers(self, device: torch.device) -> dict[str, Any]:
        """The metrics of rows.py for several labels."""
        found: dict[str, Any] = self.by_row(multi_label_numbers, device)
        return found


class NumberAnswers(_OutputAnswers):
    """Answers that are numbers, as they are."""

    def add(self, output: Mapping[str, Tensor], batch: MicroBatch) -> None:
        """Keeps what student and teacher say."""
        teacher_N = batch["target_values"].double() if "target_values" in batch else None
        self.keep(batch["labels"], output["logits"][:, -1].double().cpu(), teacher_N)

    def numbers(self, device: torch.device) -> dict[str, Any]:
        """The metrics of rows.py for numbers."""
        found: dict[str, Any] = self.by_row(regression_numbers, device)
        return found
