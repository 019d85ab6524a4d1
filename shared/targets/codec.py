"""Target <-> byte planes: which classes a teacher kept, how likely they were, and what is left.

Shapes: P positions with a target, K entries, C classes. Planes are flat uint8 arrays, as
`frames.compress` takes them and `frames.decompress` gives them.

Ids    A class is written as its rank, often kept classes first. Ranks ascend within a position, so
       only the gaps between them are kept, as byte planes.
Values q = rint(M sqrt(drop / range)): drop is nats below the likeliest entry, range the largest
       drop, rounded up to one of 256 steps. At 16 bits, drop itself in fp16.
Tail   ln(tail / kept mass), 16 bits. The decoder scales the entries so that they and the tail sum
       to 1, which is why the height of the likeliest entry need not be kept.

Every plane is position-major. Slot-major is 2 % smaller where no set of ids ever returns, but 10 %
larger where some do, and a third slower to decode.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.arrays import Plane, join_planes, split_planes
from shared.errors import CorruptCache
from shared.targets import ragged
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
from shared.targets.spec import ClassRanks, Floats, Target, TargetSpec

NO_CLASS = 255  # the code of an entry with probability 0
# Decoded in one go. Twice as many are 5 % faster where the allocator keeps memory, and half as fast
# where it gives it back to the system and has to get it anew.
_DECODED_ENTRIES = 1 << 16
LEVELS: dict[int, int] = {7: 127, 8: 254}  # M: codes 0..M

# Ranges 0 and 1/16 nat * 2**(b/16), b = 1..255: up to 3,922 nats, each 4.4 % above the one before.
# fp16 hi and lo cost 2.5 bytes a position more, and lower KL by 2-4 %: scaling replaces hi anyway.
RANGES: Floats = np.concatenate([[0.0], 2.0 ** (np.arange(1, 256) / 16 - 4)]).astype(np.float32)


def plane_shapes(spec: TargetSpec) -> list[PlaneShape]:
    """Every plane of the targets, in the order of the columns."""
    if spec.kind == "none":
        return []
    if spec.ragged:
        return ragged.plane_shapes(spec)
    if spec.kind == "values":
        return [PlaneShape(f"target_values.{plane}", "position", 1) for plane in range(4)]
    entries = spec.num_entries
    if spec.kind == "dense":
        return [PlaneShape(f"target_codes.{plane}", "position", entries) for plane in range(2)]
    ids = [f"target_ids.{plane}" for plane in range(id_planes(spec.num_classes))]
    codes = ["target_codes.0", "target_codes.1"] if spec.value_bits == 16 else ["target_codes.0"]
    each = ["target_tail.0", "target_tail.1"]
    if spec.value_bits != 16:
        each.insert(0, "target_range.0")
    return [
        *(PlaneShape(name, "position", entries) for name in (*ids, *codes)),
        *(PlaneShape(name, "position", 1) for name in each),
    ]


def encode(target: Target, spec: TargetSpec, ranks: ClassRanks) -> dict[str, Plane]:
    """Every plane of plane_shapes.

    Rounding moves a drop by at most R (sqrt(drop / R) / M + 1 / 4 M**2), R the coded range, at 16
    bits by 2**-11 of itself, and ln(tail / kept mass) by 2.4e-4 inside its limits. An entry of -inf
    says that no class with probability was left out, so the tail of its position is 0, as it is
    where every class is kept. An entry 3,922 nats below the likeliest counts as -inf.
    """
    if spec.ragged:
        return ragged.encode(target, spec, ranks)
    hi_P = _row_max(target.logprobs)
    _check(target, spec, hi_P)
    drop_PK = hi_P[:, None] - target.logprobs
    missing_PK = drop_PK > RANGES[-1]
    drop_PK[missing_PK] = np.inf
    if spec.kind == "dense":
        return named("target_codes", [p.reshape(-1) for p in split_planes(_halves(drop_PK), 2)])
    log_ratio_P = target.log_tail - hi_P - np.log(np.einsum("pk->p", np.exp(-drop_PK)))
    tail_P = tail_codes(log_ratio_P, target.log_tail)
    tail_P[np.nonzero(missing_PK)[0]] = NO_TAIL
    if spec.complete:
        tail_P[:] = NO_TAIL
    planes = named("target_tail", split_planes(tail_P, 2))
    code_PK: npt.NDArray[Any]
    if spec.value_bits == 16:
        code_PK = _halves(drop_PK)
    else:
        code_PK, planes["target_range.0"] = _curve_codes(drop_PK, LEVELS[spec.value_bits])
    gap_PK, code_PK = _sort_by_rank(target.ids, code_PK, ranks)
    planes |= named("target_ids", split_planes(gap_PK, id_planes(spec.num_classes)))
    planes |= named("target_codes", split_planes(code_PK, code_PK.itemsize))
    return {shape.name: planes[shape.name].reshape(-1) for shape in plane_shapes(spec)}


def decode(
    planes: Mapping[str, Plane], num_positions: int, spec: TargetSpec, ranks: ClassRanks
) -> Target:
    """The target, scaled at T = 1 so that entries and tail sum to 1 in float32 (within 2e-6).

    The weights of a sample are as they were drawn. `ids` of a dense target may not be written to.
    """
    if spec.ragged:
        return ragged.decode(planes, spec, ranks)
    shape = (num_positions, spec.num_entries)
    dense = spec.kind == "dense"
    every_class = np.arange(spec.num_entries, dtype=np.int32)
    target = Target(
        ids=np.broadcast_to(every_class, shape) if dense else np.empty(shape, np.int32),
        logprobs=np.empty(shape, np.float32),
        log_tail=np.full(num_positions, -np.inf, np.float32),
    )
    shapes = plane_shapes(spec)
    step = max(1, _DECODED_ENTRIES // spec.num_entries)
    for start in range(0, num_positions, step):
        some = slice(start, start + step)
        part = {
            shape.name: planes[shape.name][
                start * shape.item_bytes : (start + step) * shape.item_bytes
            ]
            for shape in shapes
        }
        if dense:
            _decode_dense(part, out_PK=target.logprobs[some])
        else:
            room = Target(target.ids[some], target.logprobs[some], target.log_tail[some])
            _decode_part(part, spec, ranks, out=room)
    return target


def encode_entropy(entropy_P: Floats, num_classes: int) -> Plane:
    """One byte over [0, ln C] nats: at most ln C / 510 off, 0.023 at 151,936 classes."""
    return np.rint(entropy_P * (255 / math.log(num_classes))).clip(0, 255).astype(np.uint8)


def decode_entropy(plane_P: Plane, num_classes: int) -> Floats:
    """Nats [P]."""
    return plane_P * np.float32(math.log(num_classes) / 255)


def encode_log_partition_ratio(
    ratio_P: Floats, temperature: float, num_classes: int
) -> list[Plane]:
    """logsumexp(lp / T) over all classes in two planes over [0, (1 - 1/T) ln C], 65,535 steps."""
    step = (1 - 1 / temperature) * math.log(num_classes) / 65_535
    return split_planes(np.rint(ratio_P / step).clip(0, 65_535).astype(np.uint16), 2)


def decode_log_partition_ratio(
    planes: Sequence[Plane], temperature: float, num_classes: int
) -> Floats:
    """Nats [P]; below 0 where T < 1."""
    step = (1 - 1 / temperature) * math.log(num_classes) / 65_535
    return join_planes(planes, np.uint16) * np.float32(step)


def encode_label_logprob(logprob_P: Floats) -> list[Plane]:
    """The hard label's log-probability at T = 1 as fp16, two planes; below -65,504 it is -inf."""
    with np.errstate(over="ignore"):
        return split_planes(logprob_P.astype(np.float16).view(np.uint16), 2)


