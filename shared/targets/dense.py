"""The kind `dense`: every class of every position, in the order of the classes.

Shapes: P positions with a target, K entries, all the classes. A drop is kept as an IEEE half, two
planes; ids and a tail there are none.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from shared.arrays import Plane, split_planes
from shared.errors import ConfigError
from shared.targets.base import TargetFields
from shared.targets.fixed import FixedKind, drops, half_codes
from shared.targets.planes import PlaneShape, halves, named, no_class_left
from shared.targets.record import ClassRanks, Target

MAX_DENSE_CLASSES = 1 << 14  # 32 KiB for each position


class Dense(FixedKind):
    """Every class is an entry."""

    every_temperature = True

    def check(self, spec: TargetFields) -> None:
        if spec.num_classes > MAX_DENSE_CLASSES:
            raise ConfigError(
                f"targets=dense keeps all {spec.num_classes:,} classes: expected at most "
                f"{MAX_DENSE_CLASSES:,}. Use topk, adaptive or sample."
            )

    def num_entries(self, spec: TargetFields) -> int:
        return spec.num_classes

    def plane_shapes(self, spec: TargetFields) -> Sequence[PlaneShape]:
        entries = self.num_entries(spec)
        return [PlaneShape(f"target_codes.{plane}", "position", entries) for plane in range(2)]

    def encode(self, kept: Target, spec: TargetFields, ranks: ClassRanks) -> dict[str, Plane]:
        """Rounding moves a drop by at most 2**-11 of itself."""
        _, drop_PK, _ = drops(kept, spec, self.num_entries(spec))
        codes = split_planes(half_codes(drop_PK), 2)
        return named("target_codes", [plane.reshape(-1) for plane in codes])

    def room_for_ids(self, shape: tuple[int, int]) -> npt.NDArray[np.int32]:
        """The classes, once for all positions, so they may not be written to."""
        return np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)

    def decode_part(
        self, planes: Mapping[str, Plane], spec: TargetFields, ranks: ClassRanks, *, out: Target
    ) -> None:
        out_PK = out.logprobs
        both = [planes[f"target_codes.{n}"].reshape(out_PK.shape) for n in range(2)]
        np.negative(halves(both), out=out_PK)
        weight_P = np.exp(out_PK).sum(axis=1)
        if not weight_P.all():
            raise no_class_left("target_codes")
        out_PK -= np.log(weight_P)[:, None]
