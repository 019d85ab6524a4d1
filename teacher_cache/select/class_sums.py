"""Sums over all classes of a teacher's logits, in float32 and block by block.

On a CPU no bit depends on how the positions were cut into chunks.

N positions, C classes, G groups of 64 classes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from teacher_cache.select.ragged_entries import GROUP

BLOCK_BYTES = 4 << 20  # of float32 logits in work at once on a CPU; 0.5 to 32 MiB tried
SUM_PARTS = 8  # a sum over classes is cut in 8, so one row alone is added up like a row among many
LOG2_E = float(torch.tensor(math.log2(math.e), dtype=torch.float32))  # exactly what kernels use


@dataclass(slots=True)
class WorkAreas:
    """The blocks a CPU works in, and float32 areas of one block's size that every block reuses."""

    blocks: list[slice]
    scaled: Tensor  # [rows, width >= C]; columns beyond C stay 0
    weights: Tensor  # the same

    @classmethod
    def for_logits(cls, logits_NC: Tensor) -> "WorkAreas":
        num_rows, num_classes = logits_NC.shape
        width = math.ceil(num_classes / SUM_PARTS) * SUM_PARTS
        rows = max(num_rows, 1)
        if logits_NC.device.type == "cpu":
            rows = min(rows, max(1, BLOCK_BYTES // (4 * width)))
        blocks = [slice(i, min(i + rows, num_rows)) for i in range(0, num_rows, rows)]
        areas = logits_NC.new_empty((2, rows, width), dtype=torch.float32)
        areas[:, :, num_classes:] = 0.0
        return cls(blocks, areas[0], areas[1])


@dataclass(slots=True)
class ClassSums:
    """Float64 [N] sums over the classes, of w = 2^scaled and scaled = LOG2_E * logit - shift."""

    tail_N: Tensor  # of w over the classes that are not entries
    moment_N: Tensor  # of w * scaled
    tempered_N: dict[float, Tensor]  # T -> of w^(1/T)


def sum_classes(
    logits_NC: Tensor,
    shift_N: Tensor,
    leave_out: Callable[[slice, Tensor], None],
    temperatures: tuple[float, ...],
    areas: WorkAreas,
) -> ClassSums:
    """`leave_out` zeroes the weights of entries, so the tail is no difference of near-equals.

    Powers of 2 because exp2 takes a third of exp's time on a CPU.
    """
    num_rows, num_classes = logits_NC.shape
    sums = logits_NC.new_empty((2 + len(temperatures), num_rows), dtype=torch.float64)
    for block in areas.blocks:
        block_NC = _float32_on_cpu(logits_NC[block], areas)
        scaled, weights = areas.scaled[: len(block_NC)], areas.weights[: len(block_NC)]
        scaled_NC, weights_NC = scaled[:, :num_classes], weights[:, :num_classes]
        torch.add(-shift_N[block, None], block_NC, alpha=LOG2_E, out=scaled_NC)
        for row, temperature in enumerate(temperatures, start=2):
            torch.mul(scaled_NC, 1 / temperature, out=weights_NC).exp2_()
            sums[row, block] = row_sums(weights, torch.sum)
        torch.exp2(scaled_NC, out=weights_NC)
        torch.mul(scaled_NC, weights_NC, out=scaled_NC)
        sums[1, block] = row_sums(scaled, torch.nansum)  # NaN: a masked class, -inf * 0
        leave_out(block, weights_NC)
        sums[0, block] = row_sums(weights, torch.sum)
    return ClassSums(sums[0], sums[1], dict(zip(temperatures, sums[2:], strict=True)))


def row_sums(area_NC: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """Sums over the classes in float32; in parts, so one row alone is added up as among many."""
    return reduce(area_NC.unflatten(1, (SUM_PARTS, -1)), dim=2).sum(dim=1)


def _float32_on_cpu(block_NC: Tensor, areas: WorkAreas) -> Tensor:
    """A CPU reduces half types 7x slower than it converts them."""
    if block_NC.device.type != "cpu" or block_NC.dtype == torch.float32:
        return block_NC
    return areas.scaled[: len(block_NC), : block_NC.shape[1]].copy_(block_NC)


def group_maxima(logits_NC: Tensor, areas: WorkAreas) -> Tensor:
    """The largest logit of each 64 consecutive classes, the last group may be smaller: [N, G]."""
    num_rows, num_classes = logits_NC.shape
    whole = num_classes // GROUP
    maxima_NG = logits_NC.new_empty(num_rows, math.ceil(num_classes / GROUP))
    for block in areas.blocks:
        block_NC = _float32_on_cpu(logits_NC[block], areas)
        groups_NGM = block_NC[:, : whole * GROUP].unflatten(1, (whole, GROUP))
        maxima_NG[block, :whole] = groups_NGM.amax(dim=2)
        if num_classes % GROUP:
            maxima_NG[block, whole] = block_NC[:, whole * GROUP :].amax(dim=1)
    return maxima_NG
