"""Rows to forward batches: rows of similar length together, padded; the cut is part of the plan."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shared.tasks import Layout
from teacher_cache.engines.streamed_head import TeacherBatch
from teacher_cache.tasks.rows import Row


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One forward: which rows of the window, and where their positions stand in the window."""

    rows: tuple[int, ...]
    inputs: TeacherBatch
    labels: torch.Tensor  # i64 [N], or f32 of a regression
    window_index: torch.Tensor  # i64 [N]


def forward_batches(
    window: Sequence[Row], forward_tokens: int, *, packed: bool, layout: Layout = "tokens"
) -> Iterator[ForwardBatch]:
    """Longest rows first, ties in row order; rows times the longest stays within the budget.

    Of pairs both sides are padded, and the longest of each counts.
    """
    starts = np.cumsum([0, *(row.num_positions for row in window)])
    order = sorted(range(len(window)), key=lambda index: (-len(window[index].input_ids), index))
    while order:
        count = _fitting([window[index] for index in order], forward_tokens, layout)
        yield batch_of(window, order[:count], starts, packed=packed, layout=layout)
        order = order[count:]


def _fitting(rows: Sequence[Row], forward_tokens: int, layout: Layout) -> int:
    """How many of the first rows fit into one forward; one always does."""
    if layout != "pair":
        return max(1, forward_tokens // len(rows[0].input_ids))
    source = target = 0
    for count, row in enumerate(rows, start=1):
        source, target = max(source, row.segments[0]), max(target, row.segments[1])
        if count * (source + target) > forward_tokens:
            return max(1, count - 1)
    return len(rows)


def batch_of(
    window: Sequence[Row],
    chosen: Sequence[int],
    starts: np.ndarray,
    *,
    packed: bool,
    layout: Layout = "tokens",
) -> ForwardBatch:
    """The rows `chosen`, longest first; `starts` is where each row's positions begin."""
    rows = [window[index] for index in chosen]
    labels = [
        row.input_ids[row.positions() + 1] if row.labels is None else row.labels for row in rows
    ]
    into = [np.arange(starts[index], starts[index + 1]) for index in chosen]
    return ForwardBatch(
        rows=tuple(chosen),
        inputs=_pairs(rows) if layout == "pair" else _sequences(rows, packed=packed),
        labels=torch.from_numpy(_labels(labels)),
        window_index=torch.from_numpy(np.concatenate(into)),
    )


def _labels(parts: Sequence[np.ndarray]) -> np.ndarray:
    labels_N = np.concatenate(parts)
    return labels_N if labels_N.dtype == np.float32 else labels_N.astype(np.int64)


def _sequences(rows: Sequence[Row], *, packed: bool) -> TeacherBatch:
    """Each row as one sequence; packed ones with the places of tokens in their segments."""
    input_ids, mask = padded([row.input_ids for row in rows])
    width = input_ids.shape[1]
    types = np.zeros((len(rows), width), np.int64)
    for line, row in enumerate(rows):
        if row.token_type_ids is not None:
            types[line, : len(row.input_ids)] = row.token_type_ids
    places = np.stack([_places(row, width) for row in rows])
    at = [
        line * (row.num_positions if row.of_outputs else width) + row.positions()
        for line, row in enumerate(rows)
    ]
    return TeacherBatch(
        input_ids=input_ids,
        attention_mask=None if packed else mask,
        position_ids=torch.from_numpy(places) if packed else None,
        token_type_ids=torch.from_numpy(types) if types.any() else None,
        position_index=torch.from_numpy(np.concatenate(at)),
        segments=None if packed else _segments(rows),
    )


def _pairs(rows: Sequence[Row]) -> TeacherBatch:
    """The first segment of each row for the encoder, the second for the decoder."""
    sources = [row.segments[0] for row in rows]
    parts = [np.split(row.input_ids, [size]) for row, size in zip(rows, sources, strict=True)]
    input_ids, mask = padded([source for source, _ in parts])
    decoder_ids, decoder_mask = padded([target for _, target in parts])
    width = decoder_ids.shape[1]
    at = [line * width + row.positions() - row.segments[0] for line, row in enumerate(rows)]
    return TeacherBatch(
        input_ids=input_ids,
        attention_mask=mask,
        decoder_input_ids=decoder_ids,
        decoder_attention_mask=decoder_mask,
        position_index=torch.from_numpy(np.concatenate(at)),
    )


def padded(sequences: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, i64 [B, T] each, padded behind with token 0."""
    ids_BT = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    mask_BT = np.zeros_like(ids_BT)
    for line, sequence in enumerate(sequences):
        ids_BT[line, : len(sequence)] = sequence
        mask_BT[line, : len(sequence)] = 1
    return torch.from_numpy(ids_BT), torch.from_numpy(mask_BT)


def _segments(rows: Sequence[Row]) -> torch.Tensor | None:
    """Of rows that have several parts the lengths of these, [B, S]."""
    most = max(len(row.segments) for row in rows)
    if most == 1:
        return None
    filled = [(*row.segments, *(0,) * (most - len(row.segments))) for row in rows]
    return torch.tensor(filled)


def _places(row: Row, width: int) -> np.ndarray:
    """Position ids that start again with each segment; padding is one more segment."""
    segments = [*row.segments, width - len(row.input_ids)]
    return np.concatenate([np.arange(size) for size in segments])
