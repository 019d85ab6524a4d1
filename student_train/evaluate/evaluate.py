"""How good a student is on a held-out cache: loss, KL to the teacher, agreement; teacher included.

Sums over positions are added up batch by batch and over all processes, and divided once. For
labels and questions all answers are kept, for the metrics of the task. Nothing here needs the
teacher: its loss on the same positions, or what it answered there, was cached with its targets.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from shared.cache import Cache, open_cache
from shared.errors import ConfigError
from shared.tasks import MAX_ANSWER_TOKENS, TASKS
from student_train.config import EvaluateConfig
from student_train.data.order import Order, OrderSpec
from student_train.data.stream import BatchStream, StreamSpec
from student_train.evaluate.details import Details
from student_train.evaluate.page import write_evaluation
from student_train.loss.objective import Objective, attach
from student_train.loss.spec import LossSpec
from student_train.metrics.texts import require_metrics
from student_train.student.build import build_student, load_config
from student_train.student.fit import check_fit, check_labelled
from student_train.tasks.answers import collector_for
from student_train.tasks.vectors import layer_pair, load_projection
from student_train.tasks.writing import Writing, check_writes, written_numbers

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
    knows all of it (`dense`; `sample` on average), else `kl_bucketed`, over the kept classes and
    one cell for all others. `agreement`: share of positions where student and teacher have the same
    most probable class. The last two only where the cache has targets. On a label space also the
    metrics of the task (metrics/labels.py, rows.py), of questions those of spans.py; of
    hidden states alone those of vectors.py, and `loss` is 1 - cosine. In a regression `loss` is the
    mean squared error, and `mse_to_teacher` stands for the other two. `details` is shown every
    batch, and what single positions of it were answered with.
    """
    manifest = cache.manifest
    has_targets = manifest.targets.kind != "none"
    of_states = TASKS[manifest.task].target_space == "states"
    pairs = (layer_pair(cache),) if of_states else ()
    objective = Objective(
        spec=LossSpec(),
        num_classes=manifest.targets.num_classes,
        target_kind=manifest.targets.kind,
        problem_type=manifest.problem_type,
        soft_weight=1.0 if has_targets else 0.0,
        hard_weight=1.0,
        with_answers=details is not None,
        hidden_weight=1.0 if of_states else 0.0,
        layer_pairs=pairs,
        deviations={layer: cache.channel_deviation(layer) for layer, _ in pairs},
        states_only=of_states,
        pooling=manifest.hidden.pooling,
    )
    world, rank = _world()
    order = Order(
        cache.block_rows,
        cache.row_tokens,
        OrderSpec(batch_tokens=batch_tokens * world, shuffle=False, epochs=1),
    )
    spec = StreamSpec(
        world_size=world,
        rank=rank,
        targets=has_targets,
        hidden_layers=tuple(layer for layer, _ in pairs),
        hidden_every=manifest.hidden.every,
        layout=manifest.layout,
    )
    stream = BatchStream(cache, order, spec, max_steps=order.steps_for_epochs(1))
    device = next(student.parameters()).device
    sums: dict[str, torch.Tensor] = {}
    collector = collector_for(cache, max_answer_tokens)
    training = student.training
    student.eval()
    attachment = attach(student, objective)
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
    if of_states:
        assert collector is not None  # there is one for states
        return {"positions": int(cache.row_positions.sum()), **collector.numbers(device)}
    names = sorted(sums)
    totals = torch.stack([sums[name] for name in names])
    if world > 1:
        totals = _summed_over_processes(totals, device)
    numbers = _numbers(dict(zip(names, totals.tolist(), strict=True)), cache)
    return numbers if collector is None else numbers | collector.numbers(device)


def _numbers(sums: dict[str, float], cache: Cache) -> dict[str, Any]:
    positions = int(cache.row_positions.sum())
    loss = sums["hard"] / positions
    if cache.manifest.problem_type == "regression":
        return _numbers_of_values(sums, cache)
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


def _numbers_of_values(sums: dict[str, float], cache: Cache) -> dict[str, Any]:
    """Of a regression, where the loss is a mean squared error."""
    positions, targets = int(cache.row_positions.sum()), cache.manifest.targets
    numbers: dict[str, Any] = {"positions": positions, "loss": sums["hard"] / positions}
    if targets.kind != "none":
        squares = sum(commit.statistics["sum_value_squared_error"] for commit in cache.commits)
        numbers["targets"] = targets.text
        numbers["mse_to_teacher"] = sums["soft"] / positions
        numbers["teacher_loss"] = squares / positions
    return numbers


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
    model_config = load_config(config.student)
    check_fit(config.student, model_config, cache)
    check_labelled(cache)
    if config.generate:
        check_writes(cache)
        require_metrics()
    student = build_student(config.student, cache, seed=0)
    cuda = config.device == "auto" and torch.cuda.is_available()
    if TASKS[cache.manifest.task].target_space == "states":
        load_projection(config.student, student, cache)
    student.to("cuda" if cuda else "cpu")
    details = None
    if config.html is not None or config.num_worst:
        _check_worst_by(config, cache)
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
        writing = Writing(
            rows=config.generate_rows,
            num_beams=config.num_beams,
            max_new_tokens=config.max_new_tokens,
            batch_tokens=config.batch_tokens,
        )
        numbers |= written_numbers(student, cache, writing)
    if details is None:
        return numbers
    found = details.numbers()
    # Over labels `ece` is there already, from probabilities in float64.
    numbers = {n: found.pop(n) for n in ("ece", "teacher_ece") if n in found} | numbers
    if config.html is not None:
        write_evaluation(numbers | {"details": found}, cache, config.html)
    return numbers | {"details": found} if config.asks_for_worst else numbers


def _check_worst_by(config: EvaluateConfig, cache: Cache) -> None:
    kind = cache.manifest.targets.kind
    if TASKS[cache.manifest.task].target_space == "states":
        raise ConfigError(
            f"--html and --worst: {cache.path} holds hidden states, and no answers that could be "
            "right or wrong. Leave them out."
        )
    if config.worst_by == "kl" and kind in ("none", "sample"):
        has = "no teacher" if kind == "none" else "a sample of the teacher's classes"
        raise ConfigError(
            f"--worst-by kl: {cache.path} holds {has}, so the KL of single rows is not known. "
            "Rank them with --worst-by loss."
        )
    if cache.manifest.problem_type == "regression":
        raise ConfigError(
            f"--html and --worst: {cache.path} is of a regression. They show how sure answers are "
            "and which are wrong, and numbers are neither sure nor wrong. Leave them out: evaluate "
            "prints the errors and correlations of student and teacher."
        )
