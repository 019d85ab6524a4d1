"""The threshold that gives a ragged kind its number of entries, found on a sample of the corpus.

N positions, K of the largest classes of each, descending: MAX_ENTRIES of them, or all there are.
"""

import logging
import math

import torch
from torch import Tensor

from shared.targets.base import TargetKind
from shared.targets.sample import MIN_SPACING, RANGE_BEYOND
from shared.targets.spec import TargetSpec

log = logging.getLogger(__name__)

_LOWEST = 1e-7  # of adaptive: far below what a byte of entries can reach
_HIGHEST = 0.9
_DIGITS = 4  # kept of the result, so that a person can read it


def find_threshold(logprobs_NK: Tensor, spec: TargetSpec) -> float:
    """The threshold with `spec.mean_entries` entries of a position on average."""
    lowest, highest = _lowest(spec.kind), _HIGHEST
    if (most := most_entries(logprobs_NK, spec.kind)) < spec.mean_entries:
        log.warning(
            "--mean-entries %g: this teacher has %.1f at the lowest threshold there is, %.2g, "
            "which is used",
            *(spec.mean_entries, most, lowest),
        )
        return lowest
    if (least := mean_entries(logprobs_NK, spec.kind, highest)) > spec.mean_entries:
        log.warning(
            "--mean-entries %g: this teacher has %.1f at the highest threshold there is, %.2g, "
            "which is used",
            *(spec.mean_entries, least, highest),
        )
        return highest
    low, high = lowest, highest
    for _ in range(40):
        middle = math.sqrt(low * high)
        if mean_entries(logprobs_NK, spec.kind, middle) > spec.mean_entries:
            low = middle
        else:
            high = middle
    return max(lowest, float(f"{high:.{_DIGITS}g}"))


def _lowest(kind: TargetKind) -> float:
    return MIN_SPACING if kind == "sample" else _LOWEST


def most_entries(logprobs_NK: Tensor, kind: TargetKind) -> float:
    """The largest mean that any threshold gives."""
    return mean_entries(logprobs_NK, kind, _lowest(kind))


def mean_entries(logprobs_NK: Tensor, kind: TargetKind, threshold: float) -> float:
    """Entries of a position on average: how many are expected, for a sample."""
    share_NK, beyond_N = inclusion(logprobs_NK, kind, threshold)
    return float((share_NK.sum(dim=1) + beyond_N).mean())


def inclusion(logprobs_NK: Tensor, kind: TargetKind, threshold: float) -> tuple[Tensor, Tensor]:
    """With which probability each class becomes an entry [N, K], and entries beyond these [N]."""
    p_NK = logprobs_NK.exp()
    kept_NK = p_NK >= threshold
    lowest = threshold * math.exp(-RANGE_BEYOND) if kind == "sample" else 0.0
    kept_NK[:, 0] = p_NK[:, 0] >= lowest
    if kind == "adaptive":
        return kept_NK.float(), torch.zeros(len(p_NK))
    drawn_NK = (p_NK / threshold).masked_fill(kept_NK, 1.0)
    beyond_N = (1 - p_NK.sum(dim=1)).clamp(min=0.0) / threshold
    return drawn_NK, beyond_N
