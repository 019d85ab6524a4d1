"""Rows to forward batches: rows of similar length together, padded; the cut is part of the plan."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from teacher_cache.rows import Row
from teacher_cache.teacher import TeacherBatch


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One forward: which rows of the window, and where their positions stand in the window."""

    rows: tuple[int, ...]
    inputs: TeacherBatch
    labels: torch.Tensor  # i64 [N], or f32 of a regression
    window_index: torch.Tensor  # i64 [N]


def forward_batches(
    window: Sequence[Row], forward_tokens: int, *, packed: bool
) -> Iterator[ForwardBatch]:
    """Longest rows first, ties in row order; rows times the longest stays within the budget."""
    starts = np.cumsum([0, *(row.num_positions for row in window)])
    order = sorted(range(len(window)), key=lambda index: (-len(window[index].input_ids), index))
    while order:
        longest = len(window[order[0]].input_ids)
        count = max(1, forward_tokens // longest)
        yield batch_of(window, order[:count], starts, packed=packed)
        order = order[count:]


def batch_of(
    window: Sequence[Row], chosen: Sequence[int], starts: np.ndarray, *, packed: bool
) -> ForwardBatch:
    """The rows `chosen`, longest first; `starts` is where each row's positions begin."""
    width = max(len(window[index].input_ids) for index in chosen)
    input_ids = np.zeros((len(chosen), width), np.int64)
    mask = np.zeros((len(chosen), width), np.int64)
    places = np.zeros((len(chosen), width), np.int64)
    types = np.zeros((len(chosen), width), np.int64)
    labels: list[np.ndarray] = []
    at: list[np.ndarray] = []
    into: list[np.ndarray] = []
    for line, index in enumerate(chosen):
        row = window[index]
        size = len(row.input_ids)
        input_ids[line, :size] = row.input_ids
        mask[line, :size] = 1
        places[line] = _places(row, width)
        stride = row.num_positions if row.of_outputs else width
        at.append(line * stride + row.positions())
        labels.append(row.input_ids[row.positions() + 1] if row.labels is None else row.labels)
        if row.token_type_ids is not None:
            types[line, :size] = row.token_type_ids
        into.append(np.arange(starts[index], starts[index + 1]))
    position_index = torch.from_numpy(np.concatenate(at))
    ids = torch.from_numpy(input_ids)
    return ForwardBatch(
        rows=tuple(chosen),
        inputs=TeacherBatch(
            input_ids=ids,
            attention_mask=None if packed else torch.from_numpy(mask),
            position_ids=torch.from_numpy(places) if packed else None,
            token_type_ids=torch.from_numpy(types) if types.any() else None,
            position_index=position_index,
        ),
        labels=torch.from_numpy(_labels(labels)),
        window_index=torch.from_numpy(np.concatenate(into)),
    )


def _labels(parts: Sequence[np.ndarray]) -> np.ndarray:
    labels_N = np.concatenate(parts)
    return labels_N if labels_N.dtype == np.float32 else labels_N.astype(np.int64)


def _places(row: Row, width: int) -> np.ndarray:
    """Position ids that start again with each segment; padding is one more segment."""
    segments = [*row.segments, width - len(row.input_ids)]
    return np.concatenate([np.arange(size) for size in segments])
