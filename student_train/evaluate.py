"""How good a student is on a held-out cache: loss, KL to the teacher, agreement; teacher included.

Sums over positions are added up batch by batch and over all processes, and divided once. On a label
space the answers of all positions are kept, for the metrics of the task. Nothing here needs the
teacher: its loss on the same positions, or what it answered there, was cached with its targets.
"""

import math
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from shared.cache import Cache, open_cache
from shared.tasks import TASKS
from student_train.collate import MicroBatch
from student_train.config import EvaluateConfig
from student_train.loss_spec import LossSpec
from student_train.metrics import Answers, task_numbers
from student_train.objective import Objective, attach
from student_train.order import Order, OrderSpec
from student_train.stream import BatchStream, StreamSpec
from student_train.student import build_student, check_fit, load_config


def evaluate(student: nn.Module, cache: Cache, *, batch_tokens: int) -> dict[str, Any]:
    """The student's numbers over every row of a cache, at T = 1.

    `loss`: mean cross-entropy on the hard labels, nats. `kl`: KL(teacher || student), if the cache
    knows all of it (`dense`; `sample` on average), else `kl_bucketed`, over the kept classes and
    one cell for all others. `agreement`: share of positions where student and teacher have the same
    most probable class. The last two only where the cache has targets. On a label space also the
    metrics of the task (metrics.py).
    """
    manifest = cache.manifest
    has_targets = manifest.targets.kind != "none"
    of_labels = TASKS[manifest.task].target_space == "labels"
    objective = Objective(
        spec=LossSpec(),
        num_classes=manifest.targets.num_classes,
        target_kind=manifest.targets.kind,
        soft_weight=1.0 if has_targets else 0.0,
        hard_weight=1.0,
    )
    world, rank = _world()
    order = Order(
        cache.block_rows,
        cache.row_tokens,
        OrderSpec(batch_tokens=batch_tokens * world, shuffle=False, epochs=1),
    )
    spec = StreamSpec(world_size=world, rank=rank, targets=has_targets)
    stream = BatchStream(cache, order, spec, max_steps=order.steps_for_epochs(1))
    device = next(student.parameters()).device
    names = ["hard", "student_entropy", *(["soft", "agreement"] if has_targets else [])]
    sums = torch.zeros(len(names), dtype=torch.float64)
    answers: list[torch.Tensor] = []
    training = student.training
    student.eval()
    attachment = attach(student, objective)
    try:
        with torch.no_grad():
            for batch in stream:
                output = student(**{name: tensor.to(device) for name, tensor in batch.items()})
                sums += torch.stack([output[name].double().cpu() for name in names])
                if of_labels:
                    answers.append(_answers(output["logits"].cpu(), batch))
    finally:
        attachment.detach()
        student.train(training)
    if world > 1:
        sums = _summed_over_processes(sums, device)
    numbers = _numbers(dict(zip(names, sums.tolist(), strict=True)), cache)
    if of_labels:
        of_positions = torch.cat([torch.zeros(0, _COLUMNS, dtype=torch.int64), *answers])
        if world > 1:
            of_positions = _of_all_processes(of_positions, device)
        numbers |= task_numbers(_columns(of_positions.numpy(), has_targets), manifest.labels)
    return numbers


_COLUMNS = 5  # of what `_answers` returns


def _answers(logits_NC: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Row, label, prediction, its probability and the teacher's choice, i64 [N, 5].

    The probability by its bits as a float64: one tensor is what travels between processes. Equal
    logits, the student's or the teacher's, leave the choice to the smaller class.
    """
    confidence_N, predicted_N = logits_NC.double().softmax(dim=-1).max(dim=-1)
    row_N = batch["row_ids"][batch["position_index"] // batch["input_ids"].shape[1]]
    teacher_N = torch.full_like(predicted_N, -1)
    if "target_ids" in batch:
        best_N1 = batch["target_logprobs"].argmax(dim=-1, keepdim=True)
        teacher_N = batch["target_ids"].gather(1, best_N1)[:, 0].long()
    confidence_N = confidence_N.view(torch.int64)
    return torch.stack([row_N, batch["labels"], predicted_N, confidence_N, teacher_N], dim=1)


def _columns(of_positions: np.ndarray, has_targets: bool) -> Answers:
    row_P, labels_P, predicted_P, confidence_P, teacher_P = of_positions.T
    confidence_P = np.ascontiguousarray(confidence_P).view(np.float64)
    return Answers(row_P, labels_P, predicted_P, confidence_P, teacher_P if has_targets else None)


def _numbers(sums: dict[str, float], cache: Cache) -> dict[str, Any]:
    positions = int(cache.row_positions.sum())
    loss = sums["hard"] / positions
    numbers: dict[str, Any] = {
        "positions": positions,
        "loss": loss,
        "student_entropy": sums["student_entropy"] / positions,
    }
    if TASKS[cache.manifest.task].target_space == "vocabulary":
        numbers["perplexity"] = math.exp(min(loss, 700.0))
    targets = cache.manifest.targets
    if targets.kind != "none":
        statistics = [commit.statistics for commit in cache.commits]
        whole = targets.complete or targets.kind == "sample"
        numbers["kl" if whole else "kl_bucketed"] = sums["soft"] / positions
        numbers["targets"] = targets.text
        numbers["agreement"] = sums["agreement"] / positions
        numbers["teacher_loss"] = -sum(s["sum_label_logprob"] for s in statistics) / positions
        numbers["teacher_entropy"] = sum(s["sum_entropy"] for s in statistics) / positions
    return numbers


def _world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    return 1, 0


def _summed_over_processes(sums: torch.Tensor, device: torch.device) -> torch.Tensor:
    on_device = sums.to(device)
    dist.all_reduce(on_device)
    return on_device.cpu()


def _of_all_processes(rows: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The rows of every process, in the order of ranks; they may differ in number."""
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


def run(config: EvaluateConfig) -> dict[str, Any]:
    """`train-student evaluate`: loads a student and evaluates it on a cache."""
    cache = open_cache(config.cache, allow_partial=config.allow_partial)
    model_config = load_config(config.student)
    check_fit(config.student, model_config, cache)
    student = build_student(config.student, cache, seed=0)
    cuda = config.device == "auto" and torch.cuda.is_available()
    student.to("cuda" if cuda else "cpu")
    return {
        "student": config.student,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "cache_id": cache.cache_id,
        **evaluate(student, cache, batch_tokens=config.batch_tokens),
    }
