from itertools import combinations, islice, pairwise

import numpy as np
import pytest

from student_train import order as order_module
from student_train.order import Order, OrderSpec, Step, accumulation_for, permute, split

WORD = (1 << 64) - 1


def scramble(word: int) -> int:
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & WORD
    return word ^ word >> 31


def mix(key: int, number: int) -> int:
    return scramble((key + (number + 1) * 0x9E3779B97F4A7C15) & WORD)


def network(index: int, n: int, key: int, rounds: tuple[int, ...]) -> int:
    """The Feistel network one index at a time, in Python integers; rounds (3, 2, 1, 0) undo it."""
    bits = (n - 1).bit_length()
    low_bits = bits - bits // 2
    while True:
        high, low = index >> low_bits, index & ((1 << low_bits) - 1)
        for number in rounds:
            if number % 2 == 0:
                low ^= scramble(high ^ mix(key, number)) & ((1 << low_bits) - 1)
            else:
                high ^= scramble(low ^ mix(key, number)) & ((1 << bits // 2) - 1)
        index = high << low_bits | low
        if index < n:
            return index


def lengths_and_blocks(rows: int, seed: int, longest: int = 60) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    cuts = np.flatnonzero(generator.random(rows - 1) < 0.3) + 1
    block_rows = np.diff([0, *cuts.tolist(), rows])
    return block_rows, generator.integers(1, longest, rows).astype(np.int32)


def slow_rows(block_rows: np.ndarray, spec: OrderSpec, epochs: int) -> list[tuple[int, int]]:
    """(row, window) of every row of some epochs, block by block."""
    starts = np.cumsum(block_rows) - block_rows
    blocks, size = len(block_rows), spec.window_blocks
    found, window = [], 0
    for epoch in range(epochs):
        order = [network(b, blocks, mix(spec.seed, 2 * epoch), (0, 1, 2, 3)) for b in range(blocks)]
        for first in range(0, blocks, size):
            rows = [
                starts[block] + row
                for block in order[first : first + size]
                for row in range(block_rows[block])
            ]
            key = mix(spec.seed, 2 * epoch + 1)
            inside = [network(i, len(rows), key, (0, 1, 2, 3)) for i in range(len(rows))]
            found += [(int(rows[i]), window) for i in inside]
            window += 1
    return found


def slow_steps(rows: list[int], row_tokens: np.ndarray, budget: int) -> list[list[int]]:
    steps: list[list[int]] = []
    for row in rows:
        if not steps or sum(row_tokens[r] for r in steps[-1]) + row_tokens[row] > budget:
            steps.append([])
        steps[-1].append(row)
    return steps


def as_lists(steps: list[Step]) -> list[list[int]]:
    return [step.rows.tolist() for step in steps]


@pytest.mark.parametrize("key", [0, 1, 2**64 - 1])
def test_permute_is_a_permutation_of_every_small_range(key):
    for n in range(1, 301):
        assert sorted(permute(np.arange(n), n, key)) == list(range(n))


@pytest.mark.parametrize("n", [1, 2, 3, 1000, 2**20 + 1, 10**9 + 7, 2**40 + 12345])
def test_permute_equals_a_network_in_python_integers_that_can_be_undone(n):
    index = np.random.default_rng(n).integers(0, n, 500)
    found = permute(index, n, key=99)
    assert found.tolist() == [network(int(i), n, 99, (0, 1, 2, 3)) for i in index]
    assert index.tolist() == [network(int(i), n, 99, (3, 2, 1, 0)) for i in found]


def test_permute_never_changes():
    golden = {
        (10, 1): [2, 4, 6, 7, 9, 5, 0, 8],
        (100, 7): [32, 66, 15, 12, 59, 46, 42, 83],
        (10**9, 2**63): [
            290150910,
            492308950,
            194416543,
            98941166,
            401684999,
            187565259,
            966071256,
            606966162,
        ],
    }
    for (n, key), expected in golden.items():
        assert permute(np.arange(8), n, key).tolist() == expected


def test_permute_does_not_depend_on_how_many_indices_are_asked_at_once():
    n = 3 * order_module._CHUNK
    whole = permute(np.arange(n), n, key=5)
    assert np.array_equal(np.sort(whole), np.arange(n))
    assert np.array_equal(whole[-7:], permute(np.arange(n - 7, n), n, key=5))


def test_steps_never_change():
    order = Order(np.full(5, 2), np.arange(1, 11), OrderSpec(batch_tokens=15, seed=3))
    assert as_lists(list(islice(order.steps(), 9))) == [
        [7],
        [8],
        [9, 4],
        [2, 6],
        [5, 0, 3, 1],
        [5],
        [9, 4],
        [1, 8, 0],
        [7, 6],
    ]


@pytest.mark.parametrize("window_blocks", [1, 2, 7, 256])
@pytest.mark.parametrize("batch_tokens", [1, 50, 300, 10_000])
def test_steps_equal_blocks_and_rows_permuted_one_by_one(window_blocks, batch_tokens, monkeypatch):
    monkeypatch.setattr(order_module, "_CHUNK", 64)  # so that steps reach over chunks too
    block_rows, row_tokens = lengths_and_blocks(200, seed=window_blocks)
    spec = OrderSpec(batch_tokens=batch_tokens, seed=11, window_blocks=window_blocks, epochs=3)
    steps = list(Order(block_rows, row_tokens, spec).steps())
    expected = slow_rows(block_rows, spec, epochs=3)
    assert as_lists(steps) == slow_steps([row for row, _ in expected], row_tokens, batch_tokens)
    assert np.concatenate([step.windows for step in steps]).tolist() == [w for _, w in expected]
    assert [step.number for step in steps] == list(range(len(steps)))


def test_every_row_comes_once_per_epoch_and_epochs_differ():
    block_rows, row_tokens = lengths_and_blocks(500, seed=1)
    order = Order(block_rows, row_tokens, OrderSpec(batch_tokens=1, window_blocks=16))
    epochs = [[int(s.rows[0]) for s in islice(order.steps(500 * e), 500)] for e in range(3)]
    assert [sorted(rows) for rows in epochs] == [list(range(500))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


def test_a_block_is_in_one_window_of_an_epoch():
    block_rows, row_tokens = lengths_and_blocks(300, seed=2)
    order = Order(block_rows, row_tokens, OrderSpec(batch_tokens=99, window_blocks=5, epochs=1))
    block_of_row = np.repeat(np.arange(len(block_rows)), block_rows)
    pairs = {
        (int(block_of_row[row]), int(window))
        for step in order.steps()
        for row, window in zip(step.rows, step.windows, strict=True)
    }
    assert len(pairs) == len(block_rows)


def test_the_order_without_shuffling_is_the_natural_one():
    block_rows, row_tokens = lengths_and_blocks(100, seed=3)
    spec = OrderSpec(batch_tokens=200, window_blocks=4, shuffle=False, epochs=2)
    rows = np.concatenate([step.rows for step in Order(block_rows, row_tokens, spec).steps()])
    assert rows.tolist() == [*range(100), *range(100)]


@pytest.mark.parametrize("chunk", [1, 64, 1 << 16])
def test_starting_at_a_step_equals_the_rest_of_the_sequence(chunk, monkeypatch):
    monkeypatch.setattr(order_module, "_CHUNK", chunk)
    block_rows, row_tokens = lengths_and_blocks(150, seed=4)
    spec = OrderSpec(batch_tokens=130, window_blocks=3)
    uninterrupted = as_lists(list(islice(Order(block_rows, row_tokens, spec).steps(), 120)))
    used_before = Order(block_rows, row_tokens, spec)
    for start in (117, 0, 1, 64, 17, 116):
        for order in (Order(block_rows, row_tokens, spec), used_before):
            assert as_lists(list(islice(order.steps(start), 3))) == uninterrupted[start : start + 3]


def test_steps_for_epochs_counts_the_steps_until_every_row_was_seen():
    block_rows, row_tokens = lengths_and_blocks(150, seed=5)
    for epochs in (1, 2, 5):
        spec = OrderSpec(batch_tokens=130, window_blocks=3, epochs=epochs)
        order = Order(block_rows, row_tokens, spec)
        steps = list(order.steps())
        assert order.steps_for_epochs(epochs) == len(steps)
        assert sum(len(step.rows) for step in steps) == 150 * epochs
        assert list(order.steps(len(steps))) == []


def test_another_seed_is_another_order():
    block_rows, row_tokens = lengths_and_blocks(150, seed=6)
    first, second = (
        next(Order(block_rows, row_tokens, OrderSpec(batch_tokens=900, seed=seed)).steps())
        for seed in (0, 1)
    )
    assert first.rows.tolist() != second.rows.tolist()


def test_neighbouring_rows_of_a_block_are_spread_over_their_window():
    order = Order(np.full(64, 16), np.ones(1024, np.int32), OrderSpec(batch_tokens=1, epochs=1))
    rows = np.concatenate([step.rows for step in order.steps()])
    place = np.argsort(rows)
    # Two random places among 1,024 are 341 apart on average; 16 neighbours kept together, under 16.
    assert 300 < np.abs(np.diff(place)).mean() < 380


def test_lengths_that_do_not_belong_to_the_blocks_are_refused():
    with pytest.raises(ValueError, match="blocks with 4 rows in all, but the lengths of 5 rows"):
        Order(np.array([2, 2]), np.ones(5, np.int32), OrderSpec(batch_tokens=1))
    with pytest.raises(ValueError, match="at least 1"):
        Order(np.array([], np.int64), np.array([], np.int32), OrderSpec(batch_tokens=1))


@pytest.mark.parametrize("field", ["batch_tokens", "window_blocks", "epochs"])
def test_a_spec_of_nothing_is_refused(field):
    with pytest.raises(ValueError, match="must be at least 1"):
        OrderSpec(**{"batch_tokens": 1, field: 0})


def test_split_finds_the_smallest_largest_padded_size():
    generator = np.random.default_rng(0)
    for _ in range(60):
        rows, groups = int(generator.integers(1, 9)), int(generator.integers(1, 6))
        lengths = generator.integers(1, 30, rows)
        parts = split(lengths, groups)
        descending = sorted(lengths.tolist(), reverse=True)
        sizes = [
            max((end - begin) * descending[begin] for begin, end in pairwise([0, *cuts, rows]))
            for count in range(min(groups, rows))
            for cuts in combinations(range(1, rows), count)
        ]
        assert max(len(part) * lengths[part].max() for part in parts if len(part)) == min(sizes)
        assert len(parts) == groups
        assert sorted(np.concatenate(parts).tolist()) == list(range(rows))


def test_split_keeps_equal_lengths_in_order_and_leaves_groups_empty():
    parts = split(np.array([5, 9, 5, 9]), 6)
    assert [part.tolist() for part in parts] == [[1], [3], [0], [2], [], []]
    many = np.random.default_rng(0).choice([5, 9], 300)
    assert split(many, 1)[0].tolist() == sorted(range(300), key=lambda i: -many[i])


def test_accumulation_covers_the_batch():
    assert accumulation_for(16384, 4096, world_size=1) == 4
    assert accumulation_for(16384, 4096, world_size=3) == 2
    assert accumulation_for(1000, 4096, world_size=8) == 1
