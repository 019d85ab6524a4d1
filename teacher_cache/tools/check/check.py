"""`cache-teacher check`: does a cache still say what its teacher says?

A few rows go through the teacher twice, once batched as in the capture and once alone: how much the
two differ is the noise floor of this machine. Then the first is held against the cache: its
distributions, its numbers, or its hidden states.
"""

from collections.abc import Iterator
from dataclasses import asdict

import numpy as np

from shared.cache import Cache, open_cache
from shared.errors import CacheMismatch
from shared.format.manifest import differences
from shared.models.tokenizer import describe
from teacher_cache.config import CheckConfig
from teacher_cache.engines.hf import teacher_info
from teacher_cache.engines.teacher import Teacher
from teacher_cache.tasks.rows import TrainingRow
from teacher_cache.tasks.table import task_of
from teacher_cache.tools.check.distributions import Checked, check_distributions
from teacher_cache.tools.check.numbers import CheckedValues, check_values
from teacher_cache.tools.check.states import CheckedStates, check_states


def check(config: CheckConfig) -> Checked | CheckedStates | CheckedValues:
    """Runs the teacher over a sample of a cache's rows and compares."""
    cache = open_cache(config.cache, allow_partial=True)
    task = task_of(cache.manifest)
    if task.predicts and not cache.has_targets:
        raise CacheMismatch(f"{config.cache}: holds hard labels only, so no teacher can be checked")
    teacher = _teacher(config, cache)
    count = min(config.rows, cache.num_rows)
    chosen = np.unique(np.linspace(0, cache.num_rows - 1, count).astype(np.int64)).tolist()
    rows = [_row(cache, index) for index in chosen]
    differing = tuple(_differences(cache, teacher, config))
    if not task.predicts:
        return check_states(cache, teacher, chosen, rows, differing)
    if task.numbers:
        return check_values(cache, teacher, chosen, rows, differing)
    return check_distributions(cache, teacher, chosen, rows, differing)


def _teacher(config: CheckConfig, cache: Cache) -> Teacher:
    """The teacher that is checked against, as the cache's was run."""
    return Teacher.load(
        config.teacher,
        task=cache.manifest.task,
        problem_type=cache.manifest.problem_type,
        max_length=cache.manifest.preprocessing.max_length,
        revision=config.revision,
        dtype=config.dtype if config.dtype != "auto" else _cached_dtype(cache),
        device=config.device,
        trust_remote_code=config.trust_remote_code,
    )


def _row(cache: Cache, index: int) -> TrainingRow:
    row = cache[index]
    ids, positions = row.input_ids.numpy().astype(np.int32), row.positions.numpy()
    types = None if row.token_type_ids is None else row.token_type_ids.numpy()
    return TrainingRow(
        row.row_id,
        ids,
        row.segments,
        positions,
        row.labels.numpy(),
        types,
        of_outputs=task_of(cache.manifest).positions_are_outputs,
    )


def _cached_dtype(cache: Cache) -> str:
    teacher = cache.manifest.teacher
    return "auto" if teacher is None else teacher.dtype


def _differences(cache: Cache, teacher: Teacher, config: CheckConfig) -> Iterator[str]:
    """Fields in which this teacher is not the one of the manifest, whatever its outputs say."""
    manifest = cache.manifest
    assert manifest.teacher is not None  # check refuses a cache without
    now = {
        "teacher": asdict(teacher_info(config.teacher, teacher)),
        "tokenizer": asdict(describe(teacher.tokenizer)),
    }
    cached = {"teacher": asdict(manifest.teacher), "tokenizer": asdict(manifest.tokenizer)}
    for side in (now, cached):
        side["teacher"].pop("id")  # a folder may have been renamed
    yield from differences(cached, now)
