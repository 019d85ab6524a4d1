"""Checksummed zstandard frames: how every heavy column of a shard lies on disk.

A frame holds one byte plane of one block. Its payload starts with the block number and the column
code, so a frame that was moved is found out, and its size is checked before anything is allocated.
"""

import struct
import threading

import numpy as np
import zstandard

from shared.arrays import Plane
from shared.errors import CorruptCache

FRAME_HEADER = struct.Struct("<II")  # block number, column code
COMPRESSION_LEVEL = 1  # smaller and faster than 3 on these planes


class _Zstandard(threading.local):
    """One compressor and one decompressor per thread: shared ones report false corruption."""

    def __init__(self) -> None:
        # The level's parameters for large inputs: those for planes of 64 KB look for shorter
        # matches, which costs 7 % more time to write, 3 % more to read, and 0.3 % more bytes.
        parameters = zstandard.ZstdCompressionParameters.from_level(
            COMPRESSION_LEVEL, write_checksum=True, write_content_size=True
        )
        self.compressor = zstandard.ZstdCompressor(compression_params=parameters)
        self.decompressor = zstandard.ZstdDecompressor()


_zstandard = _Zstandard()


def column_code(number: int, plane: int) -> int:
    """The column's number in the schema and the plane's number in the column, as one integer."""
    return number << 8 | plane


def compress(plane: Plane, *, block: int, column: int) -> bytes:
    """One frame with checksum and content size; a plane of any shape goes in as it lies."""
    payload = bytearray(FRAME_HEADER.size + plane.size)
    FRAME_HEADER.pack_into(payload, 0, block, column)
    np.frombuffer(payload, np.uint8, offset=FRAME_HEADER.size)[:] = plane.reshape(-1)
    return _zstandard.compressor.compress(payload)


def decompress(
    frame: bytes | memoryview, *, block: int, column: int, size: int, where: str
) -> Plane:
    """The plane's bytes [size], read-only; anything unexpected is CorruptCache, naming `where`.

    `frame` may be any buffer, a slice of an Arrow buffer too. Sizes and flags are checked before
    the first byte is decompressed.
    """
    declared = FRAME_HEADER.size + size
    try:
        found = zstandard.get_frame_parameters(frame)
        if not found.has_checksum:
            raise _corrupt(where, block, column, "a frame without a checksum", "one with")
        if found.content_size != declared:
            raise _corrupt(where, block, column, f"{found.content_size} bytes", f"{declared}")
        payload = _zstandard.decompressor.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise _corrupt(where, block, column, str(error), "one whole frame") from error
    if FRAME_HEADER.unpack_from(payload) != (block, column):
        other_block, other_column = FRAME_HEADER.unpack_from(payload)
        place = f"the frame of block {other_block}, {_column_name(other_column)}"
        raise _corrupt(where, block, column, place, "its own")
    return np.frombuffer(payload, np.uint8, offset=FRAME_HEADER.size)


def _corrupt(where: str, block: int, column: int, found: str, expected: str) -> CorruptCache:
    return CorruptCache(
        f"{where}: block {block}, {_column_name(column)}: found {found}, expected {expected}. "
        "Run cache-teacher verify CACHE --drop-bad, then run again."
    )


def _column_name(column: int) -> str:
    return f"column {column >> 8}, plane {column & 255}"
