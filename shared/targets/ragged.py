"""Targets whose positions differ in their number of entries: what `adaptive` and `sample` share.

Shapes: P positions, E entries of all positions one after another, C classes.

Counts 1 to 255 entries of each position, one byte.
Ids    Ranks ascend within a position; the gaps between them are kept, as in `topk`.
Values One code of one or two bytes for each entry, on a scale that is the same for a whole cache.
"""

import threading
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from shared.arrays import Plane, join_planes, split_planes
from shared.errors import ConfigError
from shared.targets.base import Kind, TargetFields, TargetKind
from shared.targets.planes import (
    PlaneShape,
    beyond_classes,
    bits_per_rank,
    id_planes,
    named,
    no_class_left,
)
from shared.targets.record import ClassRanks, Floats, Target

MAX_ENTRIES = 255  # of one position: a byte counts them
LEVELS: dict[int, int] = {7: 127, 8: 255}  # M

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


def masses(weight_E: Floats, ends: npt.NDArray[np.intp], room_E: npt.NDArray[np.int64]) -> Floats:
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


def spread(values_P: Floats, ends: npt.NDArray[np.intp], room_E: npt.NDArray[np.int64]) -> Floats:
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
