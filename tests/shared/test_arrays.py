"""Bits that are mixed and ranges that are joined, against published values and plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.arrays import mixed_bits, ranges


@pytest.mark.parametrize(
    ("seed", "first"),
    [(0, 0xE220A8397B1DCDAF), (1234567, 6457827717110365317)],
)
def test_one_number_is_mixed_as_splitmix64_does(seed, first):
    """The first output of that generator for this seed, as Vigna's splitmix64.c gives it."""
    assert mixed_bits(seed).tolist() == [first]


def slow(*parts):
    """The generator's step in Python's integers, over each number in turn."""
    bits, mask = 0, 2**64 - 1
    for part in parts:
        bits = ((bits ^ part) + 0x9E3779B97F4A7C15) & mask
        bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 & mask
        bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB & mask
        bits ^= bits >> 31
    return bits


NUMBERS = st.integers(0, 2**64 - 1)


@given(NUMBERS, st.lists(NUMBERS, min_size=1, max_size=5))
def test_arrays_are_mixed_number_by_number(seed, numbers):
    found = mixed_bits(seed, np.array(numbers, np.uint64), np.arange(len(numbers)))
    assert found.dtype == np.uint64
    assert found.tolist() == [slow(seed, n, place) for place, n in enumerate(numbers)]


def test_bits_that_caches_were_made_with():
    """Other ones would draw other classes: a cache could not be continued."""
    assert mixed_bits(0, 0).tolist() == [0xA706DD2F4D197E6F]
    assert mixed_bits(0, np.array([1 << 24, 7], np.uint64), np.array([0, 63])).tolist() == [
        slow(0, 1 << 24, 0),
        slow(0, 7, 63),
    ]


@pytest.mark.parametrize(
    "parts",
    [
        (0, np.arange(1 << 16)),
        (np.arange(1 << 16), 0),
        (7, np.repeat(np.arange(256) << 24, 256), np.tile(np.arange(256), 256)),
    ],
    ids=["the last counts", "the first counts", "row ids and positions"],
)
@pytest.mark.parametrize("shift", [0, 11, 28, 56])
def test_any_eight_bits_are_uniform(parts, shift):
    """Chi-square over 255 degrees of freedom: mean 255, deviation 22.6, so within 5 of these."""
    cells = np.bincount((mixed_bits(*parts) >> np.uint64(shift)) & np.uint64(255), minlength=256)
    expected = (1 << 16) / 256
    assert abs(((cells - expected) ** 2 / expected).sum() - 255) < 5 * np.sqrt(2 * 255)


def test_every_bit_depends_on_every_bit():
    """One bit of one part changed: each of the 64 changes half the time, over 4,096 trials."""
    numbers = np.random.default_rng(0).integers(0, 2**64, 4096, np.uint64)
    for bit in range(0, 64, 7):
        flipped = numbers ^ np.uint64(1 << bit)
        for one, other in (
            (mixed_bits(numbers, 3), mixed_bits(flipped, 3)),
            (mixed_bits(3, numbers), mixed_bits(3, flipped)),
        ):
            changes = np.unpackbits((one ^ other).view(np.uint8)).reshape(-1, 64).mean(axis=0)
            assert np.abs(changes - 0.5).max() < 5 * 0.5 / np.sqrt(4096)


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(0, 9)), max_size=20))
def test_ranges_are_joined(pairs):
    starts, counts = np.array(pairs, np.int64).reshape(-1, 2).T
    expected = [number for start, count in pairs for number in range(start, start + count)]
    found = ranges(starts, counts.astype(np.int32))
    assert found.dtype == np.int64
    assert found.tolist() == expected
