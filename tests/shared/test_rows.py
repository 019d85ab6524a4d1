"""Rows of a cache: how often blocks are decoded for them, slices, and what they say of the teacher.

P positions of a row, C classes, E entries of all positions.
"""

import threading

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shared import cache as cache_module
from shared import open_cache
from shared.cache import Cache
from shared.errors import ConfigError

SMALL = {"limit_documents": 40, "max_length": 64, "shard_tokens": 700, "device": "cpu"}
FLOAT32 = 2e-5  # the same logits from another batch, after a softmax


@pytest.fixture
def decodes(monkeypatch):
    """The number of every block that is decoded, in turn."""
    numbers, original = [], Cache.read_block

    def read_block(self, block, **options):
        numbers.append(block)
        return original(self, block, **options)

    monkeypatch.setattr(Cache, "read_block", read_block)
    return numbers


@pytest.fixture
def cache(cache_dir):
    found = open_cache(cache_dir)
    assert found.num_blocks > 2 * cache_module._KEPT_BLOCKS
    return found


def ids_of(rows):
    return [row.row_id for row in rows]


def test_rows_in_order_decode_each_block_once(cache, decodes):
    for read in (
        lambda: list(cache),
        lambda: [cache[index] for index in range(len(cache))],
        lambda: cache[:],
    ):
        decodes.clear()
        cache._decoded.clear()
        assert len(read()) == len(cache)
        assert decodes == list(range(cache.num_blocks))


def test_two_readers_in_turn_decode_each_block_once_for_each(cache, decodes):
    half = len(cache) // 2
    for index in range(half):
        assert cache[index].row_id < cache[half + index].row_id
    assert len(decodes) <= cache.num_blocks + 1  # one block may lie on either side


def test_a_list_of_rows_decodes_each_block_once_in_any_order(cache, decodes):
    numbers = torch.randperm(len(cache), generator=torch.Generator().manual_seed(1)).tolist()
    found = cache[numbers]
    assert decodes == list(range(cache.num_blocks))
    assert ids_of(found) == [cache[number].row_id for number in numbers]


def test_few_blocks_are_kept_and_the_one_used_longest_ago_goes_first(cache, decodes, monkeypatch):
    first = np.cumsum([0, *cache.block_rows.tolist()])[:-1].tolist()
    monkeypatch.setattr(cache_module, "_KEPT_BLOCKS", 2)
    for block in (0, 1, 0, 2, 0, 1, 2):
        cache[first[block]]
    assert decodes == [0, 1, 2, 1, 2]
    decodes.clear()
    monkeypatch.setattr(cache_module, "_KEPT_BYTES", 1)  # of large blocks only the last one
    for block in (3, 3, 4, 4, 3):
        cache[first[block]]
    assert decodes == [3, 4, 3]


def test_slices_and_lists_are_those_of_a_list(cache):
    expected = ids_of(cache)
    count = len(expected)
    for part in (
        slice(0, 3),
        slice(None),
        slice(-3, None),
        slice(5, 2),
        slice(None, None, -7),
        slice(2, 2 * count, 9),
    ):
        assert ids_of(cache[part]) == expected[part]
    for numbers in (
        [3, 1, 2],
        (0, -1, 0),
        [],
        range(4),
        np.array([count - 1, -count]),
        torch.tensor([7, 5]),
    ):
        assert ids_of(cache[numbers]) == [expected[int(number)] for number in numbers]
    assert ids_of(cache[iter([1, 2])]) == expected[1:3]


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize("kind", [int, np.int64, np.uint8, torch.tensor])
def test_one_row_by_any_whole_number(cache, number, kind):
    if kind is np.uint8 and number < 0:
        number = 200
    assert cache[kind(number)].row_id == ids_of(cache)[number]


@pytest.mark.parametrize("wrong", [1.0, "1", b"1", None, True, np.True_, np.float32(1)])
def test_what_is_no_number_of_a_row_is_said(cache, wrong):
    for index in (wrong, [0, wrong]):
        with pytest.raises(TypeError, match=r"expected the number of a row, a slice or several"):
            cache[index]


def test_a_number_out_of_range_is_named_in_a_list_too(cache):
    count = len(cache)
    for index in ([0, count], np.array([-count - 1])):
        with pytest.raises(IndexError, match=rf"row -?\d+ of a cache with {count} rows"):
            cache[index]


