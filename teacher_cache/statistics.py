"""Sums over the positions of a block, kept in the commit, from which `inspect` shows means.

P positions, K entries.
"""

import numpy as np

from shared.blocks import Block


def block_sums(block: Block) -> dict[str, float]:
    """Entropy, log-probability of the hard label, and kept mass at each stored temperature."""
    target = block.target
    if target is None or block.entropy is None or block.label_logprob is None:
        return {}
    sums = {
        "sum_entropy": block.entropy,
        "sum_label_logprob": block.label_logprob,
        "sum_kept_mass": -np.expm1(target.log_tail),
    }
    for temperature, ratio_P in block.log_partition_ratio.items():
        kept_PK = np.exp(target.logprobs / np.float32(temperature) - ratio_P[:, None])
        sums[f"sum_kept_mass.{temperature:g}"] = kept_PK.sum(axis=1)
    return {name: float(values.sum(dtype=np.float64)) for name, values in sums.items()}
