"""Targets without a distribution: the numbers of a regression, and no targets at all."""

from collections.abc import Mapping, Sequence

from shared.arrays import Plane
from shared.errors import ConfigError
from shared.targets.base import Kind, TargetFields
from shared.targets.planes import PlaneShape, named
from shared.targets.record import ClassRanks, Floats, Target
from shared.targets.scalars import decode_values, encode_values

_COLUMN = "target_values"


class Values(Kind[Floats]):
    """The number of a regression, f32 [P], exact; its one class stands for none."""

    numbers = True
    fewest_classes = 1

    def check(self, spec: TargetFields) -> None:
        if spec.num_classes > 1 or spec.temperatures:
            raise ConfigError(
                f"num_classes={spec.num_classes}, temperatures={spec.temperatures}: values have "
                "one class and no temperature."
            )

    def plane_shapes(self, spec: TargetFields) -> Sequence[PlaneShape]:
        return [PlaneShape(f"{_COLUMN}.{plane}", "position", 1) for plane in range(4)]

    def encode(self, kept: Floats, spec: TargetFields, ranks: ClassRanks) -> dict[str, Plane]:
        return named(_COLUMN, encode_values(kept))

    def decode(
        self, planes: Mapping[str, Plane], num_positions: int, spec: TargetFields, ranks: ClassRanks
    ) -> Floats:
        return decode_values([planes[f"{_COLUMN}.{plane}"] for plane in range(4)], _COLUMN)


class NoTargets(Kind[Target]):
    """Hard labels only: there is nothing to encode."""

    has_targets = False
    fewest_classes = 1

    def plane_shapes(self, spec: TargetFields) -> Sequence[PlaneShape]:
        return []

    def encode(self, kept: Target, spec: TargetFields, ranks: ClassRanks) -> dict[str, Plane]:
        raise ValueError("a cache without a teacher keeps no target")

    def decode(
        self, planes: Mapping[str, Plane], num_positions: int, spec: TargetFields, ranks: ClassRanks
    ) -> Target:
        raise ValueError("a cache without a teacher keeps no target")
