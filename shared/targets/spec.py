"""Which kind of target a cache keeps, and with which options; part of the manifest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shared.arrays import Plane
from shared.errors import ConfigError
from shared.targets.base import Kind, TargetFields, TargetKind
from shared.targets.kinds import KINDS
from shared.targets.planes import PlaneShape
from shared.targets.record import ClassRanks, Floats, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSpec(TargetFields):
    """What a cache keeps of each target: a kind of `kinds.KINDS`, and its options.

    The traits of the kind (`base.Kind`) are properties here, so that whoever holds a manifest asks
    `manifest.targets.sampled` and no name is compared.
    """

    kind: TargetKind = field(metadata={"one_of": KINDS})

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ConfigError(f"targets={self.kind}: expected one of {', '.join(KINDS)}.")
        fewest = self.of_kind.fewest_classes
        if not fewest <= self.num_classes < 2**31:
            raise ConfigError(f"num_classes={self.num_classes}: expected {fewest} to 2**31 - 1.")
        if self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}: expected at least 1.")
        if self.value_bits not in (7, 8, 16):
            raise ConfigError(f"value_bits={self.value_bits}: expected 7, 8 or 16.")
        if any(t <= 0 or t == 1 for t in self.temperatures):
            raise ConfigError(f"temperatures={self.temperatures}: expected positive, and not 1.")
        if list(self.temperatures) != sorted(set(self.temperatures)):
            raise ConfigError(f"temperatures={self.temperatures}: expected ascending, each once.")
        self.of_kind.check(self)

    @property
    def of_kind(self) -> Kind[Any]:
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
        return self.of_kind.num_entries(self)

    @property
    def complete(self) -> bool:
        """Whether every class is an entry, so that there is no tail."""
        return self.of_kind.complete(self)

    @property
    def text(self) -> str:
        """Kind and size in a few words."""
        return self.of_kind.text(self.kind, self)

    @property
    def plane_shapes(self) -> Sequence[PlaneShape]:
        """Every byte plane of the targets, in the order of the columns."""
        return self.of_kind.plane_shapes(self)

    def encode(self, kept: Target | Floats, ranks: ClassRanks) -> dict[str, Plane]:
        """Every plane of plane_shapes: of a target, or of a number for each position."""
        return self.of_kind.encode(kept, self, ranks)

    def decode(self, planes: Mapping[str, Plane], num_positions: int, ranks: ClassRanks) -> Any:
        """The inverse of encode: a Target, or f32 [P] where the kind keeps numbers."""
        return self.of_kind.decode(planes, num_positions, self, ranks)
