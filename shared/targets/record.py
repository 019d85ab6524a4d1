"""What a teacher says at positions, as arrays, and the order in which classes are counted.

Shapes: P positions with a target, K entries of each, E entries of all positions, C classes.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from shared.arrays import ranges

Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(slots=True)
class Target:
    """The teacher's distributions at P positions.

    Without `counts` every position has K entries, [P, K]; with them the entries of all positions
    stand one after another, [E]. `ids` are distinct within a position, in any order before encoding
    and by ascending rank after decoding. An entry whose logprob is -inf has probability 0 and only
    fills its slot. In a sample the logprobs are ln of the weights, and `log_tail` is -inf.
    `random_bits`, for encoding a sample, decide how its probabilities are rounded.
    """

    ids: npt.NDArray[np.int32]  # [P, K] or [E]
    logprobs: Floats  # the same shape, nats, T = 1
    log_tail: Floats  # [P], ln of the mass of all classes not kept; -inf: exactly 0
    counts: npt.NDArray[np.int32] | None = None  # [P], entries of each position, ragged kinds only
    random_bits: npt.NDArray[np.uint64] | None = None  # [P]

    def at(self, positions: npt.NDArray[np.intp]) -> "Target":
        """The targets of these positions, in this order."""
        bits = None if self.random_bits is None else self.random_bits[positions]
        if self.counts is None:
            return Target(
                self.ids[positions], self.logprobs[positions], self.log_tail[positions], None, bits
            )
        starts, counts = np.cumsum(self.counts) - self.counts, self.counts[positions]
        entries = ranges(starts[positions], counts)
        return Target(
            self.ids[entries], self.logprobs[entries], self.log_tail[positions], counts, bits
        )


@dataclass(frozen=True, slots=True)
class ClassRanks:
    """A permutation of the classes, often kept ones first, so that gaps between ranks are small."""

    ranks: npt.NDArray[np.uint32]  # [C] of each class
    classes: npt.NDArray[np.uint32]  # [C] at each rank

    @classmethod
    def from_counts(cls, counts: npt.NDArray[np.integer]) -> "ClassRanks":
        """Descending count [C], ties to the smaller class."""
        return cls.from_classes(np.argsort(-counts.astype(np.int64), kind="stable"))

    @classmethod
    def from_classes(cls, classes: npt.NDArray[np.integer]) -> "ClassRanks":
        """From the classes in the order of their ranks, as `classes` of a saved one."""
        if not np.array_equal(np.sort(classes), np.arange(classes.size)):
            raise ValueError(f"class ranks: expected each of 0..{classes.size - 1} exactly once")
        ranks = np.empty(classes.size, np.uint32)
        ranks[classes] = np.arange(classes.size, dtype=np.uint32)
        return cls(ranks, classes.astype(np.uint32))
