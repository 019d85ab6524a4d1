"""Hidden states: lossless planes, and statistics that do not depend on how they were collected."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.hidden import ChannelStatistics, bf16_to_float32, decode_bf16, encode_bf16

EVERY_PATTERN = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)


def random_states(rng, rows, width=5):
    """Channels with very different means and deviations, as real ones have."""
    values = rng.normal(size=(rows, width)) * [1, 1e-3, 50, 1, 1e4] + [0, 1, 900, -3, 0]
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.uint16).numpy()


def test_every_bit_pattern_round_trips():
    planes = encode_bf16(EVERY_PATTERN)
    assert [plane.shape for plane in planes] == [(1 << 16,)] * 2
    assert np.array_equal(decode_bf16(planes, 256), EVERY_PATTERN)


def test_no_positions_round_trip():
    assert decode_bf16(encode_bf16(EVERY_PATTERN[:0]), 256).shape == (0, 256)


def test_float32_values_are_those_of_torch():
    expected = torch.from_numpy(EVERY_PATTERN).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(bf16_to_float32(EVERY_PATTERN), expected)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(0, 20), min_size=1, max_size=5))
def test_merged_statistics_equal_those_of_all_states_at_once(seed, sizes):
    parts = [random_states(np.random.default_rng([seed, i]), n) for i, n in enumerate(sizes)]
    merged = ChannelStatistics.of(parts[0])
    for part in parts[1:]:
        merged = merged.merge(ChannelStatistics.of(part))
    values = bf16_to_float32(np.concatenate(parts)).astype(np.float64)
    assert merged.count == len(values) == sum(sizes)
    if len(values):  # float64 throughout: only rounding differs
        np.testing.assert_allclose(merged.mean, values.mean(axis=0), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(merged.std, values.std(axis=0), rtol=1e-9, atol=1e-9)


def test_a_large_mean_does_not_swallow_a_small_deviation():
    rng = np.random.default_rng(0)
    steps = rng.integers(0, 3, 1000)  # 1024, 1032 or 1040: neighbours in bfloat16
    states = torch.tensor(1024.0 + 8 * steps).to(torch.bfloat16).view(torch.uint16).numpy()
    found = ChannelStatistics.of(states[:, None])
    assert found.std[0] == pytest.approx(8 * steps.std(), rel=1e-12)
