"""Numbers of a regression: how far apart teacher and cache are.

Distances are by the spread of the cached numbers, for their unit is the corpus's. N positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shared.cache import Cache
from teacher_cache.engines.batches import forward_batches
from teacher_cache.engines.teacher import Teacher
from teacher_cache.tasks.rows import TrainingRow

# Numbers are stored exactly; on another machine float32 differs in its last digits.
_ALLOWED_DISTANCE = 1e-4
_ALLOWED_NOISE = 4.0


@dataclass(frozen=True, slots=True)
class CheckedValues:
    """Root mean squares of differences by the standard deviation of the cached numbers."""

    rows: int
    positions: int
    distance_live_live: float
    distance_live_cached: float
    worst_distance: float
    differences: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """The cache is no further from the teacher than noise explains."""
        allowed = _ALLOWED_DISTANCE + _ALLOWED_NOISE * self.distance_live_live
        return self.distance_live_cached <= allowed and not self.differences


def check_values(
    cache: Cache,
    teacher: Teacher,
    chosen: Sequence[int],
    rows: Sequence[TrainingRow],
    differences: tuple[str, ...],
) -> CheckedValues:
    """Runs the teacher over `rows`, which are those numbered `chosen`, together and one by one."""
    cached_N = np.concatenate([_values_of(cache, index) for index in chosen]).astype(np.float64)
    batched_N = _live(teacher, cache, rows)
    alone_N = np.concatenate([_live(teacher, cache, [row]) for row in rows])
    spread = float(cached_N.std()) or 1.0
    off_N = (batched_N - cached_N) / spread
    return CheckedValues(
        rows=len(rows),
        positions=len(cached_N),
        distance_live_live=_root_mean_square((batched_N - alone_N) / spread),
        distance_live_cached=_root_mean_square(off_N),
        worst_distance=float(np.abs(off_N).max()),
        differences=differences,
    )


def _values_of(cache: Cache, index: int) -> np.ndarray:
    values = cache[index].target_values
    assert values is not None  # check refuses a cache without targets
    return values.numpy()


def _live(teacher: Teacher, cache: Cache, rows: Sequence[TrainingRow]) -> np.ndarray:
    """The teacher's numbers now, f64 [N]."""
    plan = cache.manifest.plan
    values_N: Tensor = torch.empty(sum(row.num_positions for row in rows), dtype=torch.float64)
    for batch in forward_batches(rows, plan.forward_tokens, packed=False):
        output = teacher.forward(batch.inputs, chunk_positions=plan.chunk_positions)
        for part, numbers_n1 in output.chunks:
            values_N[batch.window_index[part]] = numbers_n1[:, 0].double().cpu()
    return values_N.numpy()


def _root_mean_square(values_N: np.ndarray) -> float:
    return float(np.sqrt(np.square(values_N).mean()))
