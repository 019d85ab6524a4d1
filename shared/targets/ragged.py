"""Targets whose positions differ in their number of entries: `adaptive`, `sample`, their base.

Shapes: P positions, E entries of all positions one after another, C classes.

Counts 1 to 255 entries of each position, one byte.
Ids    Ranks ascend within a position; the gaps between them are kept, as in `topk`.
Values One code of one or two bytes for each entry, q = rint(M sqrt(drop / R)) with drop = -ln p, on
       a scale that is the same for a whole cache. At 16 bits, drop in fp16.

adaptive  R is -ln threshold. The decoder scales entries and tail to a sum of 1.
          Tail: ln(tail / kept mass), 16 bits, as in `topk`.
sample    R is RANGE_BEYOND nats more than -ln threshold, so that the largest class is kept as it is
          in flat positions too. Code 0 means drawn: its weight is the threshold. A kept entry has
          the code 1 + q, with M - 1 in the place of M. 65,535 at 16 bits: drawn. There is no tail.
          Probabilities are rounded to one of the two nearest codes at random, so that their mean is
          exact: nearest rounding would be a bias that no number of draws averages out.
"""

import math
import threading
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from shared.arrays import Plane, join_planes, mixed_bits, split_planes
from shared.errors import ConfigError
from shared.targets.base import Kind, TargetFields, TargetKind
from shared.targets.planes import (
    DRAWN_HALF,
    LOG_KEPT,
    LOG_TAIL,
    PlaneShape,
    beyond_classes,
    bits_per_rank,
    halves,
    id_planes,
    named,
    no_class_left,
    tail_codes,
)
from shared.targets.record import ClassRanks, Floats, Target

MAX_ENTRIES = 255  # of one position: a byte counts them
LEVELS: dict[int, int] = {7: 127, 8: 255}  # M
MIN_SPACING = 1 / 254  # of a sample; a smaller one could draw more than MAX_ENTRIES
RANGE_BEYOND = 3.0  # nats below the spacing that the largest class of a sample may be
DRAWN = {7: 0, 8: 0, 16: DRAWN_HALF}  # code of a drawn entry

# What a weight of 1 is summed up as, in int64: 255 of them fit, and float32 weights of 2**-30 or
# more, as every class has that is kept, are whole numbers.
WEIGHT_ONE = 2.0**54

Integer = TypeVar("Integer", np.int64, np.uint32)


class RaggedKind(Kind[Target]):
    """Each position has the entries it needs, `mean_entries` on average."""

    ragged = True
    lowest_threshold = 1e-9
    reads = frozenset({"mean_entries", "value_bits"})

    def check(self, spec: TargetFields) -> None:
        lowest = self.lowest_threshold
        if spec.threshold and not lowest <= spec.threshold < 1:
            raise ConfigError(f"threshold={spec.threshold}: expected {lowest:.6f} to 1.")
        if not 1 <= spec.mean_entries <= MAX_ENTRIES:
            raise ConfigError(f"mean_entries={spec.mean_entries}: expected 1 to {MAX_ENTRIES}.")

    def text(self, name: TargetKind, spec: TargetFields) -> str:
        return f"{name} {spec.mean_entries:g}"

    def plane_shapes(self, spec: TargetFields) -> Sequence[PlaneShape]:
        """Every plane, counts first: they say how long the others are."""
        codes = range(2 if spec.value_bits == 16 else 1)
        ids = range(id_planes(spec.num_classes))
        return [
            PlaneShape("target_counts.0", "position", 1),
            *(PlaneShape(f"target_ids.{n}", "entry", 1) for n in ids),
            *(PlaneShape(f"target_codes.{n}", "entry", 1) for n in codes),
        ]

    def encode(self, kept: Target, spec: TargetFields, ranks: ClassRanks) -> dict[str, Plane]:
        """Every plane of plane_shapes."""
        _check(kept, spec)
        assert kept.counts is not None  # _check
        starts = np.cumsum(kept.counts) - kept.counts
        code_E = self.codes(kept, spec)
        planes = {"target_counts.0": kept.counts.astype(np.uint8), **self.tails(kept, starts)}
        gap_E, code_E = _sort_by_rank(kept.ids, code_E, kept.counts, starts, ranks)
        planes |= named("target_ids", split_planes(gap_E, id_planes(spec.num_classes)))
        planes |= named("target_codes", split_planes(code_E, code_E.itemsize))
        return {shape.name: planes[shape.name] for shape in self.plane_shapes(spec)}

    def decode(
        self, planes: Mapping[str, Plane], num_positions: int, spec: TargetFields, ranks: ClassRanks
    ) -> Target:
        """The room of the ids first serves for exponentials, as in `topk`."""
        counts = planes["target_counts.0"].astype(np.int32)
        if not counts.all():
            raise no_class_left("target_counts")
        ends = np.add.accumulate(counts, dtype=np.intp)
        logprobs = self.logprobs(planes, spec)
        ids = np.empty(logprobs.size, np.int32)
        log_tail = np.full(len(counts), -np.inf, np.float32)
        if len(counts):
            room_E = _rooms.of(logprobs.size)
            self.scale(planes, logprobs, ends, (ids.view(np.float32), room_E), out_P=log_tail)
            gaps = [planes[f"target_ids.{n}"] for n in range(id_planes(spec.num_classes))]
            _decode_ids(gaps, ends, ranks, room_E, out_E=ids)
        return Target(ids, logprobs, log_tail, counts)

    @abstractmethod
    def codes(self, target: Target, spec: TargetFields) -> npt.NDArray[Any]:
        """The code of each entry, u8 or u16 [E]."""

    @abstractmethod
    def logprobs(self, planes: Mapping[str, Plane], spec: TargetFields) -> Floats:
        """What the code of each entry stands for, nats [E]."""

    def tails(self, target: Target, starts: npt.NDArray[np.intp]) -> dict[str, Plane]:
        """The planes of what is left of each position, where a kind keeps that."""
        return {}

    def scale(
        self,
        planes: Mapping[str, Plane],
        logprobs: Floats,
        ends: npt.NDArray[np.intp],
        rooms_E: tuple[Floats, npt.NDArray[np.int64]],
        *,
        out_P: Floats,
    ) -> None:
        """Makes entries and tail sum to 1, where a kind keeps a tail: `logprobs` in place, ln of
        the tail into `out_P`. `rooms_E` may be written to."""


