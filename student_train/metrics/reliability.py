"""Calibration: how often a student is right where it says how sure it is.

Bins of equal width over the probability of the answer, as Guo et al. 2017. They are added up batch
by batch, so that a vocabulary of any size and any number of positions takes 15 lines.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

NUM_BINS = 15  # as Guo et al. 2017


def bin_of(confidence_P: np.ndarray) -> np.ndarray:
    """The bin of each probability, i64 [P]: it holds its upper edge and not its lower one."""
    return np.clip(np.ceil(confidence_P * NUM_BINS).astype(int) - 1, 0, NUM_BINS - 1)


def _zeros() -> np.ndarray:
    return np.zeros(NUM_BINS)


@dataclass(slots=True)
class Reliability:
    """Sums over the positions of each bin."""

    count_B: np.ndarray = field(default_factory=_zeros)
    confidence_B: np.ndarray = field(default_factory=_zeros)
    right_B: np.ndarray = field(default_factory=_zeros)

    def add(self, confidence_P: np.ndarray, right_P: np.ndarray) -> None:
        bin_P = bin_of(confidence_P)
        self.count_B += np.bincount(bin_P, minlength=NUM_BINS)
        self.confidence_B += np.bincount(bin_P, weights=confidence_P, minlength=NUM_BINS)
        self.right_B += np.bincount(bin_P, weights=right_P, minlength=NUM_BINS)

    @property
    def error(self) -> float:
        """Expected calibration error (Guo et al. 2017, equation 3); 0 without positions."""
        gap = float(np.abs(self.right_B - self.confidence_B).sum())
        return gap / max(1.0, float(self.count_B.sum()))

    def bins(self) -> list[dict[str, Any]]:
        """The edges, positions, mean probability and share right of each bin; None if empty."""
        found = []
        for number in range(NUM_BINS):
            count = int(self.count_B[number])
            found.append(
                {
                    "low": number / NUM_BINS,
                    "high": (number + 1) / NUM_BINS,
                    "count": count,
                    "confidence": float(self.confidence_B[number]) / count if count else None,
                    "right": float(self.right_B[number]) / count if count else None,
                }
            )
        return found
