"""What the codecs of all kinds of targets share: planes by name, ranks of classes, tails.

Shapes: P positions with a target, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from shared.arrays import Plane, join_planes
from shared.errors import CorruptCache
from shared.targets.record import Floats

Per = Literal["row", "segment", "token", "position", "entry", "state", "byte"]

TAIL_MIN, TAIL_MAX = -14.0, 17.0  # ln(tail / kept); kept >= K / C, so 17 holds any C below 2**24
TAIL_STEPS = 65_534
NO_TAIL = 65_535  # nothing is left: the tail is exactly 0
_RATIOS = np.append(np.linspace(TAIL_MIN, TAIL_MAX, TAIL_STEPS + 1), -np.inf)
LOG_KEPT: Floats = (-np.logaddexp(0, _RATIOS)).astype(np.float32)  # of each code
LOG_TAIL: Floats = (-np.logaddexp(0, -_RATIOS)).astype(np.float32)

DRAWN_HALF = 65_535  # code of a drawn entry of a sample at 16 bits: a NaN, so no drop has it
_INFINITE_HALF = 0x7C00  # larger ones are NaN or negative

_REPAIR = "Run cache-teacher verify CACHE --drop-bad, then run again."


@dataclass(frozen=True, slots=True)
class PlaneShape:
    """One byte plane, `<column>.<plane>`, and its bytes for each position or entry."""

    name: str
    per: Per
    item_bytes: int


def named(name: str, planes: Sequence[Plane]) -> dict[str, Plane]:
    """The planes of one column by name."""
    return {f"{name}.{number}": plane for number, plane in enumerate(planes)}


def id_planes(num_classes: int) -> int:
    """Byte planes that hold any rank."""
    return (bits_per_rank(num_classes) + 7) // 8


def bits_per_rank(num_classes: int) -> int:
    return (num_classes - 1).bit_length()


def tail_codes(log_ratio_P: Floats, log_tail_P: Floats) -> npt.NDArray[np.uint16]:
    """Codes of ln(tail / kept mass) [P].

    The ratio is exact where the tail is nearly 1 as well, where 1 - tail is not.
    """
    step = (TAIL_MAX - TAIL_MIN) / TAIL_STEPS
    code_P = np.rint((log_ratio_P - TAIL_MIN) / step).clip(0, TAIL_STEPS).astype(np.uint16)
    code_P[log_tail_P == -np.inf] = NO_TAIL
    return code_P


def halves(planes: Sequence[Plane], *, drawn: bool = False) -> npt.NDArray[np.float16]:
    """Drops that are kept as IEEE halves in two planes, nats; infinity is probability 0.

    What no drop looks like, negative numbers and NaN, is refused; but for 65535 where `drawn`.
    """
    codes = join_planes(planes, np.uint16)
    wrong = codes > _INFINITE_HALF
    if drawn:
        wrong &= codes != DRAWN_HALF
    if wrong.any():
        found = int(codes[wrong][0])
        raise CorruptCache(
            f"target_codes: found 0x{found:04x}, expected an IEEE half of 0 or more. {_REPAIR}"
        )
    return codes.view(np.float16)


def beyond_classes(largest: int, num_classes: int) -> CorruptCache:
    """What a decoder says of a rank that no class has."""
    return CorruptCache(
        f"target_ids: found rank {largest}, expected below {num_classes}. {_REPAIR}"
    )


def no_class_left(column: str) -> CorruptCache:
    """What a decoder says of a position that nothing is left of."""
    return CorruptCache(
        f"{column}: found a position without any class, expected at least one. {_REPAIR}"
    )
