"""Sums over the positions of a block, kept in the commit, from which `inspect` shows means.

P positions, K entries of each or E of all.
"""

from collections.abc import Mapping

import numpy as np

from shared.blocks import Block
from shared.ragged import drawn_logprob
from shared.target import Floats, Target, TargetSpec


def block_sums(block: Block, spec: TargetSpec) -> dict[str, float]:
    """Entropy, log-probability of the hard label, kept mass at each stored temperature, entries.

    The kept mass of a sample is that of the classes that are kept as they are.
    """
    target = block.target
    if target is None or block.entropy is None or block.label_logprob is None:
        return {}
    sums = {
        "sum_entropy": block.entropy,
        "sum_label_logprob": block.label_logprob,
        **{
            f"sum_kept_mass.{t:g}" if t != 1 else "sum_kept_mass": mass_P
            for t, mass_P in kept_masses(target, spec, block.log_partition_ratio).items()
        },
    }
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


def histogram(
    values: np.ndarray, smallest: float, largest: float, bars: int = 40
) -> dict[str, list[float]]:
    """How many values lie between neighbouring ones of bars + 1 edges."""
    counts, edges = np.histogram(values, bins=bars, range=(smallest, largest))
    return {"edges": [round(float(edge), 6) for edge in edges], "counts": counts.tolist()}
