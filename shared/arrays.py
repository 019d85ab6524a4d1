"""Operations on numpy arrays that several modules need: ranges, hashed bits, byte planes."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Plane: TypeAlias = npt.NDArray[np.uint8]


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, ... (count numbers) for each start, joined; i64 [sum of counts]."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


def mixed_bits(*parts: np.ndarray | int) -> np.ndarray:
    """64 bits from several u64 numbers, each bit of which depends on all of them (splitmix64).

    A function of its arguments alone, so the same on any machine and in any order of work.
    """
    bits = np.zeros(1, np.uint64)
    for part in parts:
        bits = bits ^ np.asarray(part, np.uint64)
        bits = bits + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits = bits ^ (bits >> np.uint64(31))
    return bits


def split_planes(values: npt.NDArray[np.unsignedinteger], planes: int) -> list[Plane]:
    """The lowest `planes` bytes of each value, lowest byte first, each plane shaped like values."""
    higher = [(values >> (8 * plane)).astype(np.uint8) for plane in range(1, planes)]
    return [values.astype(np.uint8), *higher]


def join_planes(
    planes: Sequence[Plane],
    dtype: npt.DTypeLike,
    *,
    out: npt.NDArray[np.unsignedinteger] | None = None,
) -> npt.NDArray[np.unsignedinteger]:
    """The inverse of split_planes. Shift-and-or is 8 times faster than strided assignment.

    Values are written to `out` where it is given.
    """
    values = np.empty(planes[-1].shape, dtype) if out is None else out
    values[...] = planes[-1]
    for plane in reversed(planes[:-1]):
        np.left_shift(values, 8, out=values)
        np.bitwise_or(values, plane, out=values)
    return values