def test_a_row_may_be_changed_without_changing_the_next_one_read(cache):
    first, again = cache[5], cache[5]
    for name in ("input_ids", "labels", "positions", "label_logprob", "entropy"):
        before = getattr(again, name).clone()
        getattr(first, name).fill_(7)
        assert torch.equal(getattr(again, name), before)
        assert torch.equal(getattr(cache[5], name), before)
    first.targets.logprobs.fill_(7)
    first.targets.log_partition_ratio[2.0].fill_(7)
    first.hidden[-1].fill_(7)
    after = cache[5]
    assert torch.equal(after.targets.logprobs, again.targets.logprobs)
    ratios = [row.targets.log_partition_ratio[2.0] for row in (after, again)]
    assert torch.equal(*ratios)
    assert torch.equal(after.hidden[-1], again.hidden[-1])


def test_many_threads_get_the_rows_that_one_gets(cache, monkeypatch):
    monkeypatch.setattr(cache_module, "_KEPT_BLOCKS", 2)  # so that blocks come and go meanwhile
    expected, barrier, read = ids_of(cache), threading.Barrier(4), {}

    def work(seed):
        numbers = torch.randperm(len(expected), generator=torch.Generator().manual_seed(seed))
        barrier.wait()
        read[seed] = [(number, cache[number].row_id) for number in numbers.tolist()]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read.keys() == {0, 1, 2, 3}  # a thread that failed is not there
    for found in read.values():
        assert all(row_id == expected[number] for number, row_id in found)


# What a row says of its teacher


@pytest.fixture(scope="module")
def live(teacher_dir):
    """The teacher's log-probabilities at every position of a row: float64 [P, C]."""
    model = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32).eval()

    def logprobs_of(row):
        with torch.no_grad():
            return model(row.input_ids[None]).logits[0, :-1].double().log_softmax(dim=1)

    return logprobs_of


def test_a_row_has_the_log_probability_of_its_labels_and_the_entropy(cache, live):
    step = np.log(cache.manifest.targets.num_classes) / 255
    for row in cache[::40]:
        live_PC = live(row)
        of_label_P = live_PC.gather(1, row.labels[:, None])[:, 0]
        entropy_P = -(live_PC.exp() * live_PC).sum(dim=1)
        assert row.label_logprob.dtype == row.entropy.dtype == torch.float32
        torch.testing.assert_close(
            row.label_logprob.double(), of_label_P, rtol=2**-11, atol=FLOAT32
        )
        torch.testing.assert_close(row.entropy.double(), entropy_P, rtol=0, atol=step / 2 + FLOAT32)


KINDS = {
    "topk": {"targets": "topk", "top_k": 12, "value_bits": 16, "temperature": (0.7, 2.0)},
    "adaptive": {
        "targets": "adaptive",
        "mean_entries": 8,
        "value_bits": 16,
        "temperature": (0.7, 2.0),
    },
    "dense": {"targets": "dense"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_targets_at_a_temperature_are_the_softmax_at_it(kind, capture, live):
    cache = open_cache(capture(**SMALL, **KINDS[kind]))
    assert cache[0].targets.log_partition_ratio.keys() == set(cache.manifest.targets.temperatures)
    for row in cache[::9]:
        for temperature in (0.7, 1, 2.0):
            found, live_PC = row.targets.at_temperature(temperature), live(row)
            exact_PC = (live_PC / temperature).softmax(dim=1)
            for place in range(len(row.positions)):
                ids, logprobs = found.entries(place)
                # Halves down to -16 at temperature 1, and a step of the stored sum.
                torch.testing.assert_close(
                    logprobs.double().exp(), exact_PC[place, ids], rtol=2**-6, atol=1e-5
                )
                tail = 1 - exact_PC[place, ids].sum()
                assert abs(float(found.tail_mass[place]) - float(tail)) < 5e-3


def test_a_temperature_that_is_not_stored_is_refused_with_those_that_are(cache, capture):
    with pytest.raises(ConfigError, match=r"temperature 3: this cache has targets at 1, 2\. Cache"):
        cache[0].targets.at_temperature(3.0)
    sample = open_cache(capture(**SMALL, targets="sample", mean_entries=8))
    with pytest.raises(ConfigError, match=r"temperature 2: this cache has targets at 1\. Cache"):
        sample[0].targets.at_temperature(2.0)


def test_a_cache_without_targets_says_nothing_of_them(labels_dir):
    row = open_cache(labels_dir)[3]
    assert row.targets is row.label_logprob is row.entropy is None