class Adaptive(RaggedKind):
    """As many of the likeliest classes as reach the threshold, the likeliest always."""

    truncated = True

    def plane_shapes(self, spec: TargetFields) -> Sequence[PlaneShape]:
        tails = (PlaneShape(f"target_tail.{n}", "position", 1) for n in range(2))
        return [*super().plane_shapes(spec), *tails]

    def codes(self, target: Target, spec: TargetFields) -> npt.NDArray[Any]:
        if spec.value_bits == 16:
            return (-target.logprobs).clip(0).astype(np.float16).view(np.uint16)
        M = LEVELS[spec.value_bits]
        root_E = np.sqrt(target.logprobs.clip(max=0) * np.float32(-(M**2) / adaptive_range(spec)))
        return np.rint(root_E).clip(0, M).astype(np.uint8)

    def tails(self, target: Target, starts: npt.NDArray[np.intp]) -> dict[str, Plane]:
        log_kept_P = np.log(np.add.reduceat(np.exp(target.logprobs, dtype=np.float64), starts))
        tail_P = tail_codes(target.log_tail - log_kept_P, target.log_tail)
        return named("target_tail", split_planes(tail_P, 2))

    def logprobs(self, planes: Mapping[str, Plane], spec: TargetFields) -> Floats:
        code_E = planes["target_codes.0"]
        if spec.value_bits == 16:
            drop_E = halves([code_E, planes["target_codes.1"]])
            return -drop_E.astype(np.float32)
        logprobs = code_E.astype(np.float32)  # in a third of the time of looking up
        logprobs *= logprobs
        logprobs *= np.float32(-adaptive_range(spec) / LEVELS[spec.value_bits] ** 2)
        return logprobs

    def scale(
        self,
        planes: Mapping[str, Plane],
        logprobs: Floats,
        ends: npt.NDArray[np.intp],
        rooms_E: tuple[Floats, npt.NDArray[np.int64]],
        *,
        out_P: Floats,
    ) -> None:
        tail_P = join_planes([planes["target_tail.0"], planes["target_tail.1"]], np.uint16)
        out_P[:] = LOG_TAIL.take(tail_P)
        weight_E = np.exp(logprobs, out=rooms_E[0])
        shift_P = LOG_KEPT.take(tail_P) - np.log(_masses(weight_E, ends, rooms_E[1]))
        logprobs += _spread(shift_P, ends, rooms_E[1])


def adaptive_range(spec: TargetFields) -> float:
    """R of `adaptive`, nats."""
    return -math.log(spec.threshold)


