"""Stage two on one screen: `run`.

open_cache -> snapshot -> check_fit -> BatchStream -> attach -> DistillTrainer.train
           -> evaluate -> save
"""

import logging
from typing import Any

from transformers import PretrainedConfig

from shared.cache import Cache, open_cache
from shared.signals import StopRequest, stop_on_signals
from shared.storage.local import LocalStorage
from student_train.config import TrainConfig
from student_train.data.cache_set import Source
from student_train.data.order import Order, OrderSpec
from student_train.data.stream import BatchStream
from student_train.evaluate.writing import check_writes
from student_train.loss.schedule import LossSchedule, ScheduledLoss
from student_train.metrics.texts import require_metrics
from student_train.run.arguments import refuse_what_breaks
from student_train.run.assemble import (
    objective_for,
    stream_spec,
    student_for,
    trainer_for,
    with_numbers,
)
from student_train.run.callbacks import BeforeTheFirstStep, StopOnSignal, train_or_stop
from student_train.run.finish import evaluate_before, finish
from student_train.run.folder import RunFolder, is_main_process
from student_train.run.outcome import RunRecord
from student_train.student.build import load_config
from student_train.student.fit import check_fit, check_held_out
from student_train.student.needs import (
    check_cache,
    check_metric,
    warn_of_lost_mass,
    warn_of_same_rows,
)

log = logging.getLogger(__name__)


def run(config: TrainConfig) -> dict[str, Any]:
    """Trains one student from a cache; run again to resume. Returns the result it also saves."""
    with stop_on_signals() as stop:
        return run_stoppable(config, stop)


def run_stoppable(config: TrainConfig, stop: StopRequest) -> dict[str, Any]:
    """Does what `run` does, under the caller's signal handlers; a signal raises `Stopped`."""
    with RunRecord(LocalStorage(config.out), main_process=is_main_process()) as record:
        return _run(config, stop, record)


def _run(config: TrainConfig, stop: StopRequest, record: RunRecord) -> dict[str, Any]:
    refuse_what_breaks(config)
    folder = RunFolder(config.out)
    config = with_numbers(config)
    model_config = load_config(config.student)
    validation = None if config.validation_cache is None else open_cache(config.validation_cache)
    caches = folder.open_caches(config)
    _check(config, model_config, caches, validation)
    spec = OrderSpec(batch_tokens=config.recipe.batch_tokens, seed=config.seed)
    order = Order(caches.block_rows, caches.row_tokens, spec, caches.parts)
    max_steps = config.max_steps or order.steps_for_epochs(config.recipe.epochs)
    finished = folder.result(max_steps)
    if finished is not None:
        log.info("%s: this run is finished", config.out)
        return finished

    objective = objective_for(config, model_config, caches)
    student, attachment = student_for(config, objective, caches.first)
    folder.start(config, caches)
    record.started(max_steps)
    checkpoint = folder.last_checkpoint()
    if is_main_process():
        folder.trim_metrics(0 if checkpoint is None else int(checkpoint.name[11:]))
    reading = stream_spec(config, objective, caches)
    stream = BatchStream(caches, order, reading, max_steps=max_steps)
    on_signal = StopOnSignal(stop)
    trainer = trainer_for(config, folder, student, stream, validation, on_signal)
    if config.loss_schedule != "constant":
        schedule = LossSchedule(config.loss_schedule, max_steps, config.scheduled)
        trainer.scheduled = ScheduledLoss(attachment, schedule)
    if validation is not None and folder.before(validation.cache_id) is None:
        trainer.add_callback(BeforeTheFirstStep(lambda: evaluate_before(trainer)))
    train_or_stop(trainer, on_signal, checkpoint)
    attachment.detach()
    return finish(config, folder, trainer, caches)


def _check(
    config: TrainConfig, model_config: PretrainedConfig, caches: Source, validation: Cache | None
) -> None:
    """Refuses what does not go together, before anything is built or written."""
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
