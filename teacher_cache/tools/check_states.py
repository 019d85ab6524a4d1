"""`cache-teacher check` of a cache of hidden states alone: how far are they from the teacher's?

The same three sides as for distributions: live batched as in the capture, live alone, cached.

S states, D channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.cache import Cache
from shared.tasks import HiddenCodec
from teacher_cache.engines.batches import forward_batches
from teacher_cache.engines.teacher import Teacher
from teacher_cache.tasks.rows import Row

# Of all states together, by their length. bfloat16 costs 0.17 %, fp8 2 to 4 %, int8 0.9 % and a few
# outliers more; another row or other weights cost about 100 %.
_ALLOWED: dict[HiddenCodec, float] = {"bf16": 0.005, "fp8": 0.06, "int8": 0.04}
_ALLOWED_NOISE = 4.0


@dataclass(frozen=True, slots=True)
class CheckedStates:
    """Errors relative to the length of the live states, of all layers together."""

    rows: int
    states: int
    error_live_live: float
    error_live_cached: float
    worst_error: float
    allowed: float
    differences: tuple[str, ...]

    @property
    def sound(self) -> bool:
        """The cache is no further from the teacher than codec and noise explain."""
        return self.error_live_cached <= self.allowed and not self.differences


def check_states(
    cache: Cache,
    teacher: Teacher,
    chosen: Sequence[int],
    rows: list[Row],
    differences: Sequence[str],
) -> CheckedStates:
    """Runs the teacher over these rows of the cache and compares."""
    batched = _live(teacher, cache, rows)
    alone = torch.cat([_live(teacher, cache, [row]) for row in rows])
    cached = torch.cat([_joined(cache[index].hidden, cache) for index in chosen])
    noise, error = _relative(alone, batched), _relative(cached, batched)
    length_S = batched.norm(dim=1).clamp_min(1e-30)
    return CheckedStates(
        rows=len(rows),
        states=len(batched),
        error_live_live=noise,
        error_live_cached=error,
        worst_error=float(((cached - batched).norm(dim=1) / length_S).max()),
        allowed=_ALLOWED[cache.manifest.hidden.codec] + _ALLOWED_NOISE * noise,
        differences=tuple(differences),
    )


def _live(teacher: Teacher, cache: Cache, rows: list[Row]) -> Tensor:
    """The states of all layers beside each other, f64 [S, layers * D], in row order."""
    hidden, plan = cache.manifest.hidden, cache.manifest.plan
    count = sum(row.num_positions for row in rows)
    states_PD = torch.empty(count, sum(hidden.widths), dtype=torch.float64)
    for batch in forward_batches(rows, plan.forward_tokens, packed=False):
        output = teacher.forward(batch.inputs, hidden.layers, pooling=hidden.pooling)
        states_PD[batch.window_index] = _joined(output.hidden, cache)
    kept = [
        start + torch.arange(0, row.num_positions, hidden.every)
        for row, start in zip(rows, _starts(rows), strict=True)
    ]
    return states_PD[torch.cat(kept)]


def _starts(rows: list[Row]) -> list[int]:
    return [sum(row.num_positions for row in rows[:number]) for number in range(len(rows))]


def _joined(states: dict[int, Tensor], cache: Cache) -> Tensor:
    return torch.cat([states[layer].double().cpu() for layer in cache.manifest.hidden.layers], 1)


def _relative(found_SD: Tensor, expected_SD: Tensor) -> float:
    return float((found_SD - expected_SD).norm() / expected_SD.norm().clamp_min(1e-30))
