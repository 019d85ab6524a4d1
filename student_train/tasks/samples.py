"""One row as a model reads it, for the checks of an export: tokens, and where its hard labels are.

T tokens, P positions.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shared.rows import Row


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence: tokens [T], and the tokens with hard labels where a cache has them."""

    row: int
    tokens: Mapping[str, np.ndarray]  # by name of the input; all but the mask
    positions: np.ndarray
    labels: np.ndarray

    @property
    def length(self) -> int:
        return len(self.tokens["input_ids"])


@dataclass(frozen=True, slots=True)
class Reading:
    """How a model reads: the names of its inputs, and what its decoder begins with.

    An encoder-decoder that is given no pairs reads a row, and is asked for its labels, behind
    `start_token`.
    """

    inputs: Sequence[str]
    start_token: int


def sequences_of(
    row: Row,
    number: int,
    lengths: Sequence[int],
    reading: Reading,
    *,
    of_whole_row: bool = False,
) -> Iterator[Sample]:
    """A row cut into sequences of these lengths, each with the positions inside it.

    Positions `of_whole_row` are no tokens: every sequence has all of them.
    """
    start = 0
    for length in lengths:
        here = slice(start, start + length)
        tokens = {"input_ids": row.input_ids[here].numpy()}
        if "token_type_ids" in reading.inputs:
            types = row.token_type_ids
            tokens["token_type_ids"] = (
                np.zeros(length, np.int64) if types is None else types.numpy()
            )
        if "decoder_input_ids" in reading.inputs:
            tokens["decoder_input_ids"] = np.append(reading.start_token, row.labels[:-1].numpy())
        inside = ((row.positions >= start) & (row.positions < start + length)).numpy()
        if of_whole_row:
            inside[:] = True
        yield Sample(
            number, tokens, row.positions.numpy()[inside] - start, row.labels.numpy()[inside]
        )
        start += length


def pair_of(row: Row, number: int) -> Sample:
    """The first segment of a row for the encoder, the second for the decoder."""
    size, ids = row.segments[0], row.input_ids.numpy()
    tokens = {"input_ids": ids[:size], "decoder_input_ids": ids[size:-1]}
    return Sample(number, tokens, row.positions.numpy() - size, row.labels.numpy())
