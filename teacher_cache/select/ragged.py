"""Kinds whose positions differ in their number of classes: all above a threshold, or a sample.

N positions, K of the largest classes of each or E entries of all, n positions of a block.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from shared.arrays import mixed_bits, ranges
from shared.targets.base import TargetKind
from shared.targets.ragged import MIN_SPACING, RANGE_BEYOND, drawn_logprob
from shared.targets.record import Floats, Target
from shared.targets.spec import TargetSpec
from teacher_cache.select.base import (
    Buffer,
    RaggedEntries,
    asked_temperatures,
    sums_of_positions,
)
from teacher_cache.select.class_sums import LOG2_E, ClassSums, row_sums, sum_classes
from teacher_cache.select.distributions import Distribution, Kept, Logits
from teacher_cache.select.fewer import above, drawn_again
from teacher_cache.select.ragged_entries import BlockWeights, Entries, choose_above, choose_and_draw
from teacher_cache.select.thresholds import Thresholds

if TYPE_CHECKING:
    from teacher_cache.config import CaptureConfig
    from teacher_cache.tasks.rows import TrainingRow

COMPARED_MEANS = (4, 8, 16, 32, 64)
_LOWEST_ABOVE = 1e-7  # far below what a byte of entries can reach


class Ragged(Distribution):
    """Entries that are only known once the weights of a position are summed."""

    thresholds: ClassVar[Thresholds]

    def spec(
        self, kind: TargetKind, num_classes: int, top_k: int, config: "CaptureConfig"
    ) -> TargetSpec:
        return TargetSpec(
            kind=kind,
            num_classes=num_classes,
            top_k=1,
            mean_entries=config.mean_entries,
            value_bits=config.value_bits,
            temperatures=asked_temperatures(config),
        )

    def options_like(self, targets: TargetSpec) -> dict[str, Any]:
        return {
            "targets": targets.kind,
            "top_k": None,
            "mean_entries": targets.mean_entries,
            "value_bits": targets.value_bits,
        }

    def compared(
        self, kind: TargetKind, asked: TargetSpec, config: "CaptureConfig"
    ) -> list[TargetSpec]:
        means = {*map(float, COMPARED_MEANS)}
        if asked.kind == kind:
            means.add(asked.mean_entries)
        plain = TargetSpec(
            kind=kind,
            num_classes=asked.num_classes,
            top_k=1,
            mean_entries=1.0,
            value_bits=config.value_bits,
            temperatures=self.exact_at(config),
        )
        return [
            replace(plain, mean_entries=mean)
            for mean in sorted(means)
            if mean < asked.num_classes or mean == asked.mean_entries
        ]

    def exact_at(self, config: "CaptureConfig") -> tuple[float, ...]:
        """The temperatures asked for that this kind can be made exact at."""
        return asked_temperatures(config)

    def buffer(self, positions: int, spec: TargetSpec) -> Buffer:
        return RaggedEntries(positions)

    @abstractmethod
    def choose(self, weights: BlockWeights, spec: TargetSpec, offset_n: Tensor | None) -> Entries:
        """The entries of each position of a block."""

    def entries(
        self, block: Logits, spec: TargetSpec, offset_N: Tensor | None
    ) -> tuple[Kept, ClassSums]:
        """Chooses block by block, while the weights are at hand."""
        logits_NC, shift_N, areas = block.logits_NC, block.shift_N, block.areas
        none = torch.zeros(0, dtype=torch.long, device=logits_NC.device)
        found = [Entries(none, none, none.bool())]

        def choose_and_leave_out(some: slice, weights_NC: Tensor) -> None:
            maxima = torch.exp2(block.maxima_NG[some].float() * LOG2_E - shift_N[some, None])
            mass = row_sums(areas.weights[: len(weights_NC)], torch.sum)
            weights = BlockWeights(weights_NC, mass, maxima, block.bad_N[some])
            entries = self.choose(weights, spec, None if offset_N is None else offset_N[some])
            weights_NC[entries.rows, entries.ids] = 0.0
            found.append(Entries(entries.rows + some.start, entries.ids, entries.drawn))

        sums = sum_classes(logits_NC, shift_N, choose_and_leave_out, spec.temperatures, areas)
        rows = torch.cat([entries.rows for entries in found])
        ids = torch.cat([entries.ids for entries in found])
        drawn = torch.cat([entries.drawn for entries in found])
        counts = torch.bincount(rows, minlength=len(logits_NC))
        return Kept(ids, logits_NC[rows, ids].double(), rows, counts, drawn), sums

    def find_threshold(self, logprobs_NK: Tensor, spec: TargetSpec) -> float:
        return self.thresholds.find(logprobs_NK, spec.mean_entries)

    def most_entries(self, logprobs_NK: Tensor) -> float:
        return self.thresholds.most_entries(logprobs_NK)

    def kept_share(
        self, ids_NK: Tensor, logprobs_NK: Tensor, spec: TargetSpec
    ) -> tuple[Tensor, Tensor]:
        return ids_NK, self.thresholds.inclusion(logprobs_NK, spec.threshold)[0]


def _above(logprobs_NK: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Each class of at least the threshold is an entry, and the largest is one always."""
    p_NK = logprobs_NK.exp()
    kept_NK = p_NK >= threshold
    kept_NK[:, 0] = p_NK[:, 0] >= 0.0
    return kept_NK.float(), torch.zeros(len(p_NK))


