"""Hidden states: how far each codec is off, and statistics however they were collected.

S states, D channels.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.errors import CorruptCache, NonFiniteTargets
from shared.targets.hidden import (
    ChannelScale,
    ChannelStatistics,
    bf16_to_float32,
    decode,
    decode_bf16,
    decode_fp8,
    encode,
    encode_bf16,
    encode_fp8,
    int8_scale,
    num_states,
    plane_bytes,
    squared_errors,
    state_positions,
    without_massive,
)

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


S, D = 400, 96
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()


def bits_of(values):
    return torch.from_numpy(np.asarray(values)).to(torch.bfloat16).view(torch.uint16).numpy()


def values_of(bits):
    return torch.from_numpy(bits.copy()).view(torch.bfloat16).double().numpy()


def drawn(kind):
    """Values [S, D] as trained models have them."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(S, D)) * rng.uniform(0.5, 2, D) + rng.normal(size=D) / 2
    if kind == "outlier channels":
        values[:, [3, 50]] = 60 * rng.normal(size=(S, 2)) + [300, -120]
    if kind == "massive first token":
        values[::50, 7] += 1000 * np.sqrt(np.mean(values**2))
    return values


def scale_of(values):
    return int8_scale(ChannelStatistics.of(without_massive(bits_of(values))))


def relative_errors(codec, values):
    """By the length of each state, [S]; those of the values as bfloat16."""
    bits, scale = bits_of(values), scale_of(values)
    error_S, square_S = squared_errors(decode(encode(bits, codec, scale), codec, D, scale), bits)
    return np.sqrt(error_S / square_S)


@pytest.mark.parametrize("kind", ["ordinary", "outlier channels", "massive first token"])
def test_how_far_each_codec_is_off(kind):
    """fp8 is bounded by its format; int8 by 1/254 of the range, in units of the channels."""
    values = drawn(kind)
    assert relative_errors("bf16", values).max() == 0
    fp8, int8 = relative_errors("fp8", values), relative_errors("int8", values)
    assert fp8.mean() <= 0.04
    assert fp8.max() <= 0.0625
    limits = {
        "ordinary": (0.008, 0.015),
        "outlier channels": (0.015, 0.04),
        "massive first token": (0.008, 0.015),
    }
    mean, worst = limits[kind]
    assert int8.mean() <= mean
    assert int8.max() <= worst


def test_massive_states_as_part_of_the_scale_would_spoil_all_others():
    values = drawn("massive first token")
    bits, scale = bits_of(values), int8_scale(ChannelStatistics.of(bits_of(values)))
    error_S, square_S = squared_errors(decode(encode(bits, "int8", scale), "int8", D, scale), bits)
    assert np.sqrt(error_S / square_S).mean() > 0.07


def test_massive_states_are_those_longer_than_4_medians():
    kept = without_massive(bits_of(drawn("massive first token")))
    assert len(kept) == S - 8
    assert without_massive(kept[:0]).shape == (0, D)


