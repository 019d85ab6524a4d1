"""What a cache keeps of a teacher's distributions: the record type, its options, the class order.

Shapes: P positions with a target, K entries of each, E entries of all positions, C classes.
"""

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from shared.arrays import ranges
from shared.errors import ConfigError
from shared.targets.kinds import KINDS, Kind

Floats: TypeAlias = npt.NDArray[np.float32]

TargetKind = Literal["topk", "adaptive", "sample", "dense", "values", "none"]
RAGGED_KINDS: tuple[TargetKind, ...] = ("adaptive", "sample")
ValueBits = Literal[7, 8, 16]

MAX_ENTRIES = 255  # of one position of a ragged kind: a byte counts them
MIN_SPACING = 1 / 254  # of `sample`: a smaller one could draw more than MAX_ENTRIES
MAX_DENSE_CLASSES = 1 << 14  # of `dense`: 32 KiB for each position


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSpec:
    """What a cache keeps of each target; part of the manifest.

    topk      the `top_k` largest classes
    adaptive  every class with p >= `threshold`, the largest always: `mean_entries` on average
    sample    every class with p >= `threshold` as it is, the others drawn by systematic sampling
              with that spacing, each drawn one with that weight (Fearnhead and Clifford 2003)
    dense     every class
    values    no distribution but a number, of a regression: one class, which stands for none
    none      hard labels only

    A threshold of 0 is one that calibration has still to find.
    """

    kind: TargetKind
    num_classes: int
    top_k: int = 32
    value_bits: ValueBits = 7
    temperatures: tuple[float, ...] = ()
    mean_entries: float = field(default=0.0, metadata={"added": True})
    threshold: float = field(default=0.0, metadata={"added": True})

    def __post_init__(self) -> None:
        fewest = 1 if self.kind in ("values", "none") else 2
        if not fewest <= self.num_classes < 2**31:
            raise ConfigError(f"num_classes={self.num_classes}: expected {fewest} to 2**31 - 1.")
        if self.kind == "values" and (self.num_classes > 1 or self.temperatures):
            raise ConfigError(
                f"num_classes={self.num_classes}, temperatures={self.temperatures}: values have "
                "one class and no temperature."
            )
        if self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}: expected at least 1.")
        if self.value_bits not in (7, 8, 16):
            raise ConfigError(f"value_bits={self.value_bits}: expected 7, 8 or 16.")
        if any(t <= 0 or t == 1 for t in self.temperatures):
            raise ConfigError(f"temperatures={self.temperatures}: expected positive, and not 1.")
        if list(self.temperatures) != sorted(set(self.temperatures)):
            raise ConfigError(f"temperatures={self.temperatures}: expected ascending, each once.")
        if self.kind == "dense" and self.num_classes > MAX_DENSE_CLASSES:
            raise ConfigError(
                f"targets=dense keeps all {self.num_classes:,} classes: expected at most "
                f"{MAX_DENSE_CLASSES:,}. Use topk, adaptive or sample."
            )
        if self.kind == "sample" and self.temperatures:
            raise ConfigError(
                f"temperatures={self.temperatures}: a sample of p says nothing of p^(1/T). Use "
                "--targets topk or adaptive where another temperature is wanted."
            )
        lowest = MIN_SPACING if self.kind == "sample" else 1e-9
        if self.ragged and self.threshold and not lowest <= self.threshold < 1:
            raise ConfigError(f"threshold={self.threshold}: expected {lowest:.6f} to 1.")
        if self.ragged and not 1 <= self.mean_entries <= MAX_ENTRIES:
            raise ConfigError(f"mean_entries={self.mean_entries}: expected 1 to {MAX_ENTRIES}.")

    @property
    def of_kind(self) -> Kind:
        """The kind itself."""
        return KINDS[self.kind]

    @property
    def has_targets(self) -> bool:
        """Whether anything of a teacher is kept; otherwise there are hard labels only."""
        return self.of_kind.has_targets

    @property
    def numbers(self) -> bool:
        """Whether what is kept of a position is one number, and no distribution over classes."""
        return self.of_kind.numbers

    @property
    def distributions(self) -> bool:
        """Whether what is kept of a position is a distribution over the classes."""
        return self.of_kind.distributions

    @property
    def ragged(self) -> bool:
        """Whether positions differ in their number of entries."""
        return self.of_kind.ragged

    @property
    def sampled(self) -> bool:
        """Whether entries are weights of an unbiased sample, which has no tail."""
        return self.of_kind.sampled

    @property
    def truncated(self) -> bool:
        """Whether only the likeliest classes are entries, and all others are one tail."""
        return self.of_kind.truncated

    @property
    def every_temperature(self) -> bool:
        """Whether the distribution is exact at any temperature."""
        return self.of_kind.every_temperature

    @property
    def num_entries(self) -> int:
        """K; only where it is the same at every position."""
        return self.num_classes if self.kind == "dense" else min(self.top_k, self.num_classes)

    @property
    def complete(self) -> bool:
        """Whether every class is an entry, so that there is no tail."""
        return not self.ragged and self.num_entries == self.num_classes

    @property
    def text(self) -> str:
        """Kind and size in a few words."""
        if self.ragged:
            return f"{self.kind} {self.mean_entries:g}"
        return f"topk {self.num_entries}" if self.kind == "topk" else self.kind


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