class Sample(RaggedKind):
    """Entries are weights, whose sums are right on average."""

    sampled = True
    lowest_threshold = MIN_SPACING

    def check(self, spec: TargetFields) -> None:
        if spec.temperatures:
            raise ConfigError(
                f"temperatures={spec.temperatures}: a sample of p says nothing of p^(1/T). Use "
                "--targets topk or adaptive where another temperature is wanted."
            )
        super().check(spec)

    def codes(self, target: Target, spec: TargetFields) -> npt.NDArray[Any]:
        """Codes of the mean p: between two codes, each with the probability that its distance
        gives. A logprob equal to `drawn_logprob` is a drawn entry."""
        if target.random_bits is None:
            raise ValueError("target: a sample is rounded at random and needs random_bits")
        assert target.counts is not None  # `encode` has checked it
        drop_E = -target.logprobs.clip(max=0).astype(np.float64)
        first_E = _first_half(drop_E) if spec.value_bits == 16 else _first_code(drop_E, spec)
        second_E = first_E + first_E.dtype.type(1)
        high_E, low_E = (_weights(code_E, spec) for code_E in (first_E, second_E))
        bits_E = mixed_bits(
            np.repeat(target.random_bits, target.counts), target.ids.astype(np.uint64)
        )
        share_E = (bits_E >> np.uint64(11)) * 2.0**-53
        takes_second_E = share_E * (high_E - low_E) >= np.exp(-drop_E) - low_E
        code_E = np.where(takes_second_E, second_E, first_E)
        code_E[target.logprobs == drawn_logprob(spec)] = DRAWN[spec.value_bits]
        return code_E

    def logprobs(self, planes: Mapping[str, Plane], spec: TargetFields) -> Floats:
        code_E = planes["target_codes.0"]
        if spec.value_bits != 16:
            return _table(spec).take(code_E)
        drop_E = halves([code_E, planes["target_codes.1"]], drawn=True)
        logprobs = -drop_E.astype(np.float32)
        logprobs[np.isnan(logprobs)] = drawn_logprob(spec)
        return logprobs


def sample_range(spec: TargetFields) -> float:
    """R of `sample`, nats."""
    return RANGE_BEYOND - math.log(spec.threshold)


def drawn_logprob(spec: TargetFields) -> np.float32:
    """What stands for a drawn entry: ln of its weight."""
    return np.float32(math.log(spec.threshold))


def _first_code(drop_E: npt.NDArray[np.float64], spec: TargetFields) -> npt.NDArray[np.uint8]:
    """The last code of 1..M - 1 whose drop is not larger."""
    M = LEVELS[spec.value_bits]
    place_E = np.floor(np.sqrt(drop_E / sample_range(spec)) * (M - 1))
    return (1 + place_E.clip(0, M - 2)).astype(np.uint8)


def _first_half(drop_E: npt.NDArray[np.float64]) -> npt.NDArray[np.uint16]:
    """The bits of the largest IEEE half that is not larger; those of the next one are 1 more."""
    half_E = drop_E.astype(np.float16)
    return half_E.view(np.uint16) - (half_E > drop_E).astype(np.uint16)


def _weights(code_E: npt.NDArray[Any], spec: TargetFields) -> npt.NDArray[np.float64]:
    """What kept entries of these codes are read as, float64."""
    if spec.value_bits == 16:
        return np.exp(-code_E.view(np.float16).astype(np.float64))
    return np.exp(_table(spec).astype(np.float64)).take(code_E)


@lru_cache(maxsize=64)
def _table(spec: TargetFields) -> Floats:
    """ln of the weight of each code; f32 [256]."""
    M, R = LEVELS[spec.value_bits], sample_range(spec)
    table = -R * ((np.arange(256) - 1) / (M - 1)) ** 2
    table[0] = drawn_logprob(spec)
    return table.astype(np.float32)


# ---- What both are made of


def _check(target: Target, spec: TargetFields) -> None:
    """What a caller can get wrong and no decoder could notice."""
    counts, ids, logprobs = target.counts, target.ids, target.logprobs
    if counts is None or not ids.shape == logprobs.shape == (counts.sum(),):
        raise ValueError(f"target: ids {ids.shape}, logprobs {logprobs.shape}, expected [entries]")
    if counts.min(initial=1) < 1 or counts.max(initial=1) > MAX_ENTRIES:
        raise ValueError(f"target: found {counts.min()} to {counts.max()} entries, expected 1..255")
    if ids.min(initial=0) < 0 or ids.max(initial=0) >= spec.num_classes:
        raise ValueError(f"target: ids beyond the {spec.num_classes} classes")
    if not np.isfinite(logprobs).all() or np.isnan(target.log_tail).any():
        raise ValueError("target: NaN, or an entry with probability 0")