def decode_label_logprob(planes: Sequence[Plane]) -> Floats:
    """Nats [P]."""
    return join_planes(planes, np.uint16).view(np.float16).astype(np.float32)


def encode_values(values_P: Floats) -> list[Plane]:
    """Numbers as float32, four planes: exact."""
    return split_planes(np.ascontiguousarray(values_P, np.float32).view(np.uint32), 4)


def decode_values(planes: Sequence[Plane], column: str) -> Floats:
    """Float32 [P]; NaN and infinity are refused."""
    values_P = join_planes(planes, np.uint32).view(np.float32)
    if not np.isfinite(values_P).all():
        raise CorruptCache(
            f"{column}: found NaN or infinity, expected a number. "
            "Run cache-teacher verify CACHE --drop-bad, then run again."
        )
    return values_P


def _check(target: Target, spec: TargetSpec, hi_P: Floats) -> None:
    """What a caller can get wrong and no decoder could notice."""
    if target.ids.shape != target.logprobs.shape or target.ids.shape[1] != spec.num_entries:
        raise ValueError(
            f"target: ids {target.ids.shape} and logprobs {target.logprobs.shape}, "
            f"expected [positions, {spec.num_entries}]"
        )
    if target.ids.min(initial=0) < 0 or target.ids.max(initial=0) >= spec.num_classes:
        raise ValueError(f"target: ids beyond the {spec.num_classes} classes")
    bad_P = ~np.isfinite(hi_P) | np.isnan(target.log_tail)
    if bad_P.any():
        raise ValueError(f"target {bad_P.argmax()}: NaN, or no class with probability above 0")


