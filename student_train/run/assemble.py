"""What a run is made of, by its config and its caches: numbers, loss, student, batches, trainer."""

import logging
from typing import Any

import torch
from torch import nn
from transformers import EarlyStoppingCallback, PretrainedConfig

from shared.cache import Cache
from shared.errors import ConfigError
from shared.format import manifest_file
from shared.storage.local import LocalStorage
from student_train.architecture import trunk_parts
from student_train.config import TrainConfig
from student_train.data.cache_set import Source
from student_train.data.order import accumulation_for
from student_train.data.stream import BatchStream, StreamSpec
from student_train.loss.attachment import Attachment, attach
from student_train.loss.layers import PROJECTIONS
from student_train.loss.objective import Objective
from student_train.recipes import Start
from student_train.run.arguments import micro_batch_tokens, training_arguments
from student_train.run.callbacks import ProgressLine, StopOnSignal
from student_train.run.folder import RunFolder
from student_train.run.metrics_log import MetricsLog
from student_train.run.trainer import DistillTrainer
from student_train.student.adapters import add_adapters
from student_train.student.build import build_student, is_from_scratch
from student_train.student.needs import layer_pairs, resolved_weights
from student_train.tasks.table import task_named, task_of

log = logging.getLogger(__name__)


def with_numbers(config: TrainConfig) -> TrainConfig:
    """The config of this run: what was left to the task is decided by the first cache's."""
    read = [manifest_file.read(LocalStorage(path))[0] for path in config.cache_paths]
    manifest, labelled = read[0], any(each.labelled for each in read)
    start: Start = "scratch" if is_from_scratch(config.student) else "pretrained"
    config = resolved_weights(config, manifest.task, labelled=labelled)
    usual = task_named(manifest.task).recipes["adapters" if config.adapters else start]
    chosen = config.with_recipe(usual)
    if chosen != config:
        log.info("%s: %s", config.out, chosen.recipe.text)
    return chosen


def student_for(config: TrainConfig, objective: Objective, cache: Cache) -> tuple[Any, Attachment]:
    student: Any = build_student(config.student, cache, seed=config.seed, dropout=config.dropout)
    torch.manual_seed(config.seed)  # adapters and projections
    if config.adapters is not None:
        student = add_adapters(student, config.adapters, cache.manifest.task)
    attachment = attach(student, objective)
    if config.lora_rank and len(getattr(student, PROJECTIONS, [])):
        raise ConfigError(
            "--lora-rank with --hidden-weight: the layers differ in width, and a projection is not "
            "saved with adapters. Map layers of equal width, or train all weights."
        )
    if config.gradient_checkpointing:
        student.gradient_checkpointing_enable()
    if config.compile:
        for part in trunk_parts(student):
            part.compile()
    return student, attachment


def objective_for(config: TrainConfig, model_config: PretrainedConfig, caches: Source) -> Objective:
    """The loss a config asks for on these caches."""
    pairs = layer_pairs(config, model_config, caches.first)
    return Objective(
        spec=config.loss_spec,
        num_classes=caches.manifest.targets.num_classes,
        target_kind=caches.manifest.targets.kind,
        outputs=task_of(caches.manifest).outputs,
        soft_weight=config.soft_weight,
        hard_weight=config.hard_weight,
        hidden_weight=config.hidden_weight,
        hidden_loss=config.hidden_loss,
        contrastive_temperature=config.contrastive_temperature,
        layer_pairs=pairs,
        deviations={layer: caches.channel_deviation(layer) for layer, _ in pairs},
        pooling=caches.manifest.hidden.pooling,
    )


def stream_spec(config: TrainConfig, objective: Objective, caches: Source) -> StreamSpec:
    arguments = training_arguments(config, max_steps=1, accumulation=1)
    accumulation = accumulation_for(
        config.recipe.batch_tokens, micro_batch_tokens(config), arguments.world_size
    )
    return StreamSpec(
        accumulation=accumulation,
        world_size=arguments.world_size,
        rank=arguments.process_index,
        threads=config.threads,
        targets=config.uses_soft_loss,
        temperature=config.temperature,
        hidden_layers=tuple(sorted({layer for layer, _ in objective.layer_pairs})),
        hidden_every=caches.manifest.hidden.every,
        arrangement=task_of(caches.manifest).arrangement,
    )


def trainer_for(
    config: TrainConfig,
    folder: RunFolder,
    student: nn.Module,
    stream: BatchStream,
    validation: Cache | None,
    stop: StopOnSignal,
) -> DistillTrainer:
    max_steps, accumulation = stream.max_steps, stream.spec.accumulation
    arguments = training_arguments(config, max_steps=max_steps, accumulation=accumulation)
    callbacks: list[Any] = [stop]
    if arguments.should_save:
        callbacks.append(ProgressLine(max_steps))
    if config.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(config.early_stopping_patience))
    return DistillTrainer(
        model=student,
        args=arguments,
        stream=stream,
        validation=validation,
        metrics=MetricsLog(
            folder.path / "metrics.jsonl",
            writes=arguments.should_save,
            seconds_before=folder.seconds(),
        ),
        callbacks=callbacks,
    )
