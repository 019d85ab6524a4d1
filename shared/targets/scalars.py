"""One number for each position <-> byte planes: entropy, normalisers, log-probabilities, values.

Shapes: P positions, C classes.
"""

import math
from collections.abc import Sequence

import numpy as np

from shared.arrays import Plane, join_planes, split_planes
from shared.errors import CorruptCache
from shared.targets.record import Floats


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
