"""Targets with K entries at every position: what `topk` and `dense` share.

Shapes: P positions with a target, K entries. Planes are flat uint8 arrays, as `frames.compress`
takes them and `frames.decompress` gives them.

An entry is kept as its drop: the nats below the likeliest entry of its position. The height of that
one need not be kept, since the decoder scales entries and tail to a sum of 1.

Every plane is position-major. Slot-major is 2 % smaller where no set of ids ever returns, but 10 %
larger where some do, and a third slower to decode.
"""

from abc import abstractmethod
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from shared.arrays import Plane
from shared.targets.base import Kind, TargetFields
from shared.targets.record import ClassRanks, Floats, Target

# Ranges 0 and 1/16 nat * 2**(b/16), b = 1..255: up to 3,922 nats, each 4.4 % above the one before.
# fp16 hi and lo cost 2.5 bytes a position more, and lower KL by 2-4 %: scaling replaces hi anyway.
RANGES: Floats = np.concatenate([[0.0], 2.0 ** (np.arange(1, 256) / 16 - 4)]).astype(np.float32)

# Decoded in one go. Twice as many are 5 % faster where the allocator keeps memory, and half as fast
# where it gives it back to the system and has to get it anew.
_DECODED_ENTRIES = 1 << 16


class FixedKind(Kind[Target]):
    """Every position has the same number of entries."""

    def decode(
        self, planes: Mapping[str, Plane], num_positions: int, spec: TargetFields, ranks: ClassRanks
    ) -> Target:
        """The target, scaled so that entries and tail sum to 1 in float32 (within 2e-6)."""
        entries = self.num_entries(spec)
        shape = (num_positions, entries)
        target = Target(
            ids=self.room_for_ids(shape),
            logprobs=np.empty(shape, np.float32),
            log_tail=np.full(num_positions, -np.inf, np.float32),
        )
        shapes = self.plane_shapes(spec)
        step = max(1, _DECODED_ENTRIES // entries)
        for start in range(0, num_positions, step):
            some = slice(start, start + step)
            part = {
                shape.name: planes[shape.name][
                    start * shape.item_bytes : (start + step) * shape.item_bytes
                ]
                for shape in shapes
            }
            room = Target(target.ids[some], target.logprobs[some], target.log_tail[some])
            self.decode_part(part, spec, ranks, out=room)
        return target

    @abstractmethod
    def room_for_ids(self, shape: tuple[int, int]) -> npt.NDArray[np.int32]:
        """Where decode_part finds or writes the ids, [P, K]."""

    @abstractmethod
    def decode_part(
        self, planes: Mapping[str, Plane], spec: TargetFields, ranks: ClassRanks, *, out: Target
    ) -> None:
        """Decodes some positions into arrays of their size."""


def drops(
    target: Target, spec: TargetFields, num_entries: int
) -> tuple[Floats, Floats, npt.NDArray[np.bool_]]:
    """The likeliest log-probability [P], each entry's drop below it [P, K], and where that is inf.

    An entry 3,922 nats below the likeliest counts as one of probability 0: its drop is infinite.
    """
    hi_P = row_max(target.logprobs)
    _check(target, spec, num_entries, hi_P)
    drop_PK = hi_P[:, None] - target.logprobs
    missing_PK = drop_PK > RANGES[-1]
    drop_PK[missing_PK] = np.inf
    return hi_P, drop_PK, missing_PK


def _check(target: Target, spec: TargetFields, num_entries: int, hi_P: Floats) -> None:
    """What a caller can get wrong and no decoder could notice."""
    if target.ids.shape != target.logprobs.shape or target.ids.shape[1] != num_entries:
        raise ValueError(
            f"target: ids {target.ids.shape} and logprobs {target.logprobs.shape}, "
            f"expected [positions, {num_entries}]"
        )
    if target.ids.min(initial=0) < 0 or target.ids.max(initial=0) >= spec.num_classes:
        raise ValueError(f"target: ids beyond the {spec.num_classes} classes")
    bad_P = ~np.isfinite(hi_P) | np.isnan(target.log_tail)
    if bad_P.any():
        raise ValueError(f"target {bad_P.argmax()}: NaN, or no class with probability above 0")


def row_max(values_PK: Floats) -> Floats:
    """As max(axis=1), in less than half its time; NaN where there is one."""
    return values_PK[np.arange(len(values_PK)), values_PK.argmax(axis=1)]


def half_codes(drop_PK: Floats) -> npt.NDArray[np.uint16]:
    """Drops as IEEE halves, the codes of 16 bits."""
    return drop_PK.astype(np.float16).view(np.uint16)
