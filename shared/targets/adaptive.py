"""The kind `adaptive`: every class of at least a threshold's probability, and a tail.

Shapes: P positions, E entries of all positions one after another.

Values q = rint(M sqrt(drop / R)), drop = -ln p, with one R for the whole cache: -ln threshold. The
       decoder scales entries and tail to a sum of 1. At 16 bits, drop in fp16.
Tail   ln(tail / kept mass), 16 bits, as in `topk`.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.arrays import Plane, join_planes, split_planes
from shared.targets.base import TargetFields
from shared.targets.planes import LOG_KEPT, LOG_TAIL, PlaneShape, halves, named, tail_codes
from shared.targets.ragged import LEVELS, RaggedKind, masses, spread
from shared.targets.record import Floats, Target


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
        root_E = np.sqrt(target.logprobs.clip(max=0) * np.float32(-(M**2) / value_range(spec)))
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
        logprobs *= np.float32(-value_range(spec) / LEVELS[spec.value_bits] ** 2)
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
        shift_P = LOG_KEPT.take(tail_P) - np.log(masses(weight_E, ends, rooms_E[1]))
        logprobs += spread(shift_P, ends, rooms_E[1])


def value_range(spec: TargetFields) -> float:
    """R, nats."""
    return -math.log(spec.threshold)
