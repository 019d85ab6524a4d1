"""How good a student is on a held-out cache: loss, KL to the teacher, agreement; teacher included.

Sums over positions are added up batch by batch and over all processes, and divided once. For
labels and questions all answers are kept, for the metrics of the task. Nothing here needs the
teacher: its loss on the same positions, or what it answered there, was cached with its targets.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shared.cache import Cache, open_cache
from shared.errors import ConfigError
from shared.tasks import MAX_ANSWER_TOKENS
from student_train.config import EvaluateConfig
from student_train.data.order import Order, OrderSpec
from student_train.data.stream import BatchStream, StreamSpec
from student_train.evaluate.details import Details
from student_train.evaluate.page import write_evaluation
from student_train.evaluate.writing import Writing, check_writes, written_numbers
from student_train.loss.attachment import attach
from student_train.loss.objective import Objective
from student_train.loss.spec import LossSpec
from student_train.metrics.texts import require_metrics
from student_train.student.build import build_student, load_config
from student_train.student.fit import check_fit, check_judges
from student_train.tasks.table import task_of

_SUMS = {"hard", "soft", "agreement", "student_entropy"}  # over positions


def evaluate(
    student: nn.Module,
    cache: Cache,
    *,
    batch_tokens: int,
    details: Details | None = None,
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
) -> dict[str, Any]:
    """The student's numbers over every row of a cache, at T = 1.

    `loss`: mean cross-entropy on the hard labels, nats. `kl`: KL(teacher || student), if the cache
    knows all of it, exactly or on average, else `kl_bucketed`, over the kept classes and one cell
    for all others. `agreement`: share of positions where student and teacher have the same most
    probable class. The last two only where the cache has targets. Beside these, or in their place,
    stand the numbers of the task: its metrics, and what its loss is (tasks/). `details` is shown
    every batch, and what single positions of it were answered with.
    """
    task, device = task_of(cache.manifest), next(student.parameters()).device
    stream, collector = _stream(cache, batch_tokens), task.collector(cache, max_answer_tokens)
    sums: dict[str, torch.Tensor] = {}
    training = student.training
    student.eval()
    attachment = attach(student, _objective(cache, with_answers=details is not None))
    try:
        with torch.no_grad():
            for batch in stream:
                output = student(**{name: tensor.to(device) for name, tensor in batch.items()})
                for name in _SUMS & output.keys():
                    sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64))
                    sums[name] = sums[name] + output[name].double().cpu()
                if collector is not None:
                    collector.add(output, batch)
                if details is not None:
                    details.add(output, batch)
    finally:
        attachment.detach()
        student.train(training)
    numbers = task.numbers(_totals(sums, device), cache)
    return numbers if collector is None else numbers | collector.numbers(device)


def _objective(cache: Cache, *, with_answers: bool) -> Objective:
    """All that a cache has something for, each term with weight 1, at T = 1."""
    manifest, task = cache.manifest, task_of(cache.manifest)
    pairs = task.layer_pairs(cache)
    return Objective(
        spec=LossSpec(),
        num_classes=manifest.targets.num_classes,
        target_kind=manifest.targets.kind,
        outputs=task.outputs,
        soft_weight=1.0 if cache.has_targets else 0.0,
        hard_weight=1.0,
        with_answers=with_answers,
        hidden_weight=1.0 if pairs else 0.0,
        layer_pairs=pairs,
        deviations={layer: cache.channel_deviation(layer) for layer, _ in pairs},
        pooling=manifest.hidden.pooling,
    )


def _stream(cache: Cache, batch_tokens: int) -> BatchStream:
    """Every row once, in its natural order; each process reads its share."""
    world, rank = _world()
    spec = OrderSpec(batch_tokens=batch_tokens * world, shuffle=False, epochs=1)
    order = Order(cache.block_rows, cache.row_tokens, spec)
    task = task_of(cache.manifest)
    reading = StreamSpec(
        world_size=world,
        rank=rank,
        targets=cache.has_targets,
        hidden_layers=tuple(layer for layer, _ in task.layer_pairs(cache)),
        hidden_every=cache.manifest.hidden.every,
        arrangement=task.arrangement,
    )
    return BatchStream(cache, order, reading, max_steps=order.steps_for_epochs(1))


def _totals(sums: dict[str, torch.Tensor], device: torch.device) -> dict[str, float]:
    """The sums over all processes; every one has the same names."""
    if not sums:
        return {}
    names = sorted(sums)
    totals = torch.stack([sums[name] for name in names])
    if _world()[0] > 1:
        totals = _summed_over_processes(totals, device)
    return dict(zip(names, totals.tolist(), strict=True))


def _world() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    return 1, 0


def _summed_over_processes(sums: torch.Tensor, device: torch.device) -> torch.Tensor:
    on_device = sums.to(device)
    dist.all_reduce(on_device)
    return on_device.cpu()


def run(config: EvaluateConfig) -> dict[str, Any]:
    """`train-student evaluate`: loads a student and evaluates it on a cache."""
    cache = open_cache(config.cache, allow_partial=config.allow_partial)
    student = _student(config, cache)
    details = None
    if config.html is not None or config.num_worst:
        _check_shown(config, cache)
        details = Details(cache, worst=config.num_worst, by=config.worst_by)
    numbers: dict[str, Any] = {
        "student": config.student,
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "cache_id": cache.cache_id,
        **evaluate(
            student,
            cache,
            batch_tokens=config.batch_tokens,
            details=details,
            max_answer_tokens=config.max_answer_tokens,
        ),
    }
    if config.generate:
        numbers |= _written(config, student, cache)
    if details is None:
        return numbers
    found = details.numbers()
    # Over labels `ece` is there already, from probabilities in float64.
    numbers = {n: found.pop(n) for n in ("ece", "teacher_ece") if n in found} | numbers
    if config.html is not None:
        write_evaluation(numbers | {"details": found}, cache, config.html)
    return numbers | {"details": found} if config.asks_for_worst else numbers


def _student(config: EvaluateConfig, cache: Cache) -> Any:
    """The student on its device, once it is known that the cache can judge it."""
    check_fit(config.student, load_config(config.student), cache)
    check_judges(cache)
    if config.generate:
        check_writes(cache)
        require_metrics()
    student = build_student(config.student, cache, seed=0)
    task_of(cache.manifest).load_beside(config.student, student, cache)
    cuda = config.device == "auto" and torch.cuda.is_available()
    return student.to("cuda" if cuda else "cpu")


def _written(config: EvaluateConfig, student: Any, cache: Cache) -> dict[str, Any]:
    writing = Writing(
        rows=config.generate_rows,
        num_beams=config.num_beams,
        max_new_tokens=config.max_new_tokens,
        batch_tokens=config.batch_tokens,
    )
    return written_numbers(student, cache, writing)


def _check_shown(config: EvaluateConfig, cache: Cache) -> None:
    """Refuses pages and worst rows of what they cannot show or rank."""
    targets, task = cache.manifest.targets, task_of(cache.manifest)
    unknown = targets.sampled or not targets.has_targets
    if not task.outputs.states_alone and config.worst_by == "kl" and unknown:
        has = "a sample of the teacher's classes" if targets.sampled else "no teacher"
        raise ConfigError(
            f"--worst-by kl: {cache.path} holds {has}, so the KL of single rows is not known. "
            "Rank them with --worst-by loss."
        )
    task.check_shown(cache)
