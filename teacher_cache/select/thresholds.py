"""The threshold that gives a ragged kind its number of entries, found on a sample of the corpus.

N positions, K of the largest classes of each, descending: MAX_ENTRIES of them, or all there are.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

log = logging.getLogger(__name__)

_HIGHEST = 0.9
_DIGITS = 4  # kept of the result, so that a person can read it

# Log-probabilities [N, K] and a threshold -> with which probability each class becomes an entry
# [N, K], and entries beyond these [N].
Inclusion = Callable[[Tensor, float], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What a threshold means to a kind, and the lowest one there is."""

    lowest: float
    inclusion: Inclusion

    def find(self, logprobs_NK: Tensor, wanted: float) -> float:
        """The threshold with `wanted` entries of a position on average."""
        if (most := self.most_entries(logprobs_NK)) < wanted:
            log.warning(
                "--mean-entries %g: this teacher has %.1f at the lowest threshold there is, %.2g, "
                "which is used",
                *(wanted, most, self.lowest),
            )
            return self.lowest
        if (least := self.mean_entries(logprobs_NK, _HIGHEST)) > wanted:
            log.warning(
                "--mean-entries %g: this teacher has %.1f at the highest threshold there is, %.2g, "
                "which is used",
                *(wanted, least, _HIGHEST),
            )
            return _HIGHEST
        low, high = self.lowest, _HIGHEST
        for _ in range(40):
            middle = math.sqrt(low * high)
            if self.mean_entries(logprobs_NK, middle) > wanted:
                low = middle
            else:
                high = middle
        return max(self.lowest, float(f"{high:.{_DIGITS}g}"))

    def most_entries(self, logprobs_NK: Tensor) -> float:
        """The largest mean that any threshold gives."""
        return self.mean_entries(logprobs_NK, self.lowest)

    def mean_entries(self, logprobs_NK: Tensor, threshold: float) -> float:
        """Entries of a position on average: how many are expected, for a sample."""
        share_NK, beyond_N = self.inclusion(logprobs_NK, threshold)
        return float((share_NK.sum(dim=1) + beyond_N).mean())
