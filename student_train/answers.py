"""What the metrics of a task are computed from, kept batch by batch: a collector for each task.

Sums of losses are not enough for an F1: a collector keeps what student and teacher answered at
every position, gathers it over all processes at the end, and hands it to the metrics.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from shared.cache import Cache
from shared.tasks import TASKS
from student_train.collate import MicroBatch
from student_train.metrics import Answers, task_numbers
from student_train.row_metrics import multi_label_numbers, regression_numbers


class Collector(Protocol):
    """Of one evaluation."""

    def add(self, output: Mapping[str, Tensor], batch: MicroBatch) -> None:
        """Keeps what is needed of a batch and of what an attached student returned for it."""

    def numbers(self, device: torch.device) -> dict[str, Any]:
        """The metrics, the same in every process; `device` is where they talk to each other."""


def collector_for(cache: Cache) -> Collector | None:
    """The collector of the task of a cache; None where sums of losses say all there is."""
    if cache.manifest.layout == "outputs":
        return OutputAnswers(cache)
    if TASKS[cache.manifest.task].target_space == "labels":
        return LabelAnswers(cache)
    return None


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
        """The metrics of metrics.py."""
        of_positions = torch.cat([torch.zeros(0, 5, dtype=torch.int64), *self._answers])
        columns = of_all_processes(of_positions, device).numpy().T
        row_P, labels_P, predicted_P, confidence_P, teacher_P = columns
        confidence_P = np.ascontiguousarray(confidence_P).view(np.float64)
        teacher = teacher_P if self._has_targets else None
        return task_numbers(
            Answers(row_P, labels_P, predicted_P, confidence_P, teacher), self._names
        )


class OutputAnswers:
    """Answers where each output of a row is yes or no, or a number: label, student's, teacher's."""

    def __init__(self, cache: Cache) -> None:
        self._num_outputs = len(cache.manifest.labels)
        self._of_values = cache.manifest.problem_type == "regression"
        self._has_targets = cache.has_targets
        self._answers: list[Tensor] = []

    def add(self, output: Mapping[str, Tensor], batch: MicroBatch) -> None:
        """Keeps f64 [N, 3]: numbers as they are, of yes and no the probability of yes."""
        said_N = output["logits"][:, -1].double().cpu()
        if not self._of_values:
            said_N = said_N.sigmoid()  # of the logits (0, z)
        teacher_N = torch.zeros_like(said_N)
        if "target_values" in batch:
            teacher_N = batch["target_values"].double()
        elif "target_logprobs" in batch:
            teacher_N = batch["target_logprobs"][:, 1].double().exp()
        self._answers.append(torch.stack([batch["labels"].double(), said_N, teacher_N], dim=1))

    def numbers(self, device: torch.device) -> dict[str, Any]:
        """The metrics of row_metrics.py; a row's positions stand together, in the order of C."""
        of_positions = torch.cat([torch.zeros(0, 3, dtype=torch.float64), *self._answers])
        everyones = of_all_processes(of_positions, device).numpy()
        labels_RC, said_RC, teacher_RC = (
            column.reshape(-1, self._num_outputs) for column in everyones.T
        )
        metrics = regression_numbers if self._of_values else multi_label_numbers
        return metrics(labels_RC, said_RC, teacher_RC if self._has_targets else None)


def of_all_processes(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The rows of every process, in the order of ranks; they may differ in number."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return rows
    counts = [
        torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())
    ]
    dist.all_gather(counts, torch.tensor([len(rows)], device=device))
    longest = int(torch.cat(counts).max())
    padded = rows.new_zeros(longest, rows.shape[1]).to(device)
    padded[: len(rows)] = rows.to(device)
    everyone = [torch.zeros_like(padded) for _ in counts]
    dist.all_gather(everyone, padded)
    parts = zip(everyone, counts, strict=True)
    return torch.cat([part[: int(count)] for part, count in parts]).cpu()
