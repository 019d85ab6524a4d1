"""Stage two on one screen: `run`, and the few methods of `transformers.Trainer` that it overrides.

    open_cache -> snapshot -> check_fit -> BatchStream -> attach -> DistillTrainer.train
               -> evaluate -> save

To the Trainer a run is one epoch of exactly `max_steps` steps. The order of the data is a function
of (snapshot, seed, step), so `global_step` is the whole state of the data.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import EarlyStoppingCallback, PretrainedConfig, Trainer
from transformers.trainer_callback import PrinterCallback

from shared.cache import Cache, open_cache
from shared.errors import ConfigError
from shared.format import manifest_file
from shared.models.tokenizer import load_cached_tokenizer
from shared.signals import StopRequest, stop_on_signals
from shared.storage.local import LocalStorage
from student_train.architecture import trunk_parts
from student_train.config import TrainConfig
from student_train.data.cache_set import Source
from student_train.data.order import Order, OrderSpec, accumulation_for
from student_train.data.stream import BatchStream, StreamSpec
from student_train.evaluate.evaluate import evaluate
from student_train.evaluate.writing import Writing, check_writes, written_numbers
from student_train.loss.objective import PROJECTIONS, Attachment, Objective, attach
from student_train.loss.schedule import LossSchedule, ScheduledLoss
from student_train.metrics.texts import require_metrics
from student_train.recipes import Start
from student_train.run.arguments import micro_batch_tokens, refuse_what_breaks, training_arguments
from student_train.run.callbacks import (
    BeforeTheFirstStep,
    ProgressLine,
    StopOnSignal,
    train_or_stop,
)
from student_train.run.folder import RunFolder, is_main_process
from student_train.run.metrics_log import MetricsLog
from student_train.run.outcome import RunRecord
from student_train.run_files import kl_of
from student_train.student.adapters import add_adapters
from student_train.student.build import build_student, is_from_scratch, load_config
from student_train.student.fit import check_fit, check_held_out
from student_train.student.needs import (
    check_cache,
    check_metric,
    layer_pairs,
    resolved_weights,
    warn_of_lost_mass,
    warn_of_same_rows,
)
from student_train.student.saved import saved_parameters
from student_train.tasks.table import task_named, task_of

log = logging.getLogger(__name__)

_EVAL_TOKENS = 8192


class DistillTrainer(Trainer):
    """A Trainer whose batches come from a `BatchStream` and whose model returns its own loss.

    Each term of a micro-batch is already divided by its own count in the whole step over all
    processes; DDP and FSDP average gradients, hence the multiplication by the number of processes.
    """

    loss_is_scaled_for_ga = True  # transformers >= 5.23; 5.17 looks at compute_loss_func instead

    def __init__(
        self,
        *args: Any,
        stream: BatchStream,
        validation: Cache | None = None,
        metrics: MetricsLog | None = None,
        scheduled: ScheduledLoss | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, compute_loss_func=_never_called, eval_dataset=[], **kwargs)
        self.remove_callback(PrinterCallback)
        self.stream, self.validation, self.metrics = stream, validation, metrics
        self.scheduled = scheduled

    def get_train_dataloader(self) -> BatchStream:
        """The stream itself: it shards, orders and resumes on its own."""
        self.stream.start_step = lambda: self.state.global_step
        return self.stream

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        return None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss that the model's hooks return."""
        step = self.state.global_step
        values = {} if self.scheduled is None else self.scheduled.set_step(step)
        output = model(**inputs)
        if self.metrics is not None:
            self.metrics.add(step + 1, output, inputs, values)
        loss = output["loss"] * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The student's numbers on the held-out cache, with the prefix the callbacks expect."""
        assert self.validation is not None  # eval_strategy is "no" without one
        numbers = evaluate(self.model, self.validation, batch_tokens=_EVAL_TOKENS)
        logged = {f"eval_{k}": float(v) for k, v in numbers.items() if not isinstance(v, str)}
        if (kl := kl_of(numbers)) is not None:
            logged["eval_kl"] = kl
        if "metric" in numbers:
            logged["eval_metric"] = float(numbers[numbers["metric"]])
        self.log(dict(logged))
        if self.metrics is not None:
            self.metrics.write("eval", self.state.global_step, numbers)
        handler, control = self.callback_handler, self.control
        self.control: Any = handler.on_evaluate(self.args, self.state, control, logged)
        return logged

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer, after the terms of the loss apart have joined the log."""
        if self.metrics is not None and "loss" in logs:
            self.metrics.flush(self.stream.seconds_waited)
            logs |= self.metrics.take_means()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights and config only: no pickled arguments, which nothing here would ever load."""
        if self.args.should_save:
            target = output_dir or self.args.output_dir
            self.model.save_pretrained(target, state_dict=state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As the Trainer, after the steps up to here are in metrics.jsonl."""
        if self.metrics is not None:
            self.metrics.flush(self.stream.seconds_waited)
        super()._save_checkpoint(model, trial)


def _never_called(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("DistillTrainer.compute_loss uses no loss function")


def run(config: TrainConfig) -> dict[str, Any]:
    """Trains one student from a cache; run again to resume. Returns the result it also saves."""
    with stop_on_signals() as stop:
        return run_stoppable(config, stop)


def run_stoppable(config: TrainConfig, stop: StopRequest) -> dict[str, Any]:
    """As `run`, with the caller's handlers, which may outlive it; a signal raises `Stopped`."""
    with RunRecord(LocalStorage(config.out), main_process=is_main_process()) as record:
        return _run(config, stop, record)


def _run(config: TrainConfig, stop: StopRequest, record: RunRecord) -> dict[str, Any]:
    refuse_what_breaks(config)
    folder = RunFolder(config.out)
    config = with_numbers(config)
    model_config = load_config(config.student)
    validation = None if config.validation_cache is None else open_cache(config.validation_cache)
    caches = folder.open_caches(config)
    for each in (*caches.caches, *([] if validation is None else [validation])):
        check_fit(config.student, model_config, each)
    if validation is not None:
        check_held_out(caches.first, validation)
        check_metric(config, validation)
        if config.generate_rows:
            check_writes(validation)
            require_metrics()
    warn_of_same_rows(config, caches.caches)
    for cache in caches.caches:
        check_cache(config, model_config, cache)
        warn_of_lost_mass(config, cache)

    spec = OrderSpec(batch_tokens=config.recipe.batch_tokens, seed=config.seed)
    order = Order(caches.block_rows, caches.row_tokens, spec, caches.parts)
    max_steps = config.max_steps or order.steps_for_epochs(config.recipe.epochs)
    finished = folder.result(max_steps)
    if finished is not None:
        log.info("%s: this run is finished", config.out)
        return finished

    objective = objective_for(config, model_config, caches)
    student, attachment = _student(config, objective, caches.first)
    folder.start(config, caches)
    record.started(max_steps)
    checkpoint = folder.last_checkpoint()
    if is_main_process():
        folder.trim_metrics(0 if checkpoint is None else int(checkpoint.name[11:]))
    stream_spec = _stream_spec(config, objective, caches)
    stream = BatchStream(caches, order, stream_spec, max_steps=max_steps)
    on_signal = StopOnSignal(stop)
    trainer = _trainer(config, folder, student, stream, validation, on_signal)
    if config.loss_schedule != "constant":
        schedule = LossSchedule(config.loss_schedule, max_steps, config.scheduled)
        trainer.scheduled = ScheduledLoss(attachment, schedule)
    if validation is not None and folder.before(validation.cache_id) is None:
        trainer.add_callback(BeforeTheFirstStep(lambda: _evaluate_before(trainer)))
    train_or_stop(trainer, on_signal, checkpoint)
    attachment.detach()
    return _finish(config, folder, trainer, caches, max_steps)


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


def _student(config: TrainConfig, objective: Objective, cache: Cache) -> tuple[Any, Attachment]:
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


def _stream_spec(config: TrainConfig, objective: Objective, caches: Source) -> StreamSpec:
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


def _trainer(
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


def _evaluate_before(trainer: DistillTrainer) -> None:
    """The student's numbers on the held-out cache before the first step, into metrics.jsonl.

    They are no part of early stopping, and their seconds none of the training.
    """
    assert trainer.validation is not None  # asked for only with one
    assert trainer.metrics is not None
    numbers = evaluate(trainer.model, trainer.validation, batch_tokens=_EVAL_TOKENS)
    of_cache = {"validation_cache_id": trainer.validation.cache_id}
    trainer.metrics.write("eval", 0, numbers | of_cache)
    trainer.metrics.restart_clock()


def _finish(
    config: TrainConfig,
    folder: RunFolder,
    trainer: DistillTrainer,
    caches: Source,
    max_steps: int,
) -> dict[str, Any]:
    """Evaluates, saves the model with its tokenizer, and writes the result last."""
    student = trainer.model
    assert trainer.metrics is not None
    numbers: dict[str, Any] = {
        "student": config.student,
        "out": str(config.out),
        "parameters": saved_parameters(student, caches.first),
        "task": caches.manifest.task,
        "cache_ids": caches.cache_ids,
        "targets": [cache.manifest.targets.text for cache in caches.caches],
        "teachers": [_teacher(cache) for cache in caches.caches],
        "cache_weights": list(config.cache_weights),
        "ensemble": config.ensemble,
        "max_steps": max_steps,
        "steps": trainer.state.global_step,
        "seconds": round(trainer.metrics.seconds, 2),
        "weights": {
            "soft": config.soft_weight,
            "hard": config.hard_weight,
            "hidden": config.hidden_weight,
        },
        "scheduled": {name: list(ends) for name, ends in config.scheduled.items()},
        "teacher_parameters": None
        if caches.manifest.teacher is None
        else caches.manifest.teacher.parameters,
    }
    if trainer.validation is not None:
        numbers["validation_cache_id"] = trainer.validation.cache_id
        before = folder.before(trainer.validation.cache_id)
        if before is not None:
            numbers["before"] = before
        numbers["validation"] = evaluate(student, trainer.validation, batch_tokens=_EVAL_TOKENS)
        if config.generate_rows and trainer.args.should_save:
            numbers["validation"] |= _written(config, student, trainer.validation)
    if trainer.args.should_save:
        _save(folder.path, student, caches.first)
        folder.save_result(numbers)
    return numbers


def _teacher(cache: Cache) -> dict[str, Any] | None:
    """What a model card says of whom the student learnt from."""
    info = cache.manifest.teacher
    if info is None:
        return None
    return {"id": info.id, "revision": info.revision, "parameters": info.parameters}


def _written(config: TrainConfig, student: Any, validation: Cache) -> dict[str, Any]:
    writing = Writing(
        rows=config.generate_rows,
        num_beams=config.num_beams,
        max_new_tokens=config.max_new_tokens,
    )
    return written_numbers(student, validation, writing)


def _save(path: Path, student: Any, cache: Cache) -> None:
    """The model as plain `transformers` reads it; projections are in the checkpoints alone.

    Those of vectors, which need them in use, stand beside the model.
    """
    task_of(cache.manifest).save_beside(path, student, cache)
    if hasattr(student, PROJECTIONS):
        delattr(student, PROJECTIONS)
    student.save_pretrained(path)
    if hasattr(student, "peft_config"):  # adapters: the base model's config makes the folder load
        student.get_base_model().config.save_pretrained(path)
    load_cached_tokenizer(cache.storage).save_pretrained(path)
