"""One number for each position: what comes back is within half a step of what was written."""

import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.targets import scalars


@settings(deadline=None)
@given(st.integers(2, 2**18), st.lists(st.floats(0, 1), max_size=20))
def test_entropy_is_within_half_a_step(num_classes, shares):
    entropy = np.array(shares, np.float32) * np.float32(math.log(num_classes))
    plane = scalars.encode_entropy(entropy, num_classes)
    assert plane.dtype == np.uint8
    found = scalars.decode_entropy(plane, num_classes)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, entropy, atol=math.log(num_classes) / 510 * 1.001)


@settings(deadline=None)
@given(st.sampled_from([0.5, 1.5, 2.0, 4.0]), st.lists(st.floats(0, 1), max_size=20))
def test_log_partition_ratio_is_within_half_a_step(temperature, shares):
    """A softmax over 151,936 classes puts it between 0 and (1 - 1/T) ln C, below 0 where T < 1."""
    largest = (1 - 1 / temperature) * math.log(151_936)
    ratio = np.array(shares, np.float32) * np.float32(largest)
    planes = scalars.encode_log_partition_ratio(ratio, temperature, 151_936)
    found = scalars.decode_log_partition_ratio(planes, temperature, 151_936)
    assert found.dtype == np.float32
    half_step = abs(largest) / 131_070
    np.testing.assert_allclose(found, ratio, atol=half_step * 1.01 + 1e-6)


def test_log_partition_ratio_of_the_extremes():
    """One class certain: 0. All equally likely: (1 - 1/T) ln C."""
    uniform = np.full(1000, -math.log(1000))
    for temperature in (0.5, 2.0):
        ratio = math.log(np.exp(uniform / temperature).sum())
        values = np.array([0.0, ratio], np.float32)
        planes = scalars.encode_log_partition_ratio(values, temperature, 1000)
        found = scalars.decode_log_partition_ratio(planes, temperature, 1000)
        np.testing.assert_allclose(found, values, rtol=1e-6)


@settings(deadline=None)
@given(st.lists(st.floats(-60_000, 0), max_size=20))
def test_label_logprob_is_fp16(values):
    array = np.array([*values, -1e6, -np.inf], np.float32)
    found = scalars.decode_label_logprob(scalars.encode_label_logprob(array))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:-2], array[:-2], rtol=2**-11, atol=2**-25)
    assert found[-2:].tolist() == [-np.inf, -np.inf]
