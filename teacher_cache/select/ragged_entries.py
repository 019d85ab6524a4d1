"""Which classes a target of the kinds `adaptive` and `sample` keeps at each position.

Probabilities are integers here, in units of 2**-46: sums of integers are exact in any order, so the
same classes are drawn whatever the device and however the positions were cut into chunks.

n positions of a block, C classes, G groups of 64 classes, E entries of all positions, S points of
the sampling grid. Entries are sorted by position, then by class.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.targets.ragged import MAX_ENTRIES, RANGE_BEYOND
from shared.targets.spec import TargetSpec

GROUP = 64  # classes of a group: what is looked through class by class is a few groups of them
UNITS = 1 << 46  # of probability 1: 2**17 positions of them fit 63 bits
_SLACK = 1 - 1e-4  # a group's maximum may be rounded another way than the class it belongs to


@dataclass(slots=True)
class Entries:
    """Position and class of each entry, int64 [E]; `drawn` bool [E]: its weight is the spacing."""

    rows: Tensor
    ids: Tensor
    drawn: Tensor

    def sorted(self) -> "Entries":
        """By position, then by class; no class is in one position twice."""
        order = torch.argsort((self.rows << 32) + self.ids)
        return Entries(self.rows[order], self.ids[order], self.drawn[order])


@dataclass(slots=True)
class BlockWeights:
    """What a block of positions looks like: probabilities up to the factor of their position."""

    weights_nC: Tensor  # float32, proportional to p; written to by `choose`
    mass_n: Tensor  # their sum over the classes
    maxima_nG: Tensor  # float32, the largest weight of each group, roughly
    bad_n: Tensor  # bool: NaN or infinity, where the only entry is class 0

    @property
    def factor_n(self) -> Tensor:
        """From weights to units; float32."""
        return torch.where(self.bad_n, 0.0, UNITS / self.mass_n).float()


def choose_above(block: BlockWeights, spec: TargetSpec) -> Entries:
    """Every class of at least the threshold, and the largest always, but MAX_ENTRIES at most.

    The weights of the entries become 0.
    """
    threshold = _units(spec)
    kept = _with_largest(block, _above(block, threshold), lowest=0.0)
    kept = _at_most(block, kept, MAX_ENTRIES)
    block.weights_nC[kept.rows, kept.ids] = 0.0
    return kept


def choose_and_draw(block: BlockWeights, spec: TargetSpec, offset_n: Tensor) -> Entries:
    """Every class of at least the threshold, and of the others a systematic sample.

    The largest class is kept as it is only as far below the threshold as the codec can write; below
    that it is drawn like any other. The weights of the entries that are not drawn become 0.
    offset_n: where the sampling grid begins, as a share of the spacing in [0, 1), float64.
    """
    threshold = _units(spec)
    lowest = threshold * math.exp(-RANGE_BEYOND)
    kept = _with_largest(block, _above(block, threshold), lowest)
    block.weights_nC[kept.rows, kept.ids] = 0.0
    rows, ids = _systematic(block, (offset_n * threshold).long(), threshold)
    drawn = torch.ones_like(rows, dtype=torch.bool)
    parts = ((kept.rows, rows), (kept.ids, ids), (kept.drawn, drawn))
    return Entries(*(torch.cat(pair) for pair in parts)).sorted()


def _units(spec: TargetSpec) -> int:
    return max(1, round(spec.threshold * UNITS))


def _above(block: BlockWeights, threshold: int) -> Entries:
    """Every class of at least `threshold` units. Only groups that may have one are looked at."""
    C, factor_n = block.weights_nC.shape[1], block.factor_n
    rows, groups = torch.nonzero(
        block.maxima_nG * factor_n[:, None] >= threshold * _SLACK, as_tuple=True
    )
    ids_SL = groups[:, None] * GROUP + torch.arange(GROUP, device=groups.device)
    weights_SL = block.weights_nC[rows[:, None], ids_SL.clamp(max=C - 1)]
    units_SL = (weights_SL * factor_n[rows, None]).long()
    pairs, lanes = torch.nonzero((units_SL >= threshold) & (ids_SL < C), as_tuple=True)
    return Entries(rows[pairs], ids_SL[pairs, lanes], torch.zeros_like(pairs, dtype=torch.bool))


def _with_largest(block: BlockWeights, kept: Entries, lowest: float) -> Entries:
    """Adds the largest class, the first of equal ones, where no class reached the threshold.

    Only where it has at least `lowest` units; a bad position, of which nothing is known, has it.
    """
    missing_n = torch.bincount(kept.rows, minlength=len(block.mass_n)) == 0
    rows = torch.nonzero(missing_n)[:, 0]
    if not len(rows):
        return kept
    weights_mC = block.weights_nC[rows].masked_fill(block.bad_n[rows, None], 0.0)
    largest_m, ids = weights_mC.max(dim=1)
    ids = (weights_mC == largest_m[:, None]).to(torch.uint8).argmax(dim=1)
    high_m = (largest_m * block.factor_n[rows] >= lowest) | block.bad_n[rows]
    rows, ids = rows[high_m], ids[high_m]
    drawn = torch.zeros_like(rows, dtype=torch.bool)
    parts = ((kept.rows, rows), (kept.ids, ids), (kept.drawn, drawn))
    return Entries(*(torch.cat(pair) for pair in parts)).sorted()


def _at_most(block: BlockWeights, kept: Entries, most: int) -> Entries:
    """The largest of each position's entries, the smaller of equal classes first."""
    counts_n = torch.bincount(kept.rows, minlength=len(block.mass_n))
    if not len(kept.rows) or int(counts_n.max()) <= most:
        return kept
    order = torch.argsort(block.weights_nC[kept.rows, kept.ids], descending=True, stable=True)
    order = order[torch.argsort(kept.rows[order], stable=True)]
    starts_n = counts_n.cumsum(0) - counts_n
    place = torch.arange(len(order), device=order.device) - starts_n[kept.rows[order]]
    chosen = order[place < most].sort().values
    return Entries(kept.rows[chosen], kept.ids[chosen], kept.drawn[chosen])


def _systematic(block: BlockWeights, offset_n: Tensor, spacing: int) -> tuple[Tensor, Tensor]:
    """Position and class of the points offset, offset + spacing, ... in the sums by class.

    Every class has fewer units than the spacing, so none is hit twice; it is hit with a probability
    of its units over the spacing.
    """
    n, C = block.weights_nC.shape
    units_nC = (block.weights_nC * block.factor_n[:, None]).nan_to_num(0.0).long()
    units_ML = F.pad(units_nC, (0, -C % GROUP)).view(-1, GROUP)  # M = n G groups
    total_M = units_ML.sum(dim=1)
    end_M = total_M.cumsum(0)
    end_n = end_M.view(n, -1)[:, -1]
    before_n = F.pad(end_n, (1, 0))[:-1]
    count_n = (end_n - before_n - offset_n + spacing - 1).div(spacing, rounding_mode="floor")
    count_n = count_n.clamp(min=0)
    rows = torch.repeat_interleave(torch.arange(n, device=count_n.device), count_n)
    number_S = torch.arange(len(rows), device=rows.device) - (count_n.cumsum(0) - count_n)[rows]
    point_S = before_n[rows] + offset_n[rows] + number_S * spacing
    group_S = torch.searchsorted(end_M, point_S, right=True)
    inside_S = point_S - (end_M - total_M)[group_S]
    lane_S = (units_ML[group_S].cumsum(dim=1) <= inside_S[:, None]).sum(dim=1)
    return rows, group_S % (len(total_M) // n) * GROUP + lane_S
