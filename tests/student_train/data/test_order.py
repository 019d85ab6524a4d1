from collections.abc import Iterator
from fractions import Fraction
from itertools import combinations, count, islice, pairwise

import numpy as np
import pytest

from student_train.data import order as order_module
from student_train.data.order import Order, OrderSpec, Part, Step, accumulation_for, permute, split

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


# ---- Parts mixed by weight


def endless(blocks: int, key: int, part: int) -> Iterator[int]:
    """The blocks of a part, pass after pass, one at a time."""
    for number in count():
        pass_key = mix(mix(key, 2 * number), part)
        for index in range(blocks):
            yield network(index, blocks, pass_key, (0, 1, 2, 3)) if blocks > 1 else 0


def slow_mixed_windows(
    block_rows: np.ndarray, row_tokens: np.ndarray, spec: OrderSpec, parts: list[Part], windows: int
) -> tuple[list[list[int]], int]:
    """Blocks of the first windows, each part walked block by block; and the windows of an epoch."""
    row_starts = np.cumsum(block_rows) - block_rows
    tokens = [int(row_tokens[s : s + n].sum()) for s, n in zip(row_starts, block_rows, strict=True)]
    first = np.cumsum([0, *(part.blocks for part in parts)]).tolist()
    totals = [sum(tokens[a:b]) for a, b in pairwise(first)]
    weights = [Fraction(part.weight) for part in parts]
    longest = max(t / w for t, w in zip(totals, weights, strict=True))
    blocks = sum(
        part.blocks * longest * w / t for part, w, t in zip(parts, weights, totals, strict=True)
    )
    per_epoch = -(-blocks // spec.window_blocks)
    found: list[list[int]] = [[] for _ in range(windows)]
    for part, weight in enumerate(weights):
        at, quota = 0, weight * longest / per_epoch
        for block in endless(parts[part].blocks, spec.seed, part):
            window = int(at / quota)
            if window >= windows:
                break
            found[window].append(block + first[part])
            at += tokens[block + first[part]]
    return found, int(per_epoch)


@pytest.mark.parametrize("chunk", [1, 100, 1 << 16])
@pytest.mark.parametrize("window_blocks", [1, 3, 64])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, 2.0), (5.0, 0.7)])
def test_mixed_windows_equal_parts_walked_block_by_block(
    weights, window_blocks, chunk, monkeypatch
):
    monkeypatch.setattr(order_module, "_CHUNK", chunk)
    block_rows, row_tokens = lengths_and_blocks(120, seed=window_blocks)
    spec = OrderSpec(batch_tokens=90, seed=11, window_blocks=window_blocks)
    parts = [Part(len(block_rows) - 5, weights[0]), Part(5, weights[1])]
    order = Order(block_rows, row_tokens, spec, parts)
    windows = min(40, 3 * order.windows_per_epoch)
    blocks, per_epoch = slow_mixed_windows(block_rows, row_tokens, spec, parts, windows)
    assert order.windows_per_epoch == per_epoch
    starts = np.cumsum(block_rows) - block_rows
    expected = []
    for window, some in enumerate(blocks):
        rows = [int(starts[block]) + row for block in some for row in range(block_rows[block])]
        key = mix(spec.seed, 2 * (window // per_epoch) + 1)
        inside = [network(i, len(rows), key, (0, 1, 2, 3)) for i in range(len(rows))]
        expected += [(rows[i], window) for i in inside]
    steps = slow_steps([row for row, _ in expected], row_tokens, 90)[:-1]  # the last may go on
    found = list(islice(order.steps(), len(steps)))
    assert as_lists(found) == steps
    in_windows = np.concatenate([step.windows for step in found]).tolist()
    assert in_windows == [window for _, window in expected][: len(in_windows)]


def test_mixed_steps_never_change():
    spec = OrderSpec(batch_tokens=20, seed=3, window_blocks=4)
    parts = [Part(5, 1.0), Part(3, 3.0)]
    order = Order(np.full(8, 2), np.arange(1, 17), spec, parts)
    assert as_lists(list(islice(order.steps(), 9))) == [
        [7],
        [14],
        [13, 0, 2],
        [6],
        [15],
        [10, 3],
        [11],
        [12, 1],
        [9],
    ]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 9.0), (0.35, 0.05)])
def test_shares_of_tokens_are_as_asked_in_every_window(weights):
    """To within one block of each part, however large the parts are."""
    block_rows, row_tokens = lengths_and_blocks(4000, seed=8)
    few = len(block_rows) // 10
    parts = [Part(len(block_rows) - few, weights[0]), Part(few, weights[1])]
    spec = OrderSpec(batch_tokens=500, window_blocks=64)
    order = Order(block_rows, row_tokens, spec, parts)
    block_starts = np.cumsum(block_rows) - block_rows
    largest_block = np.add.reduceat(row_tokens, block_starts).max()
    first_row = block_starts[parts[0].blocks]
    steps = list(islice(order.steps(), 400))
    rows, windows = (
        np.concatenate([getattr(s, name) for s in steps]) for name in ("rows", "windows")
    )
    assert windows[-1] >= 5
    quotas = []
    for window in range(int(windows[-1])):
        tokens, second = row_tokens[rows[windows == window]], rows[windows == window] >= first_row
        quotas.append((int(tokens[~second].sum()), int(tokens[second].sum())))
    for one, other in quotas:
        v = (one + other) / sum(weights)
        assert abs(one - v * weights[0]) <= 2 * largest_block
        assert abs(other - v * weights[1]) <= 2 * largest_block
    whole = np.sum(quotas, axis=0)
    assert whole[1] / whole.sum() == pytest.approx(weights[1] / sum(weights), abs=0.02)


def test_a_mixed_epoch_reads_the_part_with_most_tokens_per_weight_once():
    block_rows = np.full(30, 2)
    order = Order(
        block_rows,
        np.full(60, 5),
        OrderSpec(batch_tokens=5, window_blocks=7, epochs=2),
        [Part(20, 1.0), Part(10, 2.0)],
    )
    steps = list(order.steps())
    assert len(steps) == order.steps_for_epochs(2) == 2 * order.steps_for_epochs(1)
    rows = np.concatenate([step.rows for step in steps])
    assert np.bincount(rows[: len(rows) // 2]).tolist() == [1] * 40 + [4] * 20


@pytest.mark.parametrize("chunk", [1, 64, 1 << 16])
def test_starting_at_a_mixed_step_equals_the_rest_of_the_sequence(chunk, monkeypatch):
    monkeypatch.setattr(order_module, "_CHUNK", chunk)
    block_rows, row_tokens = lengths_and_blocks(150, seed=4)
    spec = OrderSpec(batch_tokens=130, window_blocks=3)
    parts = [Part(7, 2.0), Part(len(block_rows) - 7, 0.5)]
    made = lambda: Order(block_rows, row_tokens, spec, parts)  # noqa: E731
    uninterrupted = as_lists(list(islice(made().steps(), 120)))
    used_before = made()
    for start in (117, 0, 1, 64, 17, 116):
        for order in (made(), used_before):
            assert as_lists(list(islice(order.steps(start), 3))) == uninterrupted[start : start + 3]


def test_parts_that_are_no_mixture_are_named():
    rows = np.full(4, 2), np.full(8, 5)
    with pytest.raises(ValueError, match="parts of 3 blocks, but there are 4"):
        Order(*rows, OrderSpec(batch_tokens=5), [Part(3, 1.0)])
    with pytest.raises(ValueError, match="at least one block and a weight above 0"):
        Part(3, 0.0)
