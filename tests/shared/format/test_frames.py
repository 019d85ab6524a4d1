"""Frames: what goes in comes out, or it is an error that says where."""

import struct
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.arrays import join_planes, split_planes
from shared.errors import CorruptCache
from shared.format.frames import column_code, compress, decompress

COLUMN = column_code(17, 1)
PLANE = np.random.default_rng(0).geometric(0.3, 40).astype(np.uint8)


def read(frame, *, block=3, column=COLUMN, size=PLANE.size):
    return decompress(frame, block=block, column=column, size=size, where="shards/00042.arrow")


@settings(deadline=None)
@given(st.binary(max_size=3000), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_round_trip(data, block, column):
    plane = np.frombuffer(data, np.uint8)
    frame = compress(plane, block=block, column=column)
    found = decompress(memoryview(frame), block=block, column=column, size=len(data), where="x")
    assert found.dtype == np.uint8
    assert found.tobytes() == data


def test_a_plane_of_any_shape_goes_in_as_it_lies():
    plane = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    assert read(compress(plane, block=3, column=COLUMN), size=24).tolist() == list(range(24))


def test_every_flipped_bit_is_an_error_or_changes_nothing():
    frame = compress(PLANE, block=3, column=COLUMN)
    errors = 0
    for bit in range(8 * len(frame)):
        flipped = bytearray(frame)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            assert np.array_equal(read(bytes(flipped)), PLANE)
        except CorruptCache:
            errors += 1
    assert errors >= 8 * len(frame) - 8  # zstandard's header has an unused bit


def test_a_cut_or_continued_frame_is_an_error():
    frame = compress(PLANE, block=3, column=COLUMN)
    for length in range(len(frame)):
        with pytest.raises(CorruptCache):
            read(frame[:length])
    for more in (b"\0", frame):
        with pytest.raises(CorruptCache):
            read(frame + more)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"block": 4}, "found the frame of block 3, column 17, plane 1"),
        ({"column": column_code(17, 0)}, "found the frame of block 3, column 17, plane 1"),
        ({"column": column_code(16, 1)}, "found the frame of block 3, column 17, plane 1"),
        ({"size": 41}, "found 48 bytes, expected 49"),
        ({"size": 0}, "found 48 bytes, expected 8"),
    ],
)
def test_a_frame_in_the_wrong_place_is_refused_with_both_sides(asked, found):
    frame = compress(PLANE, block=3, column=COLUMN)
    with pytest.raises(CorruptCache) as error:
        read(frame, **asked)
    message = str(error.value)
    block, column = asked.get("block", 3), asked.get("column", COLUMN)
    place = f"shards/00042.arrow: block {block}, column {column >> 8}, plane {column & 255}: "
    assert message.startswith(place + found)
    assert message.endswith("Run cache-teacher verify CACHE --drop-bad, then run again.")


def test_a_wrong_size_is_refused_before_decompressing():
    frame = bytearray(compress(PLANE, block=3, column=COLUMN))
    frame[12:] = bytes(len(frame) - 12)  # decompressing this would fail for another reason
    with pytest.raises(CorruptCache, match="found 48 bytes, expected 1008"):
        read(bytes(frame), size=1000)


def test_a_frame_without_checksum_is_refused():
    payload = struct.pack("<II", 3, COLUMN) + PLANE.tobytes()
    frame = zstandard.ZstdCompressor(write_checksum=False).compress(payload)
    with pytest.raises(CorruptCache, match="without a checksum"):
        read(frame)


def test_a_frame_that_declares_a_terabyte_allocates_nothing():
    magic, descriptor = b"\x28\xb5\x2f\xfd", b"\xe4"  # one segment, checksum, 8 bytes of size
    frame = magic + descriptor + struct.pack("<Q", 1 << 40) + b"\x03\0\0" + bytes(8)
    assert zstandard.get_frame_parameters(frame).content_size == 1 << 40
    tracemalloc.start()
    try:
        with pytest.raises(CorruptCache, match="found 1099511627776 bytes"):
            read(frame)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_two_threads_read_the_same_frames_without_false_errors():
    rng = np.random.default_rng(1)
    planes = [rng.geometric(0.2, 700).astype(np.uint8) for _ in range(2000)]
    frames = [compress(plane, block=i, column=COLUMN) for i, plane in enumerate(planes)]

    def read_all(_):
        return all(
            np.array_equal(read(frame, block=i, size=700), planes[i])
            for i, frame in enumerate(frames)
        )

    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(read_all, range(2)))


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), max_size=50), st.sampled_from([np.uint32, np.uint64]))
def test_planes_are_little_endian_and_join_again(values, dtype):
    array = np.array(values, dtype)
    planes = split_planes(array, 4)
    expected = [[value.to_bytes(4, "little")[i] for value in values] for i in range(4)]
    assert [plane.tolist() for plane in planes] == expected
    assert join_planes(planes, dtype).tolist() == values
