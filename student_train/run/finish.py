"""The first and the last number of a run, and what it leaves behind."""

from pathlib import Path
from typing import Any

from shared.cache import Cache
from shared.models.tokenizer import load_cached_tokenizer
from student_train.config import TrainConfig
from student_train.data.cache_set import Source
from student_train.evaluate.evaluate import evaluate
from student_train.evaluate.writing import Writing, written_numbers
from student_train.loss.layers import PROJECTIONS
from student_train.run.folder import RunFolder
from student_train.run.trainer import EVAL_TOKENS, DistillTrainer
from student_train.student.saved import saved_parameters
from student_train.tasks.table import task_of


def evaluate_before(trainer: DistillTrainer) -> None:
    """The student's numbers on the held-out cache before the first step, into metrics.jsonl.

    They are no part of early stopping, and their seconds none of the training.
    """
    assert trainer.validation is not None  # asked for only with one
    assert trainer.metrics is not None
    numbers = evaluate(trainer.model, trainer.validation, batch_tokens=EVAL_TOKENS)
    of_cache = {"validation_cache_id": trainer.validation.cache_id}
    trainer.metrics.write("eval", 0, numbers | of_cache)
    trainer.metrics.restart_clock()


def finish(
    config: TrainConfig,
    folder: RunFolder,
    trainer: DistillTrainer,
    caches: Source,
) -> dict[str, Any]:
    """Evaluates, saves the model with its tokenizer, and writes the result last."""
    student = trainer.model
    numbers = _facts(config, trainer, caches)
    if trainer.validation is not None:
        numbers["validation_cache_id"] = trainer.validation.cache_id
        before = folder.before(trainer.validation.cache_id)
        if before is not None:
            numbers["before"] = before
        numbers["validation"] = evaluate(student, trainer.validation, batch_tokens=EVAL_TOKENS)
        if config.generate_rows and trainer.args.should_save:
            numbers["validation"] |= _written(config, student, trainer.validation)
    if trainer.args.should_save:
        _save(folder.path, student, caches.first)
        folder.save_result(numbers)
    return numbers


def _facts(config: TrainConfig, trainer: DistillTrainer, caches: Source) -> dict[str, Any]:
    """What was trained, from what and how."""
    assert trainer.metrics is not None
    return {
        "student": config.student,
        "out": str(config.out),
        "parameters": saved_parameters(trainer.model, caches.first),
        "task": caches.manifest.task,
        "cache_ids": caches.cache_ids,
        "targets": [cache.manifest.targets.text for cache in caches.caches],
        "teachers": [_teacher(cache) for cache in caches.caches],
        "cache_weights": list(config.cache_weights),
        "ensemble": config.ensemble,
        "max_steps": trainer.stream.max_steps,
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
