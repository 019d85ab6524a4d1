"""Targets cut down without the teacher: what `repack` keeps of what a cache has.

P positions, K entries of each or E of all positions.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from shared.arrays import ranges
from shared.targets.ragged import RANGE_BEYOND, drawn_logprob
from shared.targets.record import Floats, Target
from shared.targets.spec import TargetSpec

_UNITS = float(1 << 40)  # of probability 1: a block of 2**22 positions fits 63 bits


def largest_of(target: Target, num_entries: int) -> Target:
    """The most probable entries, ties to the smaller class; the others join the tail."""
    if num_entries == target.ids.shape[1]:
        return target
    order_PK = np.lexsort((target.ids, -target.logprobs), axis=1)
    ids = np.take_along_axis(target.ids, order_PK, axis=1)
    logprobs = np.take_along_axis(target.logprobs, order_PK, axis=1)
    dropped_P = np.exp(logprobs[:, num_entries:].astype(np.float64)).sum(axis=1)
    return Target(
        ids=np.ascontiguousarray(ids[:, :num_entries]),
        logprobs=np.ascontiguousarray(logprobs[:, :num_entries]),
        log_tail=_joined_tail(target.log_tail, dropped_P),
    )


def above(target: Target, threshold: float) -> Target:
    """Entries of at least the threshold, and the largest; the others join the tail."""
    starts, position_E = _places(target)
    kept_E = target.logprobs >= math.log(threshold)
    kept_E |= _first_largest(target, starts, position_E)
    dropped_E = np.where(kept_E, 0.0, np.exp(target.logprobs.astype(np.float64)))
    return Target(
        ids=target.ids[kept_E],
        logprobs=target.logprobs[kept_E],
        log_tail=_joined_tail(target.log_tail, np.add.reduceat(dropped_E, starts)),
        counts=np.add.reduceat(kept_E.astype(np.int32), starts),
    )


def drawn_again(target: Target, spec: TargetSpec) -> Target:
    """A systematic sample, with a wider spacing, of the weights of a sample.

    The mean over both draws is the teacher's distribution still: dropping entries would not be.
    """
    assert target.random_bits is not None  # the caller sets them
    starts, position_E = _places(target)
    kept_E = target.logprobs >= math.log(spec.threshold)
    high_E = target.logprobs >= math.log(spec.threshold) - RANGE_BEYOND
    none_P = ~np.logical_or.reduceat(kept_E, starts)
    kept_E |= none_P[position_E] & high_E & _first_largest(target, starts, position_E)
    units_E = np.rint(np.where(kept_E, 0.0, np.exp(target.logprobs, dtype=np.float64)) * _UNITS)
    spacing = round(spec.threshold * _UNITS)
    ends_E = np.cumsum(units_E.astype(np.int64))
    ends_P = ends_E[starts + _counts(target) - 1]
    before_P = np.concatenate([[0], ends_P[:-1]])
    share_P = (target.random_bits >> np.uint64(11)) * 2.0**-53
    offset_P = (share_P * spacing).astype(np.int64)
    points_P = np.maximum(0, -(-(ends_P - before_P - offset_P) // spacing))
    number_S = ranges(np.zeros(len(points_P), np.int64), points_P)
    point_S = np.repeat(before_P + offset_P, points_P) + number_S * spacing
    drawn = np.searchsorted(ends_E, point_S, side="right")
    logprobs = target.logprobs.copy()
    logprobs[drawn] = drawn_logprob(spec)
    kept_E[drawn] = True
    return Target(
        ids=target.ids[kept_E],
        logprobs=logprobs[kept_E],
        log_tail=target.log_tail,
        counts=np.add.reduceat(kept_E.astype(np.int32), starts),
        random_bits=target.random_bits,
    )


def _counts(target: Target) -> npt.NDArray[np.int32]:
    assert target.counts is not None  # of a ragged kind
    return target.counts


def _places(target: Target) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Where the entries of each position begin [P], and the position of each entry [E]."""
    counts = _counts(target)
    return np.cumsum(counts) - counts, np.repeat(np.arange(len(counts)), counts)


def _first_largest(
    target: Target, starts: npt.NDArray[np.intp], position_E: npt.NDArray[np.intp]
) -> npt.NDArray[np.bool_]:
    """True at one largest entry of each position, [E]."""
    largest_E = np.maximum.reduceat(target.logprobs, starts)[position_E] == target.logprobs
    places = np.flatnonzero(largest_E)
    _, first = np.unique(position_E[places], return_index=True)
    found_E = np.zeros(len(largest_E), bool)
    found_E[places[first]] = True
    return found_E


def _joined_tail(log_tail_P: Floats, dropped_P: npt.NDArray[np.float64]) -> Floats:
    with np.errstate(divide="ignore"):
        tail_P = np.log(np.exp(log_tail_P.astype(np.float64)) + dropped_P)
    return tail_P.astype(np.float32)


def logprobs_of(targets: Sequence[Target]) -> Tensor:
    """Log-probabilities of all positions, descending, -inf where one has fewer entries."""
    widest = max(int(_counts(target).max(initial=1)) for target in targets)
    padded = [torch.from_numpy(_padded(target, widest)) for target in targets]
    return torch.cat(padded).sort(dim=1, descending=True).values


def _padded(target: Target, width: int) -> Floats:
    """Log-probabilities [P, width], -inf where a position has fewer entries."""
    counts = _counts(target)
    padded = np.full((len(counts), width), -np.inf, np.float32)
    padded[np.arange(width) < counts[:, None]] = target.logprobs
    return padded