def _row_max(values_PK: Floats) -> Floats:
    """As max(axis=1), in less than half its time; NaN where there is one."""
    return values_PK[np.arange(len(values_PK)), values_PK.argmax(axis=1)]


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


def _halves(drop_PK: Floats) -> npt.NDArray[np.uint16]:
    return drop_PK.astype(np.float16).view(np.uint16)


def _curve_codes(drop_PK: Floats, levels: int) -> tuple[Plane, Plane]:
    """Codes [P, K] and range codes [P]; the curve is fine where the drop is small."""
    missing_PK = np.isinf(drop_PK)
    if missing_PK.any():
        drop_PK = np.where(missing_PK, 0, drop_PK)
    range_P = np.searchsorted(RANGES, _row_max(drop_PK)).astype(np.uint8)
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


def _decode_part(
    planes: Mapping[str, Plane], spec: TargetSpec, ranks: ClassRanks, *, out: Target
) -> None:
    """Log-probabilities come first: the room of the ids then serves for their exponentials.

    Large new arrays are worth avoiding: allocators return such memory to the system, and to get it
    back, page by page, can take longer than all that is calculated here.
    """
    tail_P = join_planes([planes["target_tail.0"], planes["target_tail.1"]], np.uint16)
    out.log_tail[:] = LOG_TAIL.take(tail_P)
    _decode_drops(planes, spec, out_PK=out.logprobs)
    weight_PK = np.exp(out.logprobs, out=out.ids.view(np.float32))
    weight_P = np.einsum("pk->p", weight_PK)  # no BLAS: it would start threads
    if not weight_P.all():
        raise no_class_left("target_codes")
    out.logprobs += (LOG_KEPT.take(tail_P) - np.log(weight_P))[:, None]
    count = id_planes(spec.num_classes)
    _decode_ids([planes[f"target_ids.{plane}"] for plane in range(count)], ranks, out_PK=out.ids)


def _decode_dense(planes: Mapping[str, Plane], *, out_PK: Floats) -> None:
    both = [planes[f"target_codes.{n}"].reshape(out_PK.shape) for n in range(2)]
    np.negative(halves(both), out=out_PK)
    weight_P = np.exp(out_PK).sum(axis=1)
    if not weight_P.all():
        raise no_class_left("target_codes")
    out_PK -= np.log(weight_P)[:, None]


def _decode_drops(planes: Mapping[str, Plane], spec: TargetSpec, *, out_PK: Floats) -> None:
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
