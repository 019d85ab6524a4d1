"""How the rows of a task become the sequences of a micro-batch: one object for each way.

R rows, B sequences, T tokens of the longest, N positions.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from shared.arrays import ranges
from shared.format.blocks import Block
from shared.format.layouts import bounds_of

Columns = dict[str, np.ndarray]
# Arrays of a micro-batch, where each token goes in [B, T], flat, and the row of each sequence.
Arranged = tuple[Columns, np.ndarray, np.ndarray]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """One way of laying out rows.

    `arrange` takes the columns that say where things are out of the columns of some rows, and gets
    their tokens and where each row starts in these. `sides`: how many
    parts of a row are sequences of their own for the model, which reads them together. With
    `of_windows` the segments of a row are one sequence, whose `context` lies between two bounds.
    With `counts_outputs` a position is an output of a row and not one of its tokens: every row has
    all L of them, and `position_index` counts through the logits [B, L].
    """

    arrange: Callable[[Columns, np.ndarray, np.ndarray], Arranged]
    sides: int = 1
    of_windows: bool = False
    counts_outputs: bool = False

    def places_of(self, block: Block) -> Columns:
        """The column that says where the parts of rows lie.

        `context` [R, 2], where it begins and ends, of windows; else, where rows have several
        segments, `position_ids`, which restart with every one.
        """
        if self.of_windows:
            return {"context": bounds_of(block)}
        if block.segments is None:
            return {}
        return {"position_ids": ranges(np.zeros_like(block.segments), block.segments)}

    def position_index(self, token_of_position: np.ndarray, places: np.ndarray) -> np.ndarray:
        """What each position is of, counted over the micro-batch [N]."""
        if self.counts_outputs:
            return np.arange(len(token_of_position))
        index: np.ndarray = places[token_of_position]
        return index


def _sequences(columns: Columns, input_ids: np.ndarray, row_starts: np.ndarray) -> Arranged:
    """Every segment as one sequence."""
    position_ids = columns.pop("position_ids", None)
    starts = row_starts if position_ids is None else np.flatnonzero(position_ids == 0)
    lengths_B1 = np.diff(starts, append=len(input_ids))[:, None]
    column_T = np.arange(lengths_B1.max())
    places = ranges(np.arange(len(starts)) * len(column_T), lengths_B1[:, 0])
    ids_BT = np.zeros((len(starts), len(column_T)), np.int64)
    arrays = {"input_ids": _scatter(input_ids, places, ids_BT)}
    arrays["attention_mask"] = (column_T < lengths_B1).astype(np.int64)
    if "token_type_ids" in columns:
        types = columns.pop("token_type_ids")
        arrays["token_type_ids"] = _scatter(types, places, np.zeros_like(ids_BT))
    return arrays, places, np.searchsorted(row_starts, starts, side="right") - 1


def _pairs(columns: Columns, input_ids: np.ndarray, row_starts: np.ndarray) -> Arranged:
    """The first segment of each row for the encoder, the second for the decoder.

    Places are those in what the decoder reads, 0 for tokens of the encoder: none has a target.
    """
    starts = np.flatnonzero(columns.pop("position_ids") == 0).reshape(-1, 2)
    lengths = np.diff(starts.reshape(-1), append=len(input_ids)).reshape(-1, 2)
    arrays: Columns = {}
    places = np.zeros(len(input_ids), np.int64)
    for side, prefix in enumerate(("", "decoder_")):
        column_T = np.arange(lengths[:, side].max())
        tokens = ranges(starts[:, side], lengths[:, side])
        into = ranges(np.arange(len(starts)) * len(column_T), lengths[:, side])
        ids_BT = np.zeros((len(starts), len(column_T)), np.int64)
        arrays[f"{prefix}input_ids"] = _scatter(input_ids[tokens], into, ids_BT)
        arrays[f"{prefix}attention_mask"] = (column_T < lengths[:, side, None]).astype(np.int64)
        if side:
            places[tokens] = into
    return arrays, places, np.arange(len(row_starts))


def _scatter(values: np.ndarray | int, places: np.ndarray, into_BT: np.ndarray) -> np.ndarray:
    into_BT.reshape(-1)[places] = values
    return into_BT


SEQUENCES = Arrangement(_sequences)
OUTPUTS = Arrangement(_sequences, counts_outputs=True)
WINDOWS = Arrangement(_sequences, of_windows=True)
PAIRS = Arrangement(_pairs, sides=2)
