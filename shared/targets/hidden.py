"""Hidden states <-> byte planes, and what each channel looks like over a whole cache.

Shapes: S hidden states, P positions, R rows, D channels. States are bfloat16 bit patterns in
uint16: numpy has no bfloat16. The codecs that lose something are decoded to them too: every fp8
value is exactly a bfloat16, next to the error of int8 the rounding of one is nothing (0.17 % beside
0.9 %), and windows and micro-batches hold half of what float32 would take. A loss widens them.

Pieces of few states keep every temporary in the CPU's cache, and below the size from which torch
would wake its threads.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from shared.arrays import Plane, join_planes, split_planes
from shared.errors import CorruptCache, NonFiniteTargets
from shared.tasks import HiddenCodec

Bits: TypeAlias = npt.NDArray[np.uint16]
Floats: TypeAlias = npt.NDArray[np.float32]
Doubles: TypeAlias = npt.NDArray[np.float64]

SCALE_BYTES: dict[HiddenCodec, int] = {"bf16": 0, "fp8": 1, "int8": 2}  # for each state
_PIECE = 1 << 15  # numbers of one piece
_MAGNITUDE = np.uint16(0x7FFF)
_TOO_LARGE = 0x7F00  # bfloat16 bits of 2^127; infinity and NaN are above
# An fp8 scale is 2^(code - 135). Below 16 its smallest numbers would be no bfloat16 any more; 254
# is that of the largest states there are.
_FP8_BIAS, _FP8_SCALES = 135, (16, 254)
_MIN_RELATIVE_UNIT = 1e-2  # a dead channel is stored at most 100 times as finely as a typical one


@dataclass(frozen=True, slots=True)
class ChannelScale:
    """What int8 states of a layer are relative to: `centre` and `unit`, float32 [D] each."""

    centre: Floats
    unit: Floats


ChannelScales: TypeAlias = Mapping[int, ChannelScale]  # by layer; only int8 needs them
NO_SCALES: ChannelScales = {}


def num_states(num_positions_R: np.ndarray, every: int) -> np.ndarray:
    """Hidden states of each row, i64 [R]: those of its positions 0, `every`, 2 `every`, ..."""
    return -(-num_positions_R.astype(np.int64) // every)


def state_positions(num_positions_R: np.ndarray, every: int) -> np.ndarray:
    """Which of the P positions of all rows, one after another, have a hidden state; i64 [S]."""
    if every == 1:
        return np.arange(num_positions_R.sum(dtype=np.int64))
    counts_R = num_states(num_positions_R, every)
    row_starts_R = np.cumsum(num_positions_R, dtype=np.int64) - num_positions_R
    first_R = np.cumsum(counts_R) - counts_R
    within_S = np.arange(counts_R.sum()) - np.repeat(first_R, counts_R)
    return np.repeat(row_starts_R, counts_R) + within_S * every


def plane_bytes(codec: HiddenCodec, width: int) -> list[int]:
    """Bytes of a state in each plane: the channels, then its scale."""
    return [width] * (2 if codec == "bf16" else 1) + [1] * SCALE_BYTES[codec]


def encode(states_SD: Bits, codec: HiddenCodec, scale: ChannelScale | None) -> list[Plane]:
    """The planes of states; `scale` is needed by int8 alone."""
    if codec == "bf16":
        return encode_bf16(states_SD)
    if (largest := int((states_SD & _MAGNITUDE).max(initial=0))) >= _TOO_LARGE:
        raise NonFiniteTargets(
            f"hidden states: found NaN, infinity or a number beyond 2^127 (bits {largest:#06x}), "
            f"which {codec} cannot hold. Store them with --hidden-codec bf16."
        )
    if codec == "fp8":
        return encode_fp8(states_SD)
    assert scale is not None  # `Cache` and `job` read them for every layer of an int8 cache
    return encode_int8(states_SD, scale)


def decode(
    planes: Sequence[Plane], codec: HiddenCodec, width: int, scale: ChannelScale | None
) -> Bits:
    """Bit patterns [S, D]."""
    if codec == "bf16":
        return decode_bf16(planes, width)
    if codec == "fp8":
        return decode_fp8(planes, width)
    assert scale is not None
    return decode_int8(planes, width, scale)


def encode_bf16(states_SD: Bits) -> list[Plane]:
    """Two planes, lossless. The low one hardly compresses, the high one to 3 of 8 bits."""
    return [plane.reshape(-1) for plane in split_planes(states_SD, 2)]


def decode_bf16(planes: Sequence[Plane], width: int) -> Bits:
    """Bit patterns [S, width]."""
    return join_planes(planes, np.uint16).reshape(-1, width)


def encode_fp8(states_SD: Bits) -> list[Plane]:
    """e4m3 numbers (3 bits of mantissa: 6.25 % at worst, 2^-10 of a scale near 0) and a scale.

    The scale is the power of two that takes a state's largest number into (224, 448], the top of
    e4m3. Any other scale would round no better, and this one makes every decoded number a bfloat16.
    """
    import torch  # has e4m3, and takes seconds to import

    largest_S = (states_SD & _MAGNITUDE).max(axis=1, initial=0).astype(np.int64)
    codes_S = np.clip((largest_S + 0x1F) >> 7, *_FP8_SCALES)  # 0x1F: from 1.75 on one power more
    numbers_SD = np.empty(states_SD.shape, np.uint8)
    for part in _pieces(states_SD):
        values = bf16_to_float32(states_SD[part])
        np.ldexp(values, (_FP8_BIAS - codes_S[part, None]).astype(np.int32), out=values)
        rounded = torch.from_numpy(values).to(torch.float8_e4m3fn)
        numbers_SD[part] = rounded.view(torch.uint8).numpy()
    return [numbers_SD.reshape(-1), codes_S.astype(np.uint8)]


def decode_fp8(planes: Sequence[Plane], width: int) -> Bits:
    """Bit patterns [S, width], exact: exponents are added as integers."""
    numbers_SD, codes_S = planes[0].reshape(-1, width), planes[1].astype(np.int16)
    if len(codes_S) and not (_FP8_SCALES[0] <= codes_S.min() <= codes_S.max() <= _FP8_SCALES[1]):
        raise _wrong_scale(f"{codes_S.min()} to {codes_S.max()}", "16 to 254")
    # In place of bfloat16's exponent and mantissa an e4m3 number is 2^-120 times itself.
    exponent_S1 = ((codes_S[:, None] - _FP8_BIAS + 120) << 7).astype(np.uint16)
    # Not so below the smallest normal number, 8: those are multiples of 2^-9.
    small_S8 = np.ldexp(np.arange(8, dtype=np.float32), codes_S[:, None] - _FP8_BIAS - 9)
    small_S8 = small_S8.astype(np.float32).view(np.uint32) >> 16
    states_SD = np.empty(numbers_SD.shape, np.uint16)
    for part in _pieces(states_SD):
        numbers, bits = numbers_SD[part], states_SD[part]
        magnitudes = numbers & np.uint8(0x7F)
        np.left_shift(magnitudes, 4, out=bits, dtype=np.uint16)
        bits += exponent_S1[part]
        small = np.flatnonzero(magnitudes < 8)
        bits.reshape(-1)[small] = small_S8[part][small // width, magnitudes.reshape(-1)[small]]
        sign = (numbers & np.uint8(0x80)).astype(np.uint16)
        sign <<= 8
        bits |= sign
    return states_SD


def encode_int8(states_SD: Bits, scale: ChannelScale) -> list[Plane]:
    """Integers in [-127, 127] of standardised channels, and a bfloat16 scale in two planes.

    A state is rounded to 1/254 of the range of its own largest standardised number. Without the
    channels' units (`int8_scale`), one outlier channel would take all 8 bits.
    """
    integers_SD = np.empty(states_SD.shape, np.int8)
    bits_S = np.zeros(len(states_SD), np.uint16)
    for part in _pieces(states_SD):
        values = bf16_to_float32(states_SD[part])
        with np.errstate(over="ignore"):
            values -= scale.centre
            values /= scale.unit
        largest = np.abs(values).max(axis=1) / np.float32(127)
        rounded_up = _up_to_bf16(largest)
        if (rounded_up > _TOO_LARGE).any():
            raise NonFiniteTargets(
                "hidden states: found a number that is 2^127 times the deviation of its channel, "
                "which int8 cannot hold. Store them with --hidden-codec bf16."
            )
        bits_S[part] = rounded_up
        steps = bf16_to_float32(rounded_up)
        values /= np.where(steps > 0, steps, 1)[:, None]
        integers_SD[part] = np.rint(values, out=values)
    return [integers_SD.view(np.uint8).reshape(-1), *split_planes(bits_S, 2)]


def decode_int8(planes: Sequence[Plane], width: int, scale: ChannelScale) -> Bits:
    """Bit patterns [S, width] of centre + (integer * scale) * unit, each step in float32."""
    integers_SD = planes[0].view(np.int8).reshape(-1, width)
    scale_bits_S = join_planes(planes[1:], np.uint16)
    if (largest := scale_bits_S.max(initial=0)) > _TOO_LARGE:
        raise _wrong_scale(f"bits {largest:#06x}", "a number up to 2^127")
    steps_S1 = bf16_to_float32(scale_bits_S)[:, None]
    states_SD = np.empty(integers_SD.shape, np.uint16)
    with np.errstate(over="ignore", invalid="ignore"):
        for part in _pieces(states_SD):
            values = integers_SD[part] * steps_S1[part]
            values *= scale.unit
            values += scale.centre
            states_SD[part] = _to_bf16(values)
    return states_SD


def int8_scale(ordinary: "ChannelStatistics") -> ChannelScale:
    """Mean and deviation of each channel over states without the massive ones.

    The unit is a hundredth of the typical deviation where the channel's own is less: calibration
    may have seen a channel stand still that moves later. Where none moved all are 1.
    """
    std = ordinary.std
    typical = float(np.sqrt(np.mean(np.square(std))))
    unit = np.maximum(std, _MIN_RELATIVE_UNIT * typical) if typical > 0 else np.ones_like(std)
    return ChannelScale(ordinary.mean.astype(np.float32), unit.astype(np.float32))


def without_massive(states_SD: Bits) -> Bits:
    """The states that are at most 4 times as long as the median one.

    Many models make the first token's state a thousand times as long as the others, in one or two
    channels (Sun et al. 2024, Massive Activations in Large Language Models). In such a channel the
    deviation over all states says nothing about the ordinary ones: as their unit it would round
    them all to 0.
    """
    values = bf16_to_float32(states_SD).astype(np.float64)
    length_S = np.sqrt(np.einsum("sd,sd->s", values, values))
    limit = 4 * np.median(length_S) if len(length_S) else 0.0
    return states_SD[length_S <= limit]


def squared_errors(decoded_SD: Bits, states_SD: Bits) -> tuple[Doubles, Doubles]:
    """Sums over the channels of each state: of the squared error, and of its squares; [S] each."""
    error_S, square_S = np.empty(len(states_SD)), np.empty(len(states_SD))
    for part in _pieces(states_SD):
        values = bf16_to_float32(states_SD[part]).astype(np.float64)
        square_S[part] = np.einsum("sd,sd->s", values, values)
        values -= bf16_to_float32(decoded_SD[part])
        error_S[part] = np.einsum("sd,sd->s", values, values)
    return error_S, square_S


def bf16_to_float32(states: Bits) -> Floats:
    """Exact: bfloat16 is the upper half of a float32."""
    bits = states.astype(np.uint32)
    np.left_shift(bits, 16, out=bits)
    return bits.view(np.float32)


def _up_to_bf16(values: Floats) -> Bits:
    """The next bfloat16 that is not less, of numbers from 0 up."""
    return ((values.view(np.uint32).astype(np.uint64) + 0xFFFF) >> 16).astype(np.uint16)


def _to_bf16(values: Floats) -> Bits:
    """Rounded to the nearest, ties to even; overwrites `values`."""
    bits = values.view(np.uint32)
    odd = bits >> 16
    odd &= 1
    odd += 0x7FFF
    bits += odd
    bits >>= 16
    return bits.astype(np.uint16)


def _pieces(states_SD: np.ndarray) -> Iterator[slice]:
    count, width = states_SD.shape
    size = max(1, _PIECE // max(1, width))
    for start in range(0, count, size):
        yield slice(start, start + size)


def _wrong_scale(found: str, expected: str) -> CorruptCache:
    return CorruptCache(
        f"hidden: found a scale of {found}, expected {expected}. "
        "Run cache-teacher verify CACHE --drop-bad, then run again."
    )


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """Count, mean [D] and sum of squared deviations [D] of each channel, in float64."""

    count: int
    mean: Doubles
    squares: Doubles

    @classmethod
    def of(cls, states_PD: Bits) -> "ChannelStatistics":
        """The statistics of one batch; no position at all is fine."""
        count, width = states_PD.shape
        if count == 0:
            return cls(0, np.zeros(width), np.zeros(width))
        values_PD = bf16_to_float32(states_PD).astype(np.float64)
        mean = values_PD.mean(axis=0)
        values_PD -= mean
        return cls(count, mean, np.einsum("pd,pd->d", values_PD, values_PD))

    def merge(self, other: "ChannelStatistics") -> "ChannelStatistics":
        """The statistics of both together (Chan, Golub and LeVeque 1979)."""
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
