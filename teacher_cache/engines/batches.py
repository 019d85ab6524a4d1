"""Rows to forward batches: rows of similar length together, padded; the cut is part of the plan."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from teacher_cache.tasks.inputs import SEQUENCES, ForwardInputs, TeacherBatch
from teacher_cache.tasks.rows import TrainingRow


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One forward: which rows of the window, and where their positions stand in the window."""

    rows: tuple[int, ...]
    inputs: TeacherBatch
    labels: torch.Tensor  # i64 [N], or f32 of a regression
    window_index: torch.Tensor  # i64 [N]


def forward_batches(
    window: Sequence[TrainingRow],
    forward_tokens: int,
    *,
    packed: bool,
    inputs: ForwardInputs = SEQUENCES,
) -> Iterator[ForwardBatch]:
    """Longest rows first, ties in row order; rows times the longest stays within the budget."""
    starts = np.cumsum([0, *(row.num_positions for row in window)])
    order = sorted(range(len(window)), key=lambda index: (-len(window[index].input_ids), index))
    while order:
        count = inputs.fitting([window[index] for index in order], forward_tokens)
        yield batch_of(window, order[:count], starts, packed=packed, inputs=inputs)
        order = order[count:]


def batch_of(
    window: Sequence[TrainingRow],
    chosen: Sequence[int],
    starts: np.ndarray,
    *,
    packed: bool,
    inputs: ForwardInputs = SEQUENCES,
) -> ForwardBatch:
    """The rows `chosen`, longest first; `starts` is where each row's positions begin."""
    rows = [window[index] for index in chosen]
    labels = [
        row.input_ids[row.positions() + 1] if row.labels is None else row.labels for row in rows
    ]
    into = [np.arange(starts[index], starts[index + 1]) for index in chosen]
    return ForwardBatch(
        rows=tuple(chosen),
        inputs=inputs.batch(rows, packed=packed),
        labels=torch.from_numpy(_labels(labels)),
        window_index=torch.from_numpy(np.concatenate(into)),
    )


def _labels(parts: Sequence[np.ndarray]) -> np.ndarray:
    labels_N = np.concatenate(parts)
    return labels_N if labels_N.dtype == np.float32 else labels_N.astype(np.int64)
