"""Forward batches against a list of (row, token, next token), written out one by one."""

import numpy as np
import pytest
import torch

from teacher_cache.engines.batches import ForwardBatch, forward_batches
from teacher_cache.tasks.rows import TrainingRow


def random_window(seed: int, count: int, *, packed: bool) -> list[TrainingRow]:
    """Rows of 2 to 40 tokens; packed ones consist of several segments."""
    generator = np.random.default_rng(seed)
    window = []
    for index in range(count):
        segments = generator.integers(2, 11, generator.integers(1, 5) if packed else 1)
        size = int(segments.sum()) if packed else int(generator.integers(2, 41))
        parts = tuple(segments.tolist()) if packed else (size,)
        ids = generator.integers(1, 1000, size).astype(np.int32)
        window.append(TrainingRow(index << 24, ids, parts))
    return window


def expected_positions(window: list[TrainingRow]) -> list[tuple[int, int, int, int]]:
    """(row, place in the row, token, next token) of every position of the window, in row order."""
    listed = []
    for index, row in enumerate(window):
        place = 0
        for size in row.segments:
            for offset in range(size - 1):
                at = place + offset
                token, following = int(row.input_ids[at]), int(row.input_ids[at + 1])
                listed.append((index, at, token, following))
            place += size
    return listed


def positions_of(batch: ForwardBatch) -> list[tuple[int, int, int, int, int]]:
    """(place in the window, row, place in the row, token read, label) of a batch's positions."""
    width = batch.inputs.input_ids.shape[1]
    flat = batch.inputs.input_ids.flatten()
    lines = zip(
        batch.window_index.tolist(),
        batch.inputs.position_index.tolist(),
        batch.labels.tolist(),
        strict=True,
    )
    return [
        (into, batch.rows[at // width], at % width, int(flat[at]), label)
        for into, at, label in lines
    ]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("forward_tokens", [1, 64, 150, 10_000])
def test_every_position_once_with_its_own_token_and_label(packed, forward_tokens):
    window = random_window(1, 60, packed=packed)
    batches = list(forward_batches(window, forward_tokens, packed=packed))
    found = sorted(position for batch in batches for position in positions_of(batch))
    assert found == [(i, *each) for i, each in enumerate(expected_positions(window))]
    assert sorted(row for batch in batches for row in batch.rows) == list(range(len(window)))


@pytest.mark.parametrize("packed", [False, True])
def test_padding_stays_within_the_budget_unless_a_row_is_alone(packed):
    window = random_window(2, 80, packed=packed)
    for batch in forward_batches(window, 100, packed=packed):
        assert batch.inputs.input_ids.numel() <= 100 or len(batch.rows) == 1
        lengths = [len(window[row].input_ids) for row in batch.rows]
        assert batch.inputs.input_ids.shape == (len(batch.rows), max(lengths))


def test_rows_longer_than_the_budget_go_alone():
    window = random_window(3, 5, packed=False)
    batches = list(forward_batches(window, 1, packed=False))
    assert [len(batch.rows) for batch in batches] == [1] * 5


def test_longest_rows_first_and_ties_in_row_order():
    lengths = [3, 9, 3, 5, 9, 5]
    window = [TrainingRow(0, np.arange(1, n + 1, dtype=np.int32), (n,)) for n in lengths]
    batches = forward_batches(window, 18, packed=False)
    assert [batch.rows for batch in batches] == [(1, 4), (3, 5, 0), (2,)]


def test_a_padded_batch_masks_exactly_its_padding():
    window = random_window(4, 20, packed=False)
    for batch in forward_batches(window, 200, packed=False):
        assert batch.inputs.position_ids is None
        for line, row in enumerate(batch.rows):
            size = len(window[row].input_ids)
            ids, mask = batch.inputs.input_ids[line], batch.inputs.attention_mask[line]
            assert ids[:size].tolist() == window[row].input_ids.tolist()
            assert mask.tolist() == [1] * size + [0] * (len(ids) - size)


def test_a_packed_batch_counts_positions_anew_in_each_segment_and_in_the_padding():
    row = TrainingRow(0, np.arange(10, 17, dtype=np.int32), (3, 4))
    longer = TrainingRow(1, np.arange(20, 29, dtype=np.int32), (9,))
    (batch,) = forward_batches([row, longer], 100, packed=True)
    assert batch.rows == (1, 0)
    assert batch.inputs.attention_mask is None
    assert batch.inputs.position_ids.tolist() == [list(range(9)), [0, 1, 2, 0, 1, 2, 3, 0, 1]]


def test_indices_are_int64_and_labels_never_come_from_the_padding():
    window = random_window(5, 30, packed=True)
    for batch in forward_batches(window, 300, packed=True):
        for tensor in (batch.labels, batch.window_index, batch.inputs.position_index):
            assert tensor.dtype == torch.int64
        assert int(batch.labels.min()) > 0  # padding is token 0, which no row here has


def test_no_rows_no_batches():
    assert list(forward_batches([], 100, packed=False)) == []
