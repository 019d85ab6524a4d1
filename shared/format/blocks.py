"""A block: consecutive rows decoded as numpy arrays.

R rows, T tokens, P positions, S of them with hidden states, D channels.
"""

from dataclasses import dataclass, field

import numpy as np

from shared.targets.record import Target


@dataclass(slots=True)
class Block:
    """Decoded consecutive rows.

    `positions` are token indices inside the row; `labels` is None where the hard label is the next
    token, and -1 where there is none; `label_values` (NaN: none) and `target_values` are what
    corpus and teacher say in a regression; `segments` are the lengths of the documents' parts of
    packed rows; `hidden` holds bfloat16 bit patterns. `positions` are written only where they are
    not the task's default.
    """

    row_ids: np.ndarray  # u64 [R]
    num_tokens: np.ndarray  # i32 [R]
    num_positions: np.ndarray  # i32 [R]
    input_ids: np.ndarray  # i32 [T]
    positions: np.ndarray  # i32 [P]
    segments: np.ndarray | None = None  # i32, of all rows one after another
    num_segments: np.ndarray | None = None  # i32 [R]
    token_type_ids: np.ndarray | None = None  # i32 [T]
    labels: np.ndarray | None = None  # i32 [P]
    label_values: np.ndarray | None = None  # f32 [P]
    target_values: np.ndarray | None = None  # f32 [P]
    reference: np.ndarray | None = None  # u8, the UTF-8 of all rows one after another
    reference_bytes: np.ndarray | None = None  # i32 [R]
    target: Target | None = None
    label_logprob: np.ndarray | None = None  # f32 [P]
    entropy: np.ndarray | None = None  # f32 [P]
    log_partition_ratio: dict[float, np.ndarray] = field(default_factory=dict)  # f32 [P] each
    hidden: dict[int, np.ndarray] = field(default_factory=dict)  # u16 [S, D] each
