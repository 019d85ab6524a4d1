"""Operations on numpy arrays that several modules need."""

import numpy as np


def ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, ... (count numbers) for each start, joined; i64 [sum of counts]."""
    before = np.cumsum(counts) - counts
    return np.repeat(starts - before, counts) + np.arange(counts.sum())


def mixed_bits(*parts: np.ndarray | int) -> np.ndarray:
    """64 bits from several u64 numbers, each bit of which depends on all of them (splitmix64).

    A function of its arguments alone, so the same on any machine and in any order of work.
    """
    bits = np.zeros(1, np.uint64)
    for part in parts:
        bits = bits ^ np.asarray(part, np.uint64)
        bits = bits + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits = bits ^ (bits >> np.uint64(31))
    return bits
