"""The mixture of several teachers' targets at the same positions: pure functions of arrays.

A mixture is sum_i w_i p_i, with weights that sum to 1. At a temperature other than 1 each teacher
is tempered first, with its own log-partition, and the tempered distributions are mixed: m_T =
sum_i w_i p_i^(1/T) / Z_i. What comes out is T ln m_T with a log-partition ratio of 0, because the
loss divides by T and subtracts the ratio: it then has ln m_T, with no step of its own for this.

Shapes: P positions, C classes, E entries of all positions, U different classes of all positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from shared.targets.base import TargetKind
from shared.targets.kinds import KINDS
from shared.targets.record import Floats, Target

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Voice:
    """What one teacher says: its target, and logsumexp(lp / T) where T is not 1; f32 [P]."""

    target: Target
    weight: float
    log_partition_ratio: Floats | None = None


def mixture(voices: Sequence[Voice], kind: TargetKind, temperature: float = 1.0) -> Target:
    """The mixed target, as the loss at `temperature` expects it.

    What it is worth follows from what the kind keeps. Whole distributions have an exact mixture. Of
    samples it has all entries with their weights times the teacher's, those of one class added up:
    right on average, as each sample is; a position may have more than 255 entries.

    Where classes are cut off it is not exact, and nothing could be: a class that only some teachers
    kept has an unknown probability in the tails of the others. Classes that all teachers kept have
    their exact mixed probability, everything else is in the tail, whose mass is exact too. The
    result has `counts`, whatever the kind; a position may have no entry at all.
    """
    traits = KINDS[kind]
    if traits.every_temperature:
        return _mix_whole(voices, temperature)
    if traits.sampled:
        return _mix_entries(voices, at_least=1)
    return _mix_kept(voices, temperature)


def _mix_kept(voices: Sequence[Voice], temperature: float) -> Target:
    """The classes that all teachers kept, and one tail."""
    at_one = _mix_entries(voices, at_least=len(voices))
    if temperature == 1:
        return at_one
    tempered = _mix_entries([_tempered(v, temperature) for v in voices], at_least=len(voices))
    # The loss takes the tempered tail from the entries, and only its being 0 from here.
    return replace(
        tempered,
        logprobs=tempered.logprobs * np.float32(temperature),
        log_tail=at_one.log_tail,
    )


def entropy_of(target: Target) -> Floats:
    """Entropy of whole distributions at T = 1, nats [P]."""
    mass_PC = np.exp(target.logprobs)
    held_PC = np.where(mass_PC > 0, target.logprobs, 0)  # 0 ln 0 is 0
    entropy: Floats = -(mass_PC * held_PC).sum(axis=1)
    return entropy


def _mix_whole(voices: Sequence[Voice], temperature: float) -> Target:
    first = voices[0].target
    mixed_PC = np.full_like(first.logprobs, -np.inf)
    for voice in voices:
        logprobs_PC = voice.target.logprobs
        if temperature != 1:
            logprobs_PC = logprobs_PC / np.float32(temperature)
            logprobs_PC -= np.logaddexp.reduce(logprobs_PC, axis=1, keepdims=True)
        np.logaddexp(mixed_PC, logprobs_PC + np.float32(np.log(voice.weight)), out=mixed_PC)
    return Target(first.ids, mixed_PC * np.float32(temperature), first.log_tail)


def _tempered(voice: Voice, temperature: float) -> Voice:
    """At T; its tail is left as it is, for nobody looks at it."""
    assert voice.log_partition_ratio is not None  # `check_cache` asks for a stored temperature
    target, ratio_P = voice.target, voice.log_partition_ratio
    ratio = ratio_P[:, None] if target.counts is None else np.repeat(ratio_P, target.counts)
    logprobs = target.logprobs / np.float32(temperature) - ratio
    return replace(voice, target=replace(target, logprobs=logprobs))


def _mix_entries(voices: Sequence[Voice], *, at_least: int) -> Target:
    """The classes that at least so many teachers kept; all other mass goes into the tail."""
    count = len(voices[0].target.log_tail)
    key_E = np.concatenate([_keys(voice.target) for voice in voices])
    mass_E = np.concatenate([_masses(voice) for voice in voices])
    order = np.argsort(key_E, kind="stable")
    key_E, mass_E = key_E[order], mass_E[order]
    starts_U = np.flatnonzero(np.diff(key_E, prepend=-1))
    mass_U = np.add.reduceat(mass_E, starts_U) if len(starts_U) else mass_E
    kept_U = np.diff(starts_U, append=len(key_E)) >= at_least
    key_U, position_U = key_E[starts_U], key_E[starts_U] >> 32
    tail_P = np.zeros(count)
    for voice in voices:
        tail_P += voice.weight * np.exp(voice.target.log_tail.astype(np.float64))
    tail_P += np.bincount(position_U[~kept_U], mass_U[~kept_U], minlength=count)
    with np.errstate(divide="ignore"):
        return Target(
            ids=(key_U[kept_U] & 0xFFFFFFFF).astype(np.int32),
            logprobs=np.log(mass_U[kept_U]).astype(np.float32),
            log_tail=np.log(tail_P).astype(np.float32),
            counts=np.bincount(position_U[kept_U], minlength=count).astype(np.int32),
        )


def _keys(target: Target) -> npt.NDArray[np.int64]:
    """Position and class of every entry that has a probability, in one number."""
    if target.counts is None:
        position = np.repeat(np.arange(len(target.ids), dtype=np.int64), target.ids.shape[1])
    else:
        position = np.repeat(np.arange(len(target.counts), dtype=np.int64), target.counts)
    there = target.logprobs.reshape(-1) > -np.inf
    key_E: npt.NDArray[np.int64] = (position << 32 | target.ids.reshape(-1))[there]
    return key_E


def _masses(voice: Voice) -> Doubles:
    """The mixed probability that each of these entries brings along."""
    logprobs_E = voice.target.logprobs.reshape(-1)
    there = logprobs_E > -np.inf
    return voice.weight * np.exp(logprobs_E[there].astype(np.float64))
