import subprocess
import sys
import threading
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from shared.format.blocks import Block
from shared.targets.record import Target
from student_train.data.collate import ReadWindow
from student_train.data.order import Order, OrderSpec, Part, split
from student_train.data.stream import BatchStream, StreamSpec, _Background

K, D, LAYER = 3, 4, -1
JOIN_SECONDS = 20


class FakeCache:
    """What BatchStream uses of a cache. Every value says which row and which token it is from."""

    def __init__(
        self,
        rows=60,
        *,
        packed=False,
        labels=False,
        targets=True,
        ragged=False,
        hidden_every=1,
        seed=0,
    ):
        generator = np.random.default_rng(seed)
        cuts = np.flatnonzero(generator.random(rows - 1) < 0.4) + 1
        self.block_rows = np.diff([0, *cuts.tolist(), rows])
        self.block_starts = np.cumsum(self.block_rows) - self.block_rows
        parts = generator.integers(1, 4, rows) if packed else np.ones(rows, int)
        self.segments = [generator.integers(2, 12, count).astype(np.int32) for count in parts]
        self.positions = [
            np.concatenate([np.arange(n - 1) + s for s, n in zip(np.cumsum(x) - x, x, strict=True)])
            for x in self.segments
        ]
        self.row_tokens = np.array([x.sum() for x in self.segments], np.int32)
        self.row_positions = np.array([len(x) for x in self.positions], np.int32)
        self.row_labels = np.where(np.arange(rows) % 3, 0, self.row_positions)  # one row in three
        self.packed, self.labels, self.targets, self.ragged = packed, labels, targets, ragged
        self.hidden_every = hidden_every
        self.reads: list[int] = []

    def read_block(self, block, *, hidden_layers=(), targets=True, skip=()):
        self.reads.append(block)
        start = self.block_starts[block]
        return self._block(range(start, start + self.block_rows[block]), hidden_layers, targets)

    def empty_block(self, *, hidden_layers=(), targets=True):
        return self._block(range(0), hidden_layers, targets)

    def _block(self, rows, hidden_layers, targets):
        row = np.repeat(rows, self.row_positions[rows])
        none = np.zeros(0, np.int32)
        positions = np.concatenate([none, *(self.positions[r] for r in rows)]).astype(np.int32)
        decoded = Block(
            row_ids=np.array([row_id(r) for r in rows], np.uint64),
            num_tokens=self.row_tokens[rows],
            num_positions=self.row_positions[rows],
            input_ids=np.concatenate(
                [none, *(token(r, np.arange(self.row_tokens[r])) for r in rows)]
            ),
            positions=positions,
            labels=7 * token(row, positions) if self.labels else None,
        )
        if self.packed:
            decoded.segments = np.concatenate([none, *(self.segments[r] for r in rows)])
            decoded.num_segments = np.array([len(self.segments[r]) for r in rows], np.int32)
        if self.targets and targets:
            code = token(row, positions)
            decoded.target = Target(
                ids=code[:, None] * 10 + np.arange(K, dtype=np.int32),
                logprobs=-(code[:, None] + np.arange(K)).astype(np.float32),
                log_tail=-code.astype(np.float32),
            )
            if self.ragged:
                counts = code % 5 + 1
                ids = [c * 10 + np.arange(n) for c, n in zip(code, counts, strict=True)]
                ids = np.concatenate([none, *ids]).astype(np.int32)
                decoded.target = Target(
                    ids, -ids.astype(np.float32), decoded.target.log_tail, counts
                )
            decoded.entropy = 2 * code.astype(np.float32)
            decoded.log_partition_ratio = {2.0: 3 * code.astype(np.float32)}
        for layer in hidden_layers:
            assert layer == LAYER
            of_row = [token(r, self.positions[r][:: self.hidden_every]) for r in rows]
            decoded.hidden[layer] = bfloat16_bits(np.concatenate([none, *of_row]))
        return decoded


def token(row, position):
    return np.asarray(row * 64 + position + 1, np.int32)


def row_id(row):
    return row << 24 | 5


def bfloat16_bits(code: np.ndarray) -> np.ndarray:
    states = torch.from_numpy(code)[:, None].expand(-1, D) % 128 + torch.arange(D) * 128
    return states.to(torch.bfloat16).view(torch.uint16).numpy()


