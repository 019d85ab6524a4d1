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
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from shared.errors import ConfigError, CorruptCache
from shared.frames import Plane, join_planes, split_planes

Floats: TypeAlias = npt.NDArray[np.float32]

TargetKind = Literal["topk", "adaptive", "sample", "dense", "none"]
BUILT_KINDS: tuple[TargetKind, ...] = ("topk", "none")
ValueBits = Literal[7, 8, 16]

NO_CLASS = 255  # the code of an entry with probability 0
# Decoded in one go. Twice as many are 5 % faster where the allocator keeps memory, and half as fast
# where it gives it back to the system and has to get it anew.
_DECODED_ENTRIES = 1 << 16
LEVELS: dict[int, int] = {7: 127, 8: 254}  # M: codes 0..M

# Ranges 0 and 1/16 nat * 2**(b/16), b = 1..255: up to 3,922 nats, each 4.4 % above the one before.
# fp16 hi and lo cost 2.5 bytes a position more, and lower KL by 2-4 %: scaling replaces hi anyway.
RANGES: Floats = np.concatenate([[0.0], 2.0 ** (np.arange(1, 256) / 16 - 4)]).astype(np.float32)

TAIL_MIN, TAIL_MAX = -14.0, 17.0  # ln(tail / kept); kept >= K / C, so 17 holds any C below 2**24
TAIL_STEPS = 65_534
NO_TAIL = 65_535  # nothing is left: the tail is exactly 0
_RATIOS = np.append(np.linspace(TAIL_MIN, TAIL_MAX, TAIL_STEPS + 1), -np.inf)
LOG_KEPT: Floats = (-np.logaddexp(0, _RATIOS)).astype(np.float32)  # of each code
LOG_TAIL: Floats = (-np.logaddexp(0, -_RATIOS)).astype(np.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetSpec:
    """What a cache keeps of each target; part of the manifest."""

    kind: TargetKind
    num_classes: int
    top_k: int = 32
    value_bits: ValueBits = 7
    temperatures: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in BUILT_KINDS:
            raise ConfigError(f"targets={self.kind}: this version writes {', '.join(BUILT_KINDS)}.")
        if not 2 <= self.num_classes < 2**31:
            raise ConfigError(f"num_classes={self.num_classes}: expected 2 to 2**31 - 1.")
        if self.top_k < 1:
            raise ConfigError(f"top_k={self.top_k}: expected at least 1.")
        if self.value_bits not in (7, 8, 16):
            raise ConfigError(f"value_bits={self.value_bits}: expected 7, 8 or 16.")
        if any(t <= 0 or t == 1 for t in self.temperatures):
            raise ConfigError(f"temperatures={self.temperatures}: expected positive, and not 1.")
        if list(self.temperatures) != sorted(set(self.temperatures)):
            raise ConfigError(f"temperatures={self.temperatures}: expected ascending, each once.")

    @property
    def num_entries(self) -> int:
        """K."""
        return min(self.top_k, self.num_classes)


@dataclass(slots=True)
class Target:
    """The teacher's distributions at P positions.

    `ids` are distinct classes within a position, in any order before encoding, by ascending rank
    after decoding. An entry whose logprob is -inf has probability 0 and only fills its slot.
    """

    ids: npt.NDArray[np.int32]  # [P, K]
    logprobs: Floats  # [P, K], nats, T = 1
    log_tail: Floats  # [P], ln of the mass of all classes not kept; -inf: exactly 0
    counts: npt.NDArray[np.uint8] | None = None  # [P], entries in use, ragged kinds only


@dataclass(frozen=True, slots=True)
class ClassRanks:
    """A permutation of the classes, often kept ones first, so that gaps between ranks are small."""

    ranks: npt.NDArray[np.uint32]  # [C] of each class
    classes: npt.NDArray[np.uint32]  # [C] at each rank

    @classmethod
    def from_counts(cls, counts: npt.NDArray[np.integer]) -> "ClassRanks":
        """Descending count [C], ties to the smaller class."""
        return cls.from_classes(np.argsort(-counts.astype(np.int64), kind="stable"))

    @classmethod
    def from_classes(cls, classes: npt.NDArray[np.integer]) -> "ClassRanks":
        """From the classes in the order of their ranks, as `classes` of a saved one."""
        if not np.array_equal(np.sort(classes), np.arange(classes.size)):
            raise ValueError(f"class ranks: expected each of 0..{classes.size - 1} exactly once")
        ranks = np.empty(classes.size, np.uint32)
        ranks[classes] = np.arange(classes.size, dtype=np.uint32)
        return cls(ranks, classes.astype(np.uint32))


def plane_sizes(spec: TargetSpec, num_positions: int) -> dict[str, int]:
    """Name and exact size in bytes of every plane, in the order of the columns."""
    if spec.kind == "none":
        return {}
    entries = num_positions * spec.num_entries
    sizes = {f"target_ids.{plane}": entries for plane in range(_id_planes(spec))}
    if spec.value_bits == 16:
        sizes |= {"target_codes.0": entries, "target_codes.1": entries}
    else:
        sizes |= {"target_codes.0": entries, "target_range.0": num_positions}
    return sizes | {"target_tail.0": num_positions, "target_tail.1": num_positions}


def encode(target: Target, spec: TargetSpec, ranks: ClassRanks) -> dict[str, Plane]:
    """Every plane of plane_sizes.

    Rounding moves a drop by at most R (sqrt(drop / R) / M + 1 / 4 M**2), R the coded range, at 16
    bits by 2**-11 of itself, and ln(tail / kept mass) by 2.4e-4 inside its limits. An entry of -inf
    says that no class with probability was left out, so the tail of its position is 0, as it is
    where every class is kept. An entry 3,922 nats below the likeliest counts as -inf.
    """
    hi_P = _row_max(target.logprobs)
    _check(target, spec, hi_P)
    drop_PK = hi_P[:, None] - target.logprobs
    missing_PK = drop_PK > RANGES[-1]
    drop_PK[missing_PK] = np.inf
    tail_P = _tail_codes(target.log_tail - hi_P, drop_PK)
    tail_P[np.nonzero(missing_PK)[0]] = NO_TAIL
    if spec.num_entries == spec.num_classes:
        tail_P[:] = NO_TAIL
    planes = _named("target_tail", split_planes(tail_P, 2))
    code_PK: npt.NDArray[Any]
    if spec.value_bits == 16:
        code_PK = drop_PK.astype(np.float16).view(np.uint16)
    else:
        code_PK, planes["target_range.0"] = _curve_codes(drop_PK, LEVELS[spec.value_bits])
    gap_PK, code_PK = _sort_by_rank(target.ids, code_PK, ranks)
    planes |= _named("target_ids", split_planes(gap_PK, _id_planes(spec)))
    planes |= _named("target_codes", split_planes(code_PK, code_PK.itemsize))
    return {name: planes[name].reshape(-1) for name in plane_sizes(spec, hi_P.size)}


def decode(
    planes: Mapping[str, Plane], num_positions: int, spec: TargetSpec, ranks: ClassRanks
) -> Target:
    """The target, scaled at T = 1 so that entries and tail sum to 1 in float32 (within 2e-6)."""
    shape = (num_positions, spec.num_entries)
    target = Target(
        ids=np.empty(shape, np.int32),
        logprobs=np.empty(shape, np.float32),
        log_tail=np.empty(num_positions, np.float32),
    )
    position_bytes = plane_sizes(spec, 1)
    step = max(1, _DECODED_ENTRIES // spec.num_entries)
    for start in range(0, num_positions, step):
        some = slice(start, start + step)
        part = {
            name: planes[name][start * size : (start + step) * size]
            for name, size in position_bytes.items()
        }
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


def _id_planes(spec: TargetSpec) -> int:
    return ((spec.num_classes - 1).bit_length() + 7) // 8


def _named(name: str, planes: Sequence[Plane]) -> dict[str, Plane]:
    return {f"{name}.{number}": plane for number, plane in enumerate(planes)}


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
    rank_bits = (ranks.ranks.size - 1).bit_length()
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
        raise CorruptCache(
            "target_codes: found a position without any class, expected at least one. "
            "Run cache-teacher verify CACHE --drop-bad, then run again."
        )
    out.logprobs += (LOG_KEPT.take(tail_P) - np.log(weight_P))[:, None]
    id_planes = [planes[f"target_ids.{plane}"] for plane in range(_id_planes(spec))]
    _decode_ids(id_planes, ranks, out_PK=out.ids)


def _decode_drops(planes: Mapping[str, Plane], spec: TargetSpec, *, out_PK: Floats) -> None:
    """Minus the drop [P, K]."""
    code_PK = planes["target_codes.0"].reshape(out_PK.shape)
    if spec.value_bits == 16:
        high_PK = planes["target_codes.1"].reshape(out_PK.shape)
        np.negative(join_planes([code_PK, high_PK], np.uint16).view(np.float16), out=out_PK)
    else:
        range_P = RANGES.take(planes["target_range.0"])
        _curve_values(code_PK, range_P, LEVELS[spec.value_bits], out_PK=out_PK)


def _tail_codes(log_tail_P: Floats, drop_PK: Floats) -> npt.NDArray[np.uint16]:
    """Codes of ln(tail / kept mass) [P], both relative to the likeliest entry.

    Their ratio is exact where the tail is nearly 1 as well, where 1 - tail is not.
    """
    ratio_P = log_tail_P - np.log(np.einsum("pk->p", np.exp(-drop_PK)))
    step = (TAIL_MAX - TAIL_MIN) / TAIL_STEPS
    code_P = np.rint((ratio_P - TAIL_MIN) / step).clip(0, TAIL_STEPS).astype(np.uint16)
    code_P[log_tail_P == -np.inf] = NO_TAIL
    return code_P


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
        raise CorruptCache(
            f"target_ids: found rank {largest}, expected below {ranks.classes.size}. "
            "Run cache-teacher verify CACHE --drop-bad, then run again."
        )
    out_PK[1:, 0] -= last_P[:-1]
    rank_PK = np.cumsum(out_PK, dtype=np.intp).reshape(out_PK.shape)
    # All ranks are in range; of the modes with `out`, "wrap" is faster than "clip" by a third.
    np.take(ranks.classes.view(np.int32), rank_PK, mode="wrap", out=out_PK)
