"""Sums and maxima over the positions of a block, kept in the commit, for `inspect` to show.

P positions, S of them with hidden states, K entries, D channels.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any

import numpy as np

from shared import hidden
from shared.blocks import Block, to_planes
from shared.codec import ClassRanks
from shared.hidden import ChannelScales
from shared.manifest import Manifest
from shared.shards import EncodedBlock, compress_planes

HIDDEN_ERRORS = ("sum_hidden_squared_error", "sum_hidden_squares", "max_hidden_error")


def add(total: MutableMapping[str, Any], more: Mapping[str, float]) -> None:
    """Adds up what two parts of a cache say: sums and counts; of `max_...` the larger stays."""
    for name, value in more.items():
        before = total.get(name, 0)
        total[name] = max(before, value) if name.startswith("max_") else before + value


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
    return compress_planes(values, block, number, manifest), errors


def hidden_error(layer: int, error_S: np.ndarray, square_S: np.ndarray) -> dict[str, float]:
    """Sums of squared errors and of squares, and the worst state: its error by its own length.

    A state of zeros has no relative error; what it got wrong is in the sum alone.
    """
    known = square_S > 0
    worst = np.sqrt(error_S[known] / square_S[known]).max(initial=0)
    values = error_S.sum(), square_S.sum(), worst
    names = (f"{name}.{layer}" for name in HIDDEN_ERRORS)
    return dict(zip(names, map(float, values), strict=True))
