"""Sums and maxima over the positions of a block, kept in the commit, for `inspect` to show.

P positions, S of them with hidden states, K entries of each or E of all, D channels.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np

from shared.format.blocks import Block
from shared.format.encoding import to_planes
from shared.format.manifest import Manifest
from shared.format.writer import EncodedBlock, compress_planes
from shared.targets import hidden
from shared.targets.hidden import ChannelScales
from shared.targets.record import ClassRanks, Floats, Target
from shared.targets.sample import drawn_logprob
from shared.targets.spec import TargetSpec

HIDDEN_ERRORS = ("sum_hidden_squared_error", "sum_hidden_squares", "max_hidden_error")


def add(total: MutableMapping[str, Any], more: Mapping[str, float]) -> None:
    """Adds up what two parts of a cache say: sums and counts; of `max_...` the larger stays."""
    for name, value in more.items():
        before = total.get(name, 0)
        total[name] = max(before, value) if name.startswith("max_") else before + value


def block_sums(block: Block, spec: TargetSpec) -> dict[str, float]:
    """Entropy, log-probability of the hard label, kept mass at each stored temperature, entries.

    The kept mass of a sample is that of the classes that are kept as they are. Of a regression the
    squared error of the teacher's numbers.
    """
    if block.target_values is not None and block.label_values is not None:
        if np.isnan(block.label_values).all():  # no labels
            return {}
        error_P = block.target_values.astype(np.float64) - block.label_values
        return {"sum_value_squared_error": float(np.square(error_P).sum())}
    target = block.target
    if target is None or block.entropy is None:
        return {}
    sums = {
        "sum_entropy": block.entropy,
        **{
            f"sum_kept_mass.{t:g}" if t != 1 else "sum_kept_mass": mass_P
            for t, mass_P in kept_masses(target, spec, block.log_partition_ratio).items()
        },
    }
    if block.label_logprob is not None:
        sums["sum_label_logprob"] = block.label_logprob
    if target.counts is not None:
        sums["sum_entries"] = target.counts
    return {name: float(values.sum(dtype=np.float64)) for name, values in sums.items()}


def kept_masses(
    target: Target, spec: TargetSpec, log_partition_ratio: Mapping[float, Floats]
) -> dict[float, Floats]:
    """Kept mass of each position [P] at temperature 1 and at those whose log-partition is given."""
    masses = {1.0: _kept_mass(target, spec)}
    for temperature, ratio_P in log_partition_ratio.items():
        spread = ratio_P[:, None] if target.counts is None else np.repeat(ratio_P, target.counts)
        kept = np.exp(target.logprobs / np.float32(temperature) - spread)
        masses[temperature] = _of_positions(kept, target)
    return masses


def _kept_mass(target: Target, spec: TargetSpec) -> Floats:
    if spec.kind != "sample":
        return -np.expm1(target.log_tail)
    weights_E = np.exp(target.logprobs)
    weights_E[target.logprobs == drawn_logprob(spec)] = 0.0
    return _of_positions(weights_E, target)


def _of_positions(values: Floats, target: Target) -> Floats:
    """Sums over the entries of each position, [P]."""
    if target.counts is None:
        return values.sum(axis=1)
    return np.add.reduceat(values, np.cumsum(target.counts) - target.counts)


def encode_and_measure(
    block: Block,
    number: int,
    manifest: Manifest,
    ranks: ClassRanks,
    scales: ChannelScales,
    rounding: Mapping[int, np.ndarray],
) -> tuple[EncodedBlock, dict[str, float]]:
    """A block as frames, and how far its hidden states will be from the teacher's.

    `rounding` [S] by layer is the squared error that bfloat16 has made already. The error of a
    lossy codec is far larger and has nothing to do with it, so their squares add up.
    """
    values = to_planes(block, manifest, ranks, scales)
    errors: dict[str, float] = {}
    for layer, states_SD in block.hidden.items():
        codec, width = manifest.hidden.codec, states_SD.shape[1]
        planes = [
            values[f"hidden.{layer}.{plane}"]
            for plane in range(len(hidden.plane_bytes(codec, width)))
        ]
        decoded_SD = hidden.decode(planes, codec, width, scales.get(layer))
        error_S, square_S = hidden.squared_errors(decoded_SD, states_SD)
        errors |= hidden_error(layer, error_S + rounding[layer], square_S)
    return compress_planes(values, number, manifest, block.num_tokens, block.num_positions), errors


def hidden_error(layer: int, error_S: np.ndarray, square_S: np.ndarray) -> dict[str, float]:
    """Sums of squared errors and of squares, and the worst state: its error by its own length.

    A state of zeros has no relative error; what it got wrong is in the sum alone.
    """
    known = square_S > 0
    worst = np.sqrt(error_S[known] / square_S[known]).max(initial=0)
    values = error_S.sum(), square_S.sum(), worst
    names = (f"{name}.{layer}" for name in HIDDEN_ERRORS)
    return dict(zip(names, map(float, values), strict=True))


def histogram(
    values: np.ndarray, smallest: float, largest: float, bars: int = 40
) -> dict[str, list[float]]:
    """How many values lie between neighbouring ones of bars + 1 edges."""
    counts, edges = np.histogram(values, bins=bars, range=(smallest, largest))
    return {"edges": [round(float(edge), 6) for edge in edges], "counts": counts.tolist()}
