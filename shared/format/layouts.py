"""How a row is laid out, and where its positions are: one object a layout, asked for its traits.

R rows, T tokens, P positions of all rows. A layout knows arrays and sizes, no file and no manifest.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from shared.arrays import ranges
from shared.errors import CorruptCache
from shared.format.blocks import Block
from shared.tasks import Layout

PLACES = (0, 1)  # the positions of a window: start and end of the answer
NO_ANSWER = 0  # the class of a window, a token of it, that says so


class RowLayout:
    """Targets at tokens of the row, or of the tokens behind these.

    of_rows            targets are of the row as a whole, and no token has any
    at_tokens          positions are tokens of the row, which have states of their own
    has_decoder        a row is two parts: what an encoder reads, and what a decoder reads
    classes_are_tokens the classes of a position are the tokens of its row
    one_label_column   hard labels that are stored stand in the column `labels`
    required_columns   what a cache of this layout always has, beside what every cache has
    """

    of_rows: ClassVar[bool] = False
    at_tokens: ClassVar[bool] = True
    has_decoder: ClassVar[bool] = False
    classes_are_tokens: ClassVar[bool] = False
    one_label_column: ClassVar[bool] = True
    required_columns: ClassVar[Sequence[str]] = ()

    def __init__(self, name: Layout) -> None:
        self.name = name

    def __str__(self) -> str:
        return self.name

    def longest_row(self, max_length: int, max_target_length: int) -> int:
        """Tokens of the longest row that these options allow."""
        return max_length

    def positions_per_row(self, num_labels: int) -> int:
        """Positions that every row has and that are no tokens of it; 0 where rows differ."""
        return 0

    def default_positions(
        self, num_tokens: np.ndarray, num_positions: np.ndarray, segments: np.ndarray | None
    ) -> np.ndarray:
        """Positions where a cache stores none, as an index inside the row; i32 [P].

        They are every token of each segment but its last: the next token is the label.
        """
        if segments is None:  # a row is one segment: 2.4 times as fast as the general case
            counts = num_tokens - 1
            starts = np.cumsum(counts, dtype=np.int32) - counts
            return np.arange(counts.sum(), dtype=np.int32) - np.repeat(starts, counts)
        predicted = segments - 1
        segment_starts = np.repeat(np.cumsum(segments) - segments, predicted)
        row_starts = np.repeat(np.cumsum(num_tokens) - num_tokens, num_positions)
        first = np.repeat(np.cumsum(predicted) - predicted, predicted)
        within = np.arange(len(first)) - first
        return (segment_starts + within - row_starts).astype(np.int32)

    def check(self, block: Block, num_classes: int) -> None:
        """Raises CorruptCache where the rows of a decoded block are not laid out like this.

        What every layout has in common, as segments that add up, was checked before.
        """


class OfRows(RowLayout):
    """One target for the row as a whole, at position 0."""

    of_rows = True
    at_tokens = False


class Outputs(OfRows):
    """One position for each output of the head, none of which is a token."""

    one_label_column = False

    def positions_per_row(self, num_labels: int) -> int:
        return num_labels

    def default_positions(
        self, num_tokens: np.ndarray, num_positions: np.ndarray, segments: np.ndarray | None
    ) -> np.ndarray:
        return ranges(np.zeros_like(num_positions), num_positions).astype(np.int32)


class Pair(RowLayout):
    """A source for the encoder, and what the decoder reads, targets at all of it but its last."""

    has_decoder = True

    def longest_row(self, max_length: int, max_target_length: int) -> int:
        return max_length + 1 + max_target_length


class Window(RowLayout):
    """A part of a text with a question before it, where an answer starts and ends.

    Such a row has three parts, whose lengths are its `segments`: what stands before the context
    (special tokens and the question), the context's tokens, and what stands behind it, where
    anything does. Its positions are two, 0 and 1: the start of the answer and its end. The classes
    of both are the tokens of the row, and of these only token 0 (no answer in this window) and the
    context may be chosen; the others have probability 0.
    """

    at_tokens = False
    classes_are_tokens = True
    required_columns = (
        *("num_segments", "segments", "positions", "labels"),
        *("reference_bytes", "reference"),
    )

    def check(self, block: Block, num_classes: int) -> None:
        assert block.num_segments is not None  # a manifest of windows without is refused
        assert block.labels is not None
        parts = (block.num_segments >= 2) & (block.num_segments <= 3)
        places = np.array_equal(block.positions, np.tile(PLACES, len(block.row_ids)))
        if not (parts.all() and places and (block.num_positions == len(PLACES)).all()):
            raise _no_windows("two or three parts, and the positions 0 and 1")
        if block.num_tokens.max(initial=0) > num_classes:
            raise _no_windows(f"at most {num_classes} tokens")
        first, behind = np.repeat(bounds_of(block), len(PLACES), axis=0).T
        inside = (block.labels >= first) & (block.labels < behind)
        if not (inside | (block.labels == NO_ANSWER)).all():
            raise _no_windows("labels that are tokens of the context, or 0")


LAYOUTS: dict[Layout, RowLayout] = {
    layout.name: layout
    for layout in (
        RowLayout("tokens"),
        OfRows("row"),
        Outputs("outputs"),
        Window("window"),
        Pair("pair"),
    )
}


def bounds_of(block: Block) -> np.ndarray:
    """First token of each window's context, and the token behind its last: i32 [R, 2].

    For the rows of a block that `Window.check` let pass.
    """
    assert block.segments is not None  # a cache of windows has them
    assert block.num_segments is not None
    first = np.cumsum(block.num_segments) - block.num_segments
    before = block.segments[first]
    return np.stack((before, before + block.segments[first + 1]), axis=1).astype(np.int32)


def _no_windows(expected: str) -> CorruptCache:
    return CorruptCache(
        f"segments, positions, labels: expected of each row {expected}. "
        "Run cache-teacher verify CACHE --drop-bad, then run again."
    )
