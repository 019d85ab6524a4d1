"""Row layouts: where positions are by default, and what a block of each may look like."""

import numpy as np
import pytest

from shared.errors import CorruptCache
from shared.format.blocks import Block
from shared.format.layouts import LAYOUTS
from shared.format.schema import COLUMN_OF


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_the_traits_of_a_layout_agree(layout):
    assert LAYOUTS[layout.name] is layout
    assert str(layout) == layout.name
    assert not (layout.of_rows and layout.at_tokens)
    assert set(layout.required_columns) <= COLUMN_OF.keys()
    assert layout.longest_row(10, 5) == (16 if layout.has_decoder else 10)
    per_row = layout.positions_per_row(3)
    assert per_row in (0, 3)
    assert layout.one_label_column == (per_row == 0)


@pytest.mark.parametrize("name", ["tokens", "pair", "window"])
def test_positions_are_all_tokens_of_a_segment_but_its_last(name):
    tokens, segments = np.array([5, 3], np.int32), np.array([2, 3, 3], np.int32)
    default = LAYOUTS[name].default_positions
    whole = default(tokens, np.array([4, 2], np.int32), None)
    parts = default(tokens, np.array([3, 2], np.int32), segments)
    assert (whole.tolist(), parts.tolist()) == ([0, 1, 2, 3, 0, 1], [0, 2, 3, 0, 1])


def test_an_output_is_its_own_position():
    tokens, positions = np.array([5, 3], np.int32), np.array([3, 3], np.int32)
    found = LAYOUTS["outputs"].default_positions(tokens, positions, None)
    assert (found.dtype, found.tolist()) == (np.int32, [0, 1, 2, 0, 1, 2])


def block(**changes):
    columns = {
        "row_ids": np.arange(2, dtype=np.uint64),
        "num_tokens": np.array([7, 5], np.int32),
        "num_positions": np.array([2, 2], np.int32),
        "input_ids": np.zeros(12, np.int32),
        "positions": np.array([0, 1, 0, 1], np.int32),
        "segments": np.array([3, 3, 1, 2, 3], np.int32),
        "num_segments": np.array([3, 2], np.int32),
        "labels": np.array([3, 5, 0, 0], np.int32),
    }
    return Block(**columns | {name: np.array(v, np.int32) for name, v in changes.items()})


def test_a_block_of_windows_passes():
    LAYOUTS["window"].check(block(), 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_segments": [4, 1]}, "two or three parts"),
        ({"positions": [0, 1, 1, 0]}, "the positions 0 and 1"),
        ({"num_positions": [3, 1]}, "the positions 0 and 1"),
        ({"num_tokens": [7, 9]}, "at most 8 tokens"),
        ({"labels": [3, 6, 0, 0]}, "labels that are tokens of the context, or 0"),
        ({"labels": [2, 5, 0, 0]}, "labels that are tokens of the context, or 0"),
    ],
)
def test_a_block_that_is_none_of_windows_is_an_error(changes, message):
    with pytest.raises(CorruptCache, match=message):
        LAYOUTS["window"].check(block(**changes), 8)
