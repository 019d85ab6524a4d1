"""Sums over the positions of a block, kept in the commit, from which `inspect` shows means.

P positions, K entries of each or E of all.
"""

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
        "sum_kept_mass": _kept_mass(target, spec),
    }
    if target.counts is not None:
        sums["sum_entries"] = target.counts
    for temperature, ratio_P in block.log_partition_ratio.items():
        spread = ratio_P[:, None] if target.counts is None else np.repeat(ratio_P, target.counts)
        kept = np.exp(target.logprobs / np.float32(temperature) - spread)
        sums[f"sum_kept_mass.{temperature:g}"] = _of_positions(kept, target)
    return {name: float(values.sum(dtype=np.float64)) for name, values in sums.items()}


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
