"""Rows to what a model reads in one forward: each row as a sequence, or as a pair of two.

B rows, T tokens, N positions (flat in B * T).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from teacher_cache.tasks.rows import TrainingRow


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherBatch:
    """One forward of the teacher: padded rows with a mask, or packed rows with position ids.

    With packed rows a mask, even one of ones, lets their documents attend to each other. Where a
    model reads pairs, `input_ids` are what the encoder reads, and T is the decoder's in
    `position_index`.
    """

    input_ids: Tensor  # int64 [B, T]
    position_index: Tensor  # int64 [N], flat in B * T: where logits are wanted
    attention_mask: Tensor | None = None  # int64 [B, T], 1 = token, 0 = padding
    position_ids: Tensor | None = None  # int64 [B, T], from 0 in each segment
    token_type_ids: Tensor | None = None  # int64 [B, T], 1 in the second of two texts
    segments: Tensor | None = None  # int64 [B, S], lengths of the parts of padded rows; 0: none
    decoder_input_ids: Tensor | None = None  # int64 [B, T of the decoder]
    decoder_attention_mask: Tensor | None = None  # int64, as decoder_input_ids

    def __post_init__(self) -> None:
        if self.attention_mask is not None and self.position_ids is not None:
            raise ValueError("a batch has an attention mask (padded) or position ids (packed)")

    def to(self, device: torch.device) -> "TeacherBatch":
        def moved(values: Tensor | None) -> Tensor | None:
            return None if values is None else values.to(device)

        return TeacherBatch(
            input_ids=self.input_ids.to(device),
            position_index=self.position_index.to(device),
            attention_mask=moved(self.attention_mask),
            position_ids=moved(self.position_ids),
            token_type_ids=moved(self.token_type_ids),
            segments=moved(self.segments),
            decoder_input_ids=moved(self.decoder_input_ids),
            decoder_attention_mask=moved(self.decoder_attention_mask),
        )


Padded = tuple[Tensor, Tensor]  # ids and mask, int64 [B, T] each


class ForwardInputs(Protocol):
    """How rows become the inputs of a forward.

    With `pairs` an encoder reads one part of a row, and a decoder goes on from a start token.
    """

    pairs: bool

    def batch(self, rows: Sequence[TrainingRow], *, packed: bool) -> TeacherBatch:
        """One forward over these rows; its positions are those of the rows, in their order."""

    def fitting(self, rows: Sequence[TrainingRow], forward_tokens: int) -> int:
        """How many of the first of these rows, longest first, fit into one forward; one does."""

    def trial(self, predicted: Padded, source: Padded, position_index: Tensor) -> TeacherBatch:
        """A forward that no rows are needed for: `predicted` is where logits are looked at.

        `source` is what a model reads first that reads pairs.
        """


class Sequences:
    """Each row is one sequence; packed ones carry the places of tokens in their segments."""

    pairs = False

    def batch(self, rows: Sequence[TrainingRow], *, packed: bool) -> TeacherBatch:
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

    def fitting(self, rows: Sequence[TrainingRow], forward_tokens: int) -> int:
        return max(1, forward_tokens // len(rows[0].input_ids))

    def trial(self, predicted: Padded, source: Padded, position_index: Tensor) -> TeacherBatch:
        ids_BT, mask_BT = predicted
        return TeacherBatch(input_ids=ids_BT, attention_mask=mask_BT, position_index=position_index)


class Pairs:
    """The first segment of each row is for an encoder, the second for a decoder."""

    pairs = True

    def batch(self, rows: Sequence[TrainingRow], *, packed: bool) -> TeacherBatch:
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

    def fitting(self, rows: Sequence[TrainingRow], forward_tokens: int) -> int:
        """Both sides are padded, and the longest of each counts."""
        source = target = 0
        for count, row in enumerate(rows, start=1):
            source, target = max(source, row.segments[0]), max(target, row.segments[1])
            if count * (source + target) > forward_tokens:
                return max(1, count - 1)
        return len(rows)

    def trial(self, predicted: Padded, source: Padded, position_index: Tensor) -> TeacherBatch:
        source_ids, source_mask = source
        decoder_ids, decoder_mask = predicted
        return TeacherBatch(
            input_ids=source_ids,
            attention_mask=source_mask,
            decoder_input_ids=decoder_ids,
            decoder_attention_mask=decoder_mask,
            position_index=position_index,
        )


SEQUENCES, PAIRS = Sequences(), Pairs()


def padded(sequences: Sequence[np.ndarray]) -> Padded:
    """Ids and mask, i64 [B, T] each, padded behind with token 0."""
    ids_BT = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    mask_BT = np.zeros_like(ids_BT)
    for line, sequence in enumerate(sequences):
        ids_BT[line, : len(sequence)] = sequence
        mask_BT[line, : len(sequence)] = 1
    return torch.from_numpy(ids_BT), torch.from_numpy(mask_BT)


def _segments(rows: Sequence[TrainingRow]) -> Tensor | None:
    """The lengths of the parts of each row, [B, S]; None where every row is one part."""
    most = max(len(row.segments) for row in rows)
    if most == 1:
        return None
    filled = [(*row.segments, *(0,) * (most - len(row.segments))) for row in rows]
    return torch.tensor(filled)


def _places(row: TrainingRow, width: int) -> np.ndarray:
    """Position ids that start again with each segment; padding is one more segment."""
    segments = [*row.segments, width - len(row.input_ids)]
    return np.concatenate([np.arange(size) for size in segments])