def test_plain_int8_rows_would_be_ten_times_as_far_off():
    """Why int8 has units: with all of them 1 an outlier channel takes all 8 bits."""
    bits = bits_of(drawn("outlier channels"))
    plain = ChannelScale(np.zeros(D, np.float32), np.ones(D, np.float32))
    error_S, _ = squared_errors(decode(encode(bits, "int8", plain), "int8", D, plain), bits)
    without = values_of(bits)
    without[:, [3, 50]] = 0
    assert np.sqrt(error_S / (without**2).sum(axis=1)).mean() > 0.3


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(-60, 60))
def test_fp8_numbers_are_those_of_torch_times_a_power_of_two(seed, exponent):
    """Against float64 arithmetic, at any size of the states, and after one more pass the same."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(20, 8)) * 10.0 ** rng.uniform(-6, 2, (20, 8)) * 2.0**exponent
    bits = bits_of(values)
    numbers, codes = encode_fp8(bits)
    scale_S1 = 2.0 ** (codes.astype(np.float64)[:, None] - 135)
    scaled = values_of(bits) / scale_S1
    assert ((np.abs(scaled).max(axis=1) > 224) & (np.abs(scaled).max(axis=1) <= 464)).all()
    expected = torch.from_numpy(scaled).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(numbers.reshape(20, 8), expected)
    decoded = decode_fp8([numbers, codes], 8)
    np.testing.assert_array_equal(values_of(decoded), E4M3[expected] * scale_S1)
    again = decode_fp8(encode_fp8(decoded), 8)
    np.testing.assert_array_equal(values_of(again), values_of(decoded))


def test_every_fp8_number_at_every_scale_is_exactly_a_bfloat16():
    numbers = np.array([n for n in range(256) if n & 0x7F != 0x7F], np.uint8)
    codes = np.arange(16, 255, dtype=np.uint8)
    decoded = decode_fp8([np.tile(numbers, len(codes)), codes], len(numbers))
    expected = E4M3[numbers] * 2.0 ** (codes.astype(np.float64)[:, None] - 135)
    np.testing.assert_array_equal(values_of(decoded), expected)


def test_int8_is_centre_plus_integer_times_scale_times_unit():
    values = drawn("ordinary")
    bits, scale = bits_of(values), scale_of(values)
    planes = encode(bits, "int8", scale)
    integers = planes[0].view(np.int8).reshape(S, D).astype(np.float64)
    step_S1 = values_of((planes[1] | planes[2].astype(np.uint16) << 8)[:, None])
    exact = scale.centre + integers * step_S1 * scale.unit.astype(np.float64)
    found = values_of(decode(planes, "int8", D, scale))
    np.testing.assert_allclose(found, exact, rtol=2**-8, atol=1e-6)  # a rounding to bfloat16
    standard = (values_of(bits) - scale.centre) / scale.unit
    assert np.abs(standard - integers * step_S1).max() <= 0.5001 * step_S1.max()
    assert np.abs(integers).max(axis=1).min() >= 126


def test_a_channel_that_calibration_saw_stand_still_may_move_later():
    values = drawn("ordinary")
    values[:, 5] = 0
    scale = scale_of(values)
    values[:, 5] = 0.3
    bits = bits_of(values)
    decoded = values_of(decode(encode(bits, "int8", scale), "int8", D, scale))
    assert np.abs(decoded[:, 5] - 0.3).max() < 0.005
    assert scale_of(np.full((3, 4), 2.0)).unit.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize("codec", ["bf16", "fp8", "int8"])
def test_states_of_zeros_and_no_states(codec):
    scale = scale_of(drawn("ordinary"))
    zeros = np.zeros((3, D), np.uint16)
    planes = encode(zeros, codec, scale)
    assert [plane.size for plane in planes] == [3 * size for size in plane_bytes(codec, D)]
    decoded = values_of(decode(planes, codec, D, scale))
    assert np.abs(decoded).max() <= (0.02 if codec == "int8" else 0)
    assert decode(encode(zeros[:0], codec, scale), codec, D, scale).shape == (0, D)


def test_int8_states_that_are_the_mean_have_scale_zero():
    scale = ChannelScale(np.float32([1, -2]), np.float32([1, 1]))
    bits = bits_of([[1.0, -2.0], [1.0, 0.0]])
    planes = encode(bits, "int8", scale)
    assert planes[0].view(np.int8).tolist() == [0, 0, 0, 126]  # the scale is rounded up
    np.testing.assert_array_equal(decode(planes, "int8", 2, scale)[0], bits[0])


@pytest.mark.parametrize("codec", ["fp8", "int8"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 2.0**127])
def test_what_a_codec_cannot_hold_is_refused_with_the_way_out(codec, value):
    values = drawn("ordinary")
    scale = scale_of(values)
    values[4, 2] = value
    with pytest.raises(NonFiniteTargets, match=rf"{codec} cannot hold.*--hidden-codec bf16"):
        encode(bits_of(values), codec, scale)


def test_a_state_far_beyond_its_channels_deviation_is_refused():
    scale = ChannelScale(np.zeros(2, np.float32), np.float32([1e-30, 1]))
    with pytest.raises(NonFiniteTargets, match="2\\^127 times the deviation of its channel"):
        encode(bits_of([[1e30, 0.0]]), "int8", scale)


@pytest.mark.parametrize(
    ("codec", "planes"),
    [
        ("fp8", [[1, 2], [15]]),
        ("fp8", [[1, 2], [255]]),
        ("int8", [[1, 2], [0x80], [0x7F]]),
        ("int8", [[1, 2], [0], [0x80]]),
    ],
)
def test_a_scale_that_no_writer_makes_is_corrupt(codec, planes):
    scale = ChannelScale(np.zeros(2, np.float32), np.ones(2, np.float32))
    with pytest.raises(CorruptCache, match=r"hidden: found a scale of .*, expected .*--drop-bad"):
        decode([np.array(plane, np.uint8) for plane in planes], codec, 2, scale)


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 5))
def test_states_are_those_of_every_nth_position_of_each_row(counts, every):
    rows = np.array(counts, np.int32)
    slow, start = [], 0
    for count in counts:
        slow += range(start, start + count, every)
        start += count
    assert state_positions(rows, every).tolist() == slow
    assert num_states(rows, every).tolist() == [len(range(0, n, every)) for n in counts]


def test_squared_errors_are_those_of_float64():
    rng = np.random.default_rng(0)
    one, other = random_states(rng, 9), random_states(rng, 9)
    error_S, square_S = squared_errors(one, other)
    x, y = values_of(one), values_of(other)
    np.testing.assert_allclose(error_S, ((x - y) ** 2).sum(axis=1), rtol=1e-12)
    np.testing.assert_allclose(square_S, (y**2).sum(axis=1), rtol=1e-12)