def stream_of(
    cache, *, batch_tokens=70, window_blocks=4, max_steps=25, start=0, seed=0, parts=(), **spec
):
    order_spec = OrderSpec(batch_tokens=batch_tokens, window_blocks=window_blocks, seed=seed)
    order = Order(cache.block_rows, cache.row_tokens, order_spec, parts)
    return BatchStream(
        cache, order, StreamSpec(**spec), max_steps=max_steps, start_step=lambda: start
    )


def rows_of(batch) -> list[int]:
    return [row >> 24 for row in batch["row_ids"].tolist() if row >= 0]


def rows_per_step(cache, world_size: int, accumulation: int, **options) -> list[list[int]]:
    """Rows of every step, sorted, joined over the ranks."""
    steps: list[list[int]] = []
    for rank in range(world_size):
        stream = stream_of(
            cache, world_size=world_size, rank=rank, accumulation=accumulation, **options
        )
        for index, batch in enumerate(stream):
            if index // accumulation == len(steps):
                steps.append([])
            steps[index // accumulation] += rows_of(batch)
    return [sorted(step) for step in steps]


def assert_same(found: list, expected: list) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name


def stream_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name.startswith("batch-stream")]


def test_an_epoch_is_every_row_once():
    cache = FakeCache()
    spec = OrderSpec(batch_tokens=70, window_blocks=4, epochs=2)
    order = Order(cache.block_rows, cache.row_tokens, spec)
    steps = order.steps_for_epochs(2)
    stream = BatchStream(cache, order, StreamSpec(accumulation=2), max_steps=steps)
    batches = list(stream)
    assert len(batches) == len(stream) == 2 * steps
    seen = Counter(row for batch in batches for row in rows_of(batch))
    assert seen == dict.fromkeys(range(60), 2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_step_is_the_same_rows_at_any_world_size(world_size, accumulation):
    cache = FakeCache()
    expected = [sorted(s.rows.tolist()) for s in islice(stream_of(cache).order.steps(), 25)]
    assert rows_per_step(cache, world_size, accumulation) == expected


def test_neighbouring_groups_of_a_split_go_to_different_ranks():
    """So that what the ranks compute at the same time is of about the same size."""
    cache = FakeCache()
    step = next(stream_of(cache).order.steps())
    groups = [step.rows[part].tolist() for part in split(cache.row_tokens[step.rows], 6)]
    for rank in range(3):
        stream = stream_of(cache, world_size=3, rank=rank, accumulation=2)
        assert [sorted(rows_of(batch)) for batch in islice(stream, 2)] == [
            sorted(groups[rank]),
            sorted(groups[rank + 3]),
        ]


def two_parts(cache) -> list[Part]:
    """The first block, so often that windows repeat it, and all others."""
    return [Part(1, 2.0), Part(len(cache.block_rows) - 1, 1.0)]


@pytest.mark.parametrize(("world_size", "accumulation", "threads"), [(1, 2, 3), (3, 1, 1)])
def test_a_mixed_step_is_the_same_rows_at_any_world_size(world_size, accumulation, threads):
    cache, options = FakeCache(), {"parts": two_parts(FakeCache()), "threads": threads}
    steps = list(islice(stream_of(cache, **options).order.steps(), 25))
    assert any(len(set(step.rows.tolist())) < len(step.rows) for step in steps)
    expected = [sorted(step.rows.tolist()) for step in steps]
    assert rows_per_step(cache, world_size, accumulation, **options) == expected


@pytest.mark.parametrize("start", [0, 7, 24])
def test_starting_a_mixed_stream_late_equals_the_rest_of_it(start):
    parts = two_parts(FakeCache())
    whole = list(stream_of(FakeCache(), accumulation=2, parts=parts))
    late = list(stream_of(FakeCache(), accumulation=2, parts=parts, start=start))
    assert_same(late, whole[2 * start :])
    for batch in late:
        code = batch["input_ids"].reshape(-1)[batch["position_index"]]
        assert torch.equal(batch["target_log_tail"], -code.float())


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_batches_do_not_depend_on_the_number_of_threads(threads):
    alone = list(stream_of(FakeCache(), threads=1, hidden_layers=(LAYER,)))
    assert_same(list(stream_of(FakeCache(), threads=threads, hidden_layers=(LAYER,))), alone)


@pytest.mark.parametrize("start", [0, 1, 7, 19, 24, 25, 30])
def test_starting_late_equals_the_rest_of_an_uninterrupted_stream(start):
    whole = list(stream_of(FakeCache(), accumulation=2))
    assert_same(list(stream_of(FakeCache(), accumulation=2, start=start)), whole[2 * start :])


@pytest.mark.parametrize("start", [0, 6, 17])
@pytest.mark.parametrize(("world_size", "rank"), [(1, 0), (4, 3)])
def test_only_blocks_still_trained_on_are_read_and_each_once(start, world_size, rank):
    cache = FakeCache(rows=200)
    stream = stream_of(cache, start=start, world_size=world_size, rank=rank)
    steps = list(islice(stream.order.steps(start), 25 - start))
    window = {(s.number, row): w for s in steps for row, w in zip(s.rows, s.windows, strict=True)}
    block_of_row = np.repeat(np.arange(len(cache.block_rows)), cache.block_rows)
    needed = {
        (window[start + index, row], block_of_row[row])
        for index, batch in enumerate(stream)
        for row in rows_of(batch)
    }
    assert sorted(cache.reads) == sorted(block for _, block in needed)


def test_blocks_are_read_in_the_order_they_are_needed():
    cache = FakeCache(rows=200)
    stream = stream_of(cache, batch_tokens=1, window_blocks=256, max_steps=150, threads=1)
    block_of_row = np.repeat(np.arange(len(cache.block_rows)), cache.block_rows)
    used = [block_of_row[row] for batch in stream for row in rows_of(batch)]
    assert cache.reads == list(dict.fromkeys(used))


def test_a_step_may_be_longer_than_many_windows():
    options = {"batch_tokens": 1500, "window_blocks": 1, "max_steps": 3}
    order = stream_of(FakeCache(), **options).order
    expected = [sorted(step.rows.tolist()) for step in islice(order.steps(), 3)]
    assert len(set(next(order.steps()).windows)) > 10
    assert rows_per_step(FakeCache(), 3, 2, **options) == expected


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("packed_rows", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_every_value_lines_up_with_its_token(packed_rows, labels, every):
    cache = FakeCache(packed=packed_rows, labels=labels, hidden_every=every)
    options = {"accumulation": 2, "temperature": 2.0}
    for batch in stream_of(cache, **options, hidden_layers=(LAYER,), hidden_every=every):
        code = batch["input_ids"].reshape(-1)[batch["position_index"]]
        assert torch.equal(batch["labels"], 7 * code if labels else code + 1)
        assert torch.equal(batch["target_ids"], (code[:, None] * 10 + torch.arange(K)).int())
        assert torch.equal(batch["target_logprobs"], -(code[:, None] + torch.arange(K)).float())
        assert torch.equal(batch["target_log_tail"], -code.float())
        assert torch.equal(batch["entropy"], 2 * code.float())
        assert torch.equal(batch["log_partition_ratio"], 3 * code.float())
        rows = batch["row_ids"].repeat_interleave(batch["input_ids"].shape[1])
        assert torch.equal(rows[batch["position_index"]] >> 24, (code - 1) // 64)
        code = batch["input_ids"].reshape(-1)[batch["hidden_index"]]
        expected = torch.from_numpy(bfloat16_bits(code.numpy())).view(torch.bfloat16)
        assert torch.equal(batch["hidden.-1"], expected)
        in_batch = list(dict.fromkeys(rows_of(batch)))
        kept = [token(row, cache.positions[row][::every]).tolist() for row in in_batch]
        assert code.tolist() == [each for row in kept for each in row]
        numbers = [number for number, row in enumerate(kept) for _ in row]
        assert batch["hidden_row"].tolist() == numbers


def test_types_and_shapes_of_a_micro_batch():
    cache, hidden = FakeCache(hidden_every=2), {"hidden_layers": (LAYER,), "hidden_every": 2}
    batch = next(iter(stream_of(cache, temperature=2.0, **hidden)))
    rows, width = batch["input_ids"].shape
    count = len(batch["position_index"])
    states = sum(-(-int(cache.row_positions[row]) // 2) for row in rows_of(batch))
    assert states < count
    expected = {
        "input_ids": (torch.int64, (rows, width)),
        "attention_mask": (torch.int64, (rows, width)),
        "position_index": (torch.int64, (count,)),
        "labels": (torch.int64, (count,)),
        "row_ids": (torch.int64, (rows,)),
        "num_positions": (torch.int64, ()),
        "num_labels": (torch.int64, ()),
        "target_ids": (torch.int32, (count, K)),
        "target_logprobs": (torch.float32, (count, K)),
        "target_log_tail": (torch.float32, (count,)),
        "log_partition_ratio": (torch.float32, (count,)),
        "entropy": (torch.float32, (count,)),
        "hidden.-1": (torch.bfloat16, (states, D)),
        "hidden_index": (torch.int64, (states,)),
        "hidden_row": (torch.int64, (states,)),
        "num_states": (torch.int64, ()),
        "num_rows": (torch.int64, ()),
    }
    assert {name: (x.dtype, tuple(x.shape)) for name, x in batch.items()} == expected


@pytest.mark.parametrize("packed_rows", [False, True])
def test_segments_become_sequences_padded_on_the_right(packed_rows):
    cache = FakeCache(packed=packed_rows)
    for batch in stream_of(cache):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        lengths = mask.sum(dim=1)
        assert torch.equal(mask, (torch.arange(mask.shape[1]) < lengths[:, None]).long())
        assert lengths.max() == mask.shape[1]
        assert not ids[mask == 0].any()
        found = [row[:length].tolist() for row, length in zip(ids, lengths, strict=True)]
        expected = []
        for row in dict.fromkeys(rows_of(batch)):
            tokens = token(row, np.arange(cache.row_tokens[row]))
            segments = np.split(tokens, np.cumsum(cache.segments[row])[:-1])
            expected += [segment.tolist() for segment in segments]
        assert found == expected


def test_a_rank_without_rows_gets_one_token_and_no_position():
    stream = stream_of(
        FakeCache(),
        batch_tokens=1,
        world_size=2,
        rank=1,
        hidden_layers=(LAYER,),
        max_steps=2,
    )
    alone = next(iter(stream_of(FakeCache(), hidden_layers=(LAYER,))))
    batches = list(stream)
    assert len(batches) == 2
    for batch in batches:
        assert batch.keys() == alone.keys()
        assert batch["input_ids"].tolist() == [[0]]
        assert batch["attention_mask"].tolist() == [[1]]
        assert batch["row_ids"].tolist() == [-1]
        assert batch["num_positions"] > 0
        for name in alone.keys() - {"input_ids", "attention_mask", "row_ids"}:
            assert batch[name].dtype == alone[name].dtype
            count = name in ("num_positions", "num_labels", "num_states", "num_rows")
            assert count or batch[name].shape == (0, *alone[name].shape[1:])


def test_counts_are_those_of_the_whole_step():
    cache = FakeCache(hidden_every=4)
    hidden = {"hidden_layers": (LAYER,), "hidden_every": 4}
    for rank in range(2):
        stream = stream_of(cache, world_size=2, rank=rank, accumulation=3, **hidden)
        steps = stream.order.steps()
        for index, batch in enumerate(stream):
            if index % 3 == 0:
                rows = next(steps).rows.tolist()
                counts = cache.row_positions[rows].tolist()
                labelled = [count for row, count in zip(rows, counts, strict=True) if row % 3 == 0]
            assert batch["num_positions"].item() == sum(counts)
            assert batch["num_labels"].item() == sum(labelled)
            assert batch["num_states"].item() == sum(-(-count // 4) for count in counts)
            assert batch["num_rows"].item() == len(counts)


@pytest.mark.parametrize("read", [True, False])
def test_a_stream_of_hard_labels_has_no_target(read):
    cache = FakeCache(targets=not read)
    batch = next(iter(stream_of(cache, targets=read)))
    assert set(batch) == {
        "input_ids",
        "attention_mask",
        "position_index",
        "labels",
        "row_ids",
        "num_positions",
        "num_labels",
    }


def test_each_iteration_asks_where_to_start():
    steps = iter([3, 5])
    cache = FakeCache()
    stream = stream_of(cache)
    stream.start_step = lambda: next(steps)
    whole = list(stream_of(cache))
    assert_same(list(stream), whole[3:])
    assert_same(list(stream), whole[5:])
    assert len(stream) == 25


def test_a_block_goes_to_its_place_in_the_window():
    window_rows, lengths = np.arange(3), np.array([2, 3, 4])
    no_rows = {"row_ids": np.zeros(0, np.int64), "target_ids": np.zeros((0, K), np.int32)}
    window = ReadWindow(window_rows, lengths + 1, lengths, no_rows, {})
    columns = {"row_ids": np.array([8, 9]), "target_ids": np.full((7, K), 7, np.int32)}
    window.fill(1, 2, columns)
    assert window.columns["row_ids"][1:].tolist() == [8, 9]
    assert (window.columns["target_ids"][2:] == 7).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_ragged_entries_stay_with_their_positions(threads):
    """Windows of 4 blocks, so that entries of many blocks share an array that grows."""
    batches = list(stream_of(FakeCache(rows=200, ragged=True), threads=threads))
    assert sum(len(batch["labels"]) for batch in batches) > 500
    for batch in batches:
        codes = (-batch["target_log_tail"]).int()
        assert torch.equal(batch["target_counts"], codes % 5 + 1)
        ids = [c * 10 + i for c in codes.tolist() for i in range(c % 5 + 1)]
        assert batch["target_ids"].tolist() == ids
        assert batch["target_logprobs"].tolist() == [-i for i in ids]
        tokens = batch["input_ids"].flatten()[batch["position_index"]]
        assert torch.equal(tokens.int(), codes)


class FailingCache(FakeCache):
    """Its block 5 is broken; the message says so."""

    def read_block(self, block, **options):
        if block == 5:
            raise OSError(f"block {block} is broken")
        return super().read_block(block, **options)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_a_thread_reaches_the_consumer(threads):
    cache = FailingCache()
    caught: list[BaseException] = []
    batches: list = []

    def consume():
        try:
            batches.extend(stream_of(cache, threads=threads))
        except OSError as error:
            caught.append(error)

    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    consumer.join(JOIN_SECONDS)
    assert not consumer.is_alive()
    assert [str(error) for error in caught] == ["block 5 is broken"]
    assert not stream_threads()


@pytest.mark.parametrize("threads", [2, 4])
def test_batches_before_a_broken_block_are_the_same_at_any_number_of_threads(threads):
    def until_broken(threads: int) -> list:
        batches: list = []
        with pytest.raises(OSError, match="block 5 is broken"):
            batches.extend(stream_of(FailingCache(rows=200, seed=3), threads=threads))
        assert batches  # extend keeps what came before the error
        return batches

    assert_same(until_broken(threads), until_broken(1))


def test_an_abandoned_iterator_stops_its_threads():
    batches = iter(stream_of(FakeCache(rows=300), max_steps=10_000, threads=3))
    next(batches)
    assert stream_threads()
    del batches
    assert not stream_threads()


def test_an_iterator_that_nobody_closed_does_not_keep_the_process():
    # The second batch says that the next window is being read: the thread has only to wait now.
    script = (
        "from test_stream import FakeCache, stream_of\n"
        "batches = iter(stream_of(FakeCache(), batch_tokens=1, window_blocks=99, max_steps=50))\n"
        "next(batches), next(batches)\n"
        "raise SystemExit(3)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=Path(__file__).parent, timeout=60, check=False
    )
    assert done.returncode == 3


def test_a_waiting_thread_is_at_most_its_depth_ahead_and_can_be_stopped():
    made, four_made = [], threading.Event()

    def numbers():
        for number in range(1_000_000):
            made.append(number)
            if len(made) == 4:
                four_made.set()
            yield number

    background = _Background(numbers(), depth=2)
    assert background.get() == 0
    assert four_made.wait(JOIN_SECONDS)  # one taken, two in the queue, one that must wait
    assert len(made) == 4
    closing = threading.Thread(target=background.close, daemon=True)
    closing.start()
    closing.join(JOIN_SECONDS)
    assert not closing.is_alive()
    assert len(made) == 4


def test_reading_runs_two_windows_and_a_short_queue_ahead():
    cache = FakeCache(rows=600)
    stream = stream_of(cache, max_steps=40)
    steps = list(islice(stream.order.steps(), 40))
    for index, _ in enumerate(stream):
        # Two batches are in the queue and one is made; the window after theirs is being read.
        furthest = int(steps[min(index + 3, 39)].windows[-1]) + 1
        assert len(cache.reads) <= (furthest + 1) * 4


def test_waiting_is_counted():
    stream = stream_of(FakeCache())
    list(stream)
    assert stream.seconds_waited > 0