def _sort_by_rank(
    ids: npt.NDArray[np.int32],
    code_E: npt.NDArray[Any],
    counts: npt.NDArray[np.int32],
    starts: npt.NDArray[np.intp],
    ranks: ClassRanks,
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Gaps between the ascending ranks of each position, and the codes in that order."""
    code_bits = np.uint64(8 * code_E.itemsize)
    rank_bits = np.uint64(bits_per_rank(ranks.ranks.size))
    key_E = np.repeat(np.arange(len(counts), dtype=np.uint64), counts) << rank_bits
    key_E = (key_E | ranks.ranks[ids]) << code_bits | code_E
    key_E.sort()
    sorted_code_E = key_E.astype(code_E.dtype)  # the low bits
    rank_E = (key_E >> code_bits & np.uint64((1 << int(rank_bits)) - 1)).astype(np.int64)
    gap_E = np.diff(rank_E, prepend=np.int64(0))
    gap_E[starts] = rank_E[starts]
    gap_E[starts] += 1  # so that 0 is a class that appears twice, here and below
    if not gap_E.all():
        raise ValueError("target: a class appears twice in one position")
    gap_E[starts] -= 1
    return gap_E.astype(np.uint32), sorted_code_E


class _Rooms(threading.local):
    """Room for a number of each entry, kept by each thread from one block to the next.

    Fresh memory would have to be had from the system, page by page, wherever the allocator gives
    back what is free: that takes as long as all of the decoding.
    """

    def __init__(self) -> None:
        self._largest = np.empty(0, np.int64)

    def of(self, entries: int) -> npt.NDArray[np.int64]:
        """[E], with anything in it."""
        if self._largest.size < entries:
            self._largest = np.empty(entries, np.int64)
        return self._largest[:entries]


_rooms = _Rooms()


def _masses(weight_E: Floats, ends: npt.NDArray[np.intp], room_E: npt.NDArray[np.int64]) -> Floats:
    """Sums of the weights, at most 1 each, of each position [P], exact but for one rounding."""
    np.multiply(weight_E, np.float32(WEIGHT_ONE), out=room_E, casting="unsafe")
    mass_P = _sums(room_E, ends, out_E=room_E)
    if not mass_P.all():
        raise no_class_left("target_codes")
    return mass_P.astype(np.float32) * np.float32(1 / WEIGHT_ONE)


def _sums(
    values_E: npt.NDArray[Integer], ends: npt.NDArray[np.intp], *, out_E: npt.NDArray[Integer]
) -> npt.NDArray[Integer]:
    """Sums of each position [P]: what a running sum, left in `out_E`, gains from end to end.

    Integers that wrap around on the way come back. Half of the time of np.add.reduceat, which
    starts anew at each position.
    """
    total_P = np.add.accumulate(values_E, out=out_E).take(ends - 1)
    sum_P = total_P.copy()
    sum_P[1:] -= total_P[:-1]
    return sum_P


def _spread(values_P: Floats, ends: npt.NDArray[np.intp], room_E: npt.NDArray[np.int64]) -> Floats:
    """Each value at every entry of its position, in `room_E`; as np.repeat, but faster.

    The bits are summed up, as integers, so they arrive as they are.
    """
    bits_P, bits_E = values_P.view(np.int32), room_E.view(np.int32)[: room_E.size]
    bits_E.fill(0)
    bits_E[0] = bits_P[0]
    bits_E[ends[:-1]] = bits_P[1:] - bits_P[:-1]
    return np.add.accumulate(bits_E, out=bits_E).view(np.float32)


def _decode_ids(
    planes: Sequence[Plane],
    ends: npt.NDArray[np.intp],
    ranks: ClassRanks,
    room_E: npt.NDArray[np.int64],
    *,
    out_E: npt.NDArray[np.int32],
) -> None:
    """As in `topk`: one sum over all positions, where a first gap takes back what was before."""
    gap_E = out_E.view(np.uint32)
    join_planes(planes, np.uint32, out=gap_E)
    last_P = _sums(gap_E, ends, out_E=room_E.view(np.uint32)[: room_E.size])
    largest = int(last_P.max())
    if largest >= ranks.classes.size:
        raise beyond_classes(largest, ranks.classes.size)
    gap_E[ends[:-1]] -= last_P[:-1]
    room_E[:] = out_E  # signed; a sum of another type than what is summed would make a copy
    np.add.accumulate(room_E, out=room_E)
    # All ranks are in range; of the modes with `out`, "wrap" is faster than "clip" by a third.
    ranks.classes.view(np.int32).take(room_E, mode="wrap", out=out_E)
