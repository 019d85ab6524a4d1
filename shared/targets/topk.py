"""The kind `topk`: the K likeliest classes of every position, and what is left as one tail.

Shapes: P positions with a target, K entries, C classes.

Ids    A class is written as its rank, often kept classes first. Ranks ascend within a position, so
       only the gaps between them are kept, as byte planes.
Values q = rint(M sqrt(drop / range)): drop is nats below the likeliest entry, range the largest
       drop, rounded up to one of 256 steps. At 16 bits, drop itself in fp16.
Tail   ln(tail / kept mass), 16 bits. The decoder scales the entries so that they and the tail sum
       to 1, which is why the height of the likeliest entry need not be kept.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.arrays import Plane, join_planes, split_planes
from shared.targets.base import TargetFields, TargetKind
from shared.targets.fixed import RANGES, FixedKind, drops, half_codes, row_max
from shared.targets.planes import (
    LOG_KEPT,
    LOG_TAIL,
    NO_TAIL,
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

NO_CLASS = 255  # the code of an entry with probability 0
LEVELS: dict[int, int] = {7: 127, 8: 254}  # M: codes 0..M


class TopK(FixedKind):
    """The likeliest classes, the same number at every position."""

    truncated = True
    reads = frozenset({"top_k", "value_bits"})

    def text(self, name: TargetKind, spec: TargetFields) -> str:
        return f"{name} {self.num_entries(spec)}"

    def plane_shapes(self, spec: TargetFields) -> Sequence[PlaneShape]:
        entries, halved = self.num_entries(spec), spec.value_bits == 16
        ids = [f"target_ids.{plane}" for plane in range(id_planes(spec.num_classes))]
        codes = [f"target_codes.{plane}" for plane in range(2 if halved else 1)]
        ranges = [] if halved else ["target_range.0"]
        return [
            *(PlaneShape(name, "position", entries) for name in (*ids, *codes)),
            *(
                PlaneShape(name, "position", 1)
                for name in (*ranges, "target_tail.0", "target_tail.1")
            ),
        ]

    def encode(self, kept: Target, spec: TargetFields, ranks: ClassRanks) -> dict[str, Plane]:
        """Every plane of plane_shapes.

        Rounding moves a drop by at most R (sqrt(drop / R) / M + 1 / 4 M**2), R the coded range, at
        16 bits by 2**-11 of itself, and ln(tail / kept mass) by 2.4e-4 inside its limits. An entry
        of -inf says that no class with probability was left out, so the tail of its position is 0,
        as it is where every class is kept.
        """
        hi_P, drop_PK, missing_PK = drops(kept, spec, self.num_entries(spec))
        log_ratio_P = kept.log_tail - hi_P - np.log(np.einsum("pk->p", np.exp(-drop_PK)))
        tail_P = tail_codes(log_ratio_P, kept.log_tail)
        tail_P[np.nonzero(missing_PK)[0]] = NO_TAIL
        if self.complete(spec):
            tail_P[:] = NO_TAIL
        planes = named("target_tail", split_planes(tail_P, 2))
        code_PK: npt.NDArray[Any]
        if spec.value_bits == 16:
            code_PK = half_codes(drop_PK)
        else:
            code_PK, planes["target_range.0"] = _curve_codes(drop_PK, LEVELS[spec.value_bits])
        gap_PK, code_PK = _sort_by_rank(kept.ids, code_PK, ranks)
        planes |= named("target_ids", split_planes(gap_PK, id_planes(spec.num_classes)))
        planes |= named("target_codes", split_planes(code_PK, code_PK.itemsize))
        return {shape.name: planes[shape.name].reshape(-1) for shape in self.plane_shapes(spec)}

    def room_for_ids(self, shape: tuple[int, int]) -> npt.NDArray[np.int32]:
        return np.empty(shape, np.int32)

    def decode_part(
        self, planes: Mapping[str, Plane], spec: TargetFields, ranks: ClassRanks, *, out: Target
    ) -> None:
        """Log-probabilities come first: the room of the ids then serves for their exponentials.

        Large new arrays are worth avoiding: allocators return such memory to the system, and to get
        it back, page by page, can take longer than all that is calculated here.
        """
        tail_P = join_planes([planes["target_tail.0"], planes["target_tail.1"]], np.uint16)
        out.log_tail[:] = LOG_TAIL.take(tail_P)
        _decode_drops(planes, spec, out_PK=out.logprobs)
        weight_PK = np.exp(out.logprobs, out=out.ids.view(np.float32))
        weight_P = np.einsum("pk->p", weight_PK)  # no BLAS: it would start threads
        if not weight_P.all():
            raise no_class_left("target_codes")
        out.logprobs += (LOG_KEPT.take(tail_P) - np.log(weight_P))[:, None]
        ids = [planes[f"target_ids.{plane}"] for plane in range(id_planes(spec.num_classes))]
        _decode_ids(ids, ranks, out_PK=out.ids)


def _sort_by_rank(
    ids_PK: npt.NDArray[np.int32], code_PK: npt.NDArray[Any], ranks: ClassRanks
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Gaps between ascending ranks [P, K] and the codes in that order, by one integer sort."""
    code_bits = 8 * code_PK.itemsize
    rank_bits = bits_per_rank(ranks.ranks.size)
    key_type = np.uint32 if rank_bits + code_bits <= 32 else np.uint64
    key_PK: npt.NDArray[Any] = np.take(ranks.ranks, ids_PK, mode="clip").astype(
        key_type, copy=False
    )
    key_PK <<= code_bits
    key_PK |= code_PK
    key_PK.sort(axis=1)
    sorted_code_PK = key_PK.astype(code_PK.dtype)  # the low bits
    key_PK >>= code_bits
    gap_PK = np.empty_like(key_PK)
    np.subtract(key_PK.reshape(-1)[1:], key_PK.reshape(-1)[:-1], out=gap_PK.reshape(-1)[1:])
    gap_PK[:, 0] = key_PK[:, 0]
    if not gap_PK[:, 1:].all():
        raise ValueError("target: a class appears twice in one position")
    return gap_PK, sorted_code_PK


