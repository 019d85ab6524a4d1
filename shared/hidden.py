"""Hidden states <-> byte planes, and what each channel looks like over a whole cache.

Shapes: P positions, D channels. States are bfloat16 bit patterns in uint16: numpy has no bfloat16.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from shared.frames import Plane, join_planes, split_planes

Bits: TypeAlias = npt.NDArray[np.uint16]
Doubles: TypeAlias = npt.NDArray[np.float64]


def encode_bf16(states_PD: Bits) -> list[Plane]:
    """Two planes, lossless. The low one hardly compresses, the high one to 3 of 8 bits."""
    return [plane.reshape(-1) for plane in split_planes(states_PD, 2)]


def decode_bf16(planes: Sequence[Plane], width: int) -> Bits:
    """Bit patterns [P, width]."""
    return join_planes(planes, np.uint16).reshape(-1, width)


def bf16_to_float32(states_PD: Bits) -> npt.NDArray[np.float32]:
    """Exact: bfloat16 is the upper half of a float32."""
    bits = states_PD.astype(np.uint32)
    np.left_shift(bits, 16, out=bits)
    return bits.view(np.float32)


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """Count, mean [D] and sum of squared deviations [D] of each channel, in float64."""

    count: int
    mean: Doubles
    squares: Doubles

    @classmethod
    def of(cls, states_PD: Bits) -> "ChannelStatistics":
        """Of one batch; no position at all is fine."""
        count, width = states_PD.shape
        if count == 0:
            return cls(0, np.zeros(width), np.zeros(width))
        values_PD = bf16_to_float32(states_PD).astype(np.float64)
        mean = values_PD.mean(axis=0)
        values_PD -= mean
        return cls(count, mean, np.einsum("pd,pd->d", values_PD, values_PD))

    def merge(self, other: "ChannelStatistics") -> "ChannelStatistics":
        """Of both together (Chan, Golub and LeVeque 1979)."""
        count = self.count + other.count
        if count == 0:
            return self
        shift = other.mean - self.mean
        squares = self.squares + other.squares + shift**2 * (self.count * other.count / count)
        return ChannelStatistics(count, self.mean + shift * (other.count / count), squares)

    @property
    def std(self) -> Doubles:
        """Deviation [D] over all positions (divided by their number)."""
        return np.sqrt(self.squares / max(self.count, 1))
