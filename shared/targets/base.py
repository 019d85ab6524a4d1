"""What a kind of target is: its traits, its checks and its codec, in one object.

A kind is asked for what it can do (`kind.sampled`), never for its name. It keeps no state: the
options of a cache come with every call, as `TargetFields`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Generic, Literal, TypeAlias, TypeVar

from shared.arrays import Plane
from shared.targets.planes import PlaneShape
from shared.targets.record import ClassRanks, Floats, Target

TargetKind: TypeAlias = str  # a name in `kinds.KINDS`
ValueBits = Literal[7, 8, 16]

# What encode takes and decode gives back: distributions, or one number for each position.
Kept = TypeVar("Kept", Target, Floats)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFields:
    """The options of every kind of target, as they stand in a manifest; each kind reads some.

    `kind` is a name in `kinds.KINDS`, which TargetSpec checks; it stands here to be the first.
    `top_k` entries of each position, or `mean_entries` on average and the `threshold` that gives
    them; `value_bits` of each log-probability; `temperatures` whose normalisers are stored. A
    threshold of 0 is one that calibration has still to find.
    """

    kind: TargetKind
    num_classes: int
    top_k: int = 32
    value_bits: ValueBits = 7
    temperatures: tuple[float, ...] = ()
    mean_entries: float = field(default=0.0, metadata={"added": True})
    threshold: float = field(default=0.0, metadata={"added": True})


class Kind(ABC, Generic[Kept]):
    """One kind of target.

    has_targets        something of a teacher is kept; without it there are hard labels only
    numbers            what is kept of a position is one number, and no distribution over classes
    ragged             positions differ in their number of entries; their counts are stored
    sampled            entries are weights of an unbiased sample: their weighted sums are exact on
                       average, at temperature 1 only, and there is no tail
    truncated          the likeliest classes are entries, and all others are one tail; normalisers
                       of other temperatures, stored beside them, make such a target exact there
    every_temperature  nothing is cut off, so that the distribution is exact at any temperature
    lowest_threshold   the smallest `threshold` of a ragged kind
    fewest_classes     the smallest number of classes
    reads              the options among TargetFields that decide how much is kept and how finely
    """

    has_targets: ClassVar[bool] = True
    numbers: ClassVar[bool] = False
    ragged: ClassVar[bool] = False
    sampled: ClassVar[bool] = False
    truncated: ClassVar[bool] = False
    every_temperature: ClassVar[bool] = False
    lowest_threshold: ClassVar[float] = 0.0
    fewest_classes: ClassVar[int] = 2
    reads: ClassVar[frozenset[str]] = frozenset()

    @property
    def distributions(self) -> bool:
        """Whether what is kept of a position is a distribution over the classes."""
        return self.has_targets and not self.numbers

    def check(self, spec: TargetFields) -> None:
        """Raises ConfigError where these options cannot be of this kind."""

    def num_entries(self, spec: TargetFields) -> int:
        """K, the entries of a position; only where it is the same at every position."""
        return min(spec.top_k, spec.num_classes)

    def complete(self, spec: TargetFields) -> bool:
        """Whether every class is an entry, so that there is no tail."""
        return not self.ragged and self.num_entries(spec) == spec.num_classes

    def text(self, name: TargetKind, spec: TargetFields) -> str:
        """Kind and size in a few words."""
        return name

    @abstractmethod
    def plane_shapes(self, spec: TargetFields) -> Sequence[PlaneShape]:
        """Every plane, in the order of the columns; the planes `per` entry follow their counts."""

    @abstractmethod
    def encode(self, kept: Kept, spec: TargetFields, ranks: ClassRanks) -> dict[str, Plane]:
        """Every plane of plane_shapes by name, flat."""

    @abstractmethod
    def decode(
        self,
        planes: Mapping[str, Plane],
        num_positions: int,
        spec: TargetFields,
        ranks: ClassRanks,
    ) -> Kept:
        """What these planes hold; CorruptCache where no encoder writes such planes."""