def _curve_codes(drop_PK: Floats, levels: int) -> tuple[Plane, Plane]:
    """Codes [P, K] and range codes [P]; the curve is fine where the drop is small."""
    missing_PK = np.isinf(drop_PK)
    if missing_PK.any():
        drop_PK = np.where(missing_PK, 0, drop_PK)
    range_P = np.searchsorted(RANGES, row_max(drop_PK)).astype(np.uint8)
    scale_P = levels**2 / np.maximum(RANGES[range_P], RANGES[1])
    root_PK = np.sqrt(drop_PK * scale_P[:, None])
    code_PK = np.rint(root_PK, out=root_PK).astype(np.uint8)
    code_PK[missing_PK] = NO_CLASS
    return code_PK, range_P


def _curve_values(code_PK: Plane, range_P: Floats, levels: int, *, out_PK: Floats) -> None:
    """Minus the drop [P, K]."""
    out_PK[:] = code_PK
    np.multiply(out_PK, out_PK, out=out_PK)
    np.multiply(out_PK, (range_P * np.float32(-1 / levels**2))[:, None], out=out_PK)
    if code_PK.max(initial=0) == NO_CLASS:
        out_PK[code_PK == NO_CLASS] = -np.inf


def _decode_drops(planes: Mapping[str, Plane], spec: TargetFields, *, out_PK: Floats) -> None:
    """Minus the drop [P, K]."""
    code_PK = planes["target_codes.0"].reshape(out_PK.shape)
    if spec.value_bits == 16:
        high_PK = planes["target_codes.1"].reshape(out_PK.shape)
        np.negative(halves([code_PK, high_PK]), out=out_PK)
    else:
        range_P = RANGES.take(planes["target_range.0"])
        _curve_values(code_PK, range_P, LEVELS[spec.value_bits], out_PK=out_PK)


def _decode_ids(
    planes: Sequence[Plane], ranks: ClassRanks, *, out_PK: npt.NDArray[np.int32]
) -> None:
    """Ranks are sums of gaps within a position, and ids are the classes at these ranks.

    One sum runs over all positions: summing each alone takes half as long again. So the first gap
    of a position also takes back the rank at which the position before it ended.
    """
    shaped = [plane.reshape(out_PK.shape) for plane in planes]
    join_planes(shaped, np.uint32, out=out_PK.view(np.uint32))  # the gaps, for now
    last_P = np.einsum("pk->p", out_PK)
    largest = int(last_P.max(initial=0))
    if largest >= ranks.classes.size or last_P.min(initial=0) < 0:
        raise beyond_classes(largest, ranks.classes.size)
    out_PK[1:, 0] -= last_P[:-1]
    rank_PK = np.cumsum(out_PK, dtype=np.intp).reshape(out_PK.shape)
    # All ranks are in range; of the modes with `out`, "wrap" is faster than "clip" by a third.
    np.take(ranks.classes.view(np.int32), rank_PK, mode="wrap", out=out_PK)
