"""The kind `sample`: likely classes as they are, of the others an unbiased draw.

Shapes: P positions, E entries of all positions one after another.

Values q = rint(M sqrt(drop / R)), drop = -ln p, with one R for the whole cache: RANGE_BEYOND nats
       more than -ln threshold, so that the largest class is kept as it is in flat positions too.
       Code 0 means drawn: its weight is the threshold. A kept entry has the code 1 + q, with M - 1
       in the place of M. At 16 bits, drop in fp16; 65535: drawn.

Probabilities are rounded to one of the two nearest codes at random, so that their mean is exact:
nearest rounding would be a bias that no number of draws averages out. There is no tail.
"""

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from shared.arrays import Plane, mixed_bits
from shared.errors import ConfigError
from shared.targets.base import TargetFields
from shared.targets.planes import DRAWN_HALF, halves
from shared.targets.ragged import LEVELS, RaggedKind
from shared.targets.record import Floats, Target

MIN_SPACING = 1 / 254  # a smaller one could draw more than MAX_ENTRIES
RANGE_BEYOND = 3.0  # nats below the spacing that the largest class may be
DRAWN = {7: 0, 8: 0, 16: DRAWN_HALF}  # code of a drawn entry


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


def value_range(spec: TargetFields) -> float:
    """R, nats."""
    return RANGE_BEYOND - math.log(spec.threshold)


def drawn_logprob(spec: TargetFields) -> np.float32:
    """What stands for a drawn entry: ln of its weight."""
    return np.float32(math.log(spec.threshold))


def _first_code(drop_E: npt.NDArray[np.float64], spec: TargetFields) -> npt.NDArray[np.uint8]:
    """The last code of 1..M - 1 whose drop is not larger."""
    M = LEVELS[spec.value_bits]
    place_E = np.floor(np.sqrt(drop_E / value_range(spec)) * (M - 1))
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
    M, R = LEVELS[spec.value_bits], value_range(spec)
    table = -R * ((np.arange(256) - 1) / (M - 1)) ** 2
    table[0] = drawn_logprob(spec)
    return table.astype(np.float32)