class Adaptive(Ragged):
    """Every class above the threshold, and the largest always."""

    thresholds = Thresholds(_LOWEST_ABOVE, _above)
    bytes_by_entries: ClassVar = {12: 21.0, 16: 26.0}

    def choose(self, weights: BlockWeights, spec: TargetSpec, offset_n: Tensor | None) -> Entries:
        return choose_above(weights, spec)

    def fewer(self, target: Target, spec: TargetSpec) -> Target:
        return above(target, spec.threshold)


def _drawn(logprobs_NK: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """Each class below the threshold is drawn with a probability of its own over the threshold."""
    p_NK = logprobs_NK.exp()
    kept_NK = p_NK >= threshold
    kept_NK[:, 0] = p_NK[:, 0] >= threshold * math.exp(-RANGE_BEYOND)
    drawn_NK = (p_NK / threshold).masked_fill(kept_NK, 1.0)
    beyond_N = (1 - p_NK.sum(dim=1)).clamp(min=0.0) / threshold
    return drawn_NK, beyond_N


class Sample(Ragged):
    """Every class above the threshold, and of the others a systematic sample."""

    thresholds = Thresholds(MIN_SPACING, _drawn)
    bytes_by_entries: ClassVar = {7.5: 13.5, 12: 21.0}

    def exact_at(self, config: "CaptureConfig") -> tuple[float, ...]:
        return ()

    def choose(self, weights: BlockWeights, spec: TargetSpec, offset_n: Tensor | None) -> Entries:
        assert offset_n is not None  # every caller has one
        return choose_and_draw(weights, spec, offset_n)

    def random_bits(self, seed: int, rows: "Sequence[TrainingRow]") -> np.ndarray:
        return random_bits(seed, rows)

    def fewer(self, target: Target, spec: TargetSpec) -> Target:
        return drawn_again(target, spec)

    def kept_mass(self, target: Target, spec: TargetSpec) -> Floats:
        weights_E = np.exp(target.logprobs)
        weights_E[target.logprobs == drawn_logprob(spec)] = 0.0
        return sums_of_positions(weights_E, target)


def grid_offsets(bits_N: np.ndarray) -> Tensor:
    """Where grids begin, float64 [N] in [0, 1), by the bits of their positions."""
    return torch.from_numpy((bits_N >> np.uint64(11)) * 2.0**-53)


def random_bits(seed: int, rows: "Sequence[TrainingRow]") -> np.ndarray:
    """64 bits for each position, a function of seed, row and position; u64 [N]."""
    sizes = [row.num_positions for row in rows]
    row_ids = np.repeat(np.array([row.row_id for row in rows], np.uint64), sizes)
    return mixed_bits(seed, row_ids, ranges(np.zeros(len(sizes), np.int64), np.array(sizes)))
