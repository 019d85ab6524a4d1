"""Reads one shard: checks what it is against its commit, and decodes blocks of it."""

import mmap
import stat
import struct
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pyarrow as pa

from shared.errors import CorruptCache
from shared.format import frames
from shared.format.blocks import Block
from shared.format.column import PlaneSpec
from shared.format.commits import REPAIR, Commit
from shared.format.encoding import from_planes
from shared.format.manifest import FORMAT_VERSION, Manifest
from shared.format.schema import COLUMN_OF, planes_of
from shared.targets.hidden import NO_SCALES, ChannelScales, num_states
from shared.targets.planes import Per
from shared.targets.record import ClassRanks

_MAX_METADATA_BYTES = 4 << 20  # of Arrow, in one message or in the footer; ours have a few KB
_FREE_BLOCK_BYTES = 32 << 20  # what a block may hold however small its frames are, and how many
_MOST_EXPANSION = 64  # times as much as its frames otherwise; real ones expand 1.1 to 3 times
_DECODED_ENTRY_BYTES = 8  # of an entry of a ragged kind: class and log-probability
_MISSING = (
    "this shard is missing though its commit is there. "
    "Run cache-teacher verify --drop-bad, then run again."
)

_Columns = dict[str, tuple[np.ndarray, memoryview]]


class ShardReader:
    """Reads blocks of one committed shard through a memory map; safe in several threads."""

    def __init__(
        self, path: Path, manifest: Manifest, commit: Commit, where: str | None = None
    ) -> None:
        """`where`: what messages call the shard, if it is not read at its own place."""
        self.path, self.manifest, self.commit = path, manifest, commit
        self.where = str(path) if where is None else where
        self._planes = planes_of(manifest)
        self._wanted: dict[tuple[tuple[int, ...], bool, tuple[str, ...]], list[PlaneSpec]] = {}
        name = self.where.rpartition("/")[2]
        self._tokens, self._positions = commit.lengths(f"commit of {name}", manifest.num_outputs)
        self._row_starts = np.concatenate([[0], np.cumsum(commit.block_rows, dtype=np.int64)])
        states = num_states(self._positions, manifest.hidden.every)
        self._sizes = [
            {
                "row": end - start,
                "token": int(self._tokens[start:end].sum()),
                "position": int(self._positions[start:end].sum()),
                "state": int(states[start:end].sum()),
            }
            for start, end in pairwise(self._row_starts.tolist())
        ]
        names = {plane.column for plane in self._planes}
        by_default = not names & {"positions", "segments"} and not manifest.num_outputs
        if by_default and (self._positions != self._tokens - 1).any():
            raise CorruptCache(
                f"{self.where}: its commit has a row that does not predict every token but its "
                f"first. {REPAIR}"
            )
        self._open()

    def _open(self) -> None:
        try:
            status = self.path.stat()
        except FileNotFoundError:
            raise CorruptCache(f"{self.where}: {_MISSING}") from None
        if status.st_size != self.commit.num_bytes or not stat.S_ISREG(status.st_mode):
            raise CorruptCache(
                f"{self.where}: {status.st_size:,} bytes, but its commit says "
                f"{self.commit.num_bytes:,}. {REPAIR}"
            )
        try:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._schema, self._messages = open_arrow(self._map)
            self._check_schema(self._schema)
        except (pa.ArrowException, OSError, ValueError, struct.error) as error:
            raise CorruptCache(f"{self.where}: not readable as Arrow: {error}. {REPAIR}") from None
        found, expected = len(self._messages), len(self.commit.batch_blocks)
        if found != expected:
            raise CorruptCache(
                f"{self.where}: {found} record batches, but its commit says {expected}. {REPAIR}"
            )
        self._batches: dict[int, _Columns] = {}
        starts = np.cumsum(self.commit.batch_blocks, dtype=np.int64)
        self._batch_starts = np.concatenate([[0], starts])

    def _check_schema(self, schema: pa.Schema) -> None:
        metadata = {key.decode(): value.decode() for key, value in (schema.metadata or {}).items()}
        expected = {
            "format_version": str(FORMAT_VERSION),
            "cache_id": self.commit.cache_id,
            "shard": str(self.commit.shard),
        }
        for key, value in expected.items():
            if metadata.get(key) != value:
                raise CorruptCache(
                    f"{self.where}: {key} is {metadata.get(key)!r}, expected {value!r}. {REPAIR}"
                )
        for plane in self._planes:
            index = schema.get_field_index(plane.name)
            if index < 0 or schema.field(index).type != pa.large_binary():
                raise CorruptCache(f"{self.where}: the column {plane.name} is missing. {REPAIR}")

    def _columns(self, index: int) -> "_Columns":
        """Offsets i64 [blocks + 1] and bytes of each plane of a batch, fully validated once."""
        if index in self._batches:
            return self._batches[index]
        try:
            batch = pa.ipc.read_record_batch(self._messages[index], self._schema)
            arrays = {plane.name: batch.column(plane.name) for plane in self._planes}
            for array in arrays.values():
                array.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CorruptCache(f"{self.where}: not readable as Arrow: {error}. {REPAIR}") from None
        columns: _Columns = {}
        for name, array in arrays.items():
            if array.null_count or len(array) != self.commit.batch_blocks[index]:
                raise CorruptCache(
                    f"{self.where}: record batch {index}, column {name}: {len(array)} blocks, "
                    f"{array.null_count} of them null; expected "
                    f"{self.commit.batch_blocks[index]}. {REPAIR}"
                )
            _, offsets, data = array.buffers()
            first, last = array.offset, array.offset + len(array) + 1
            values = np.frombuffer(offsets, np.int64, count=last)[first:]
            columns[name] = values, memoryview(b"" if data is None else data)
        self._check_expansion(index, columns)
        self._batches[index] = columns
        return columns

    def _check_expansion(self, index: int, columns: "_Columns") -> None:
        """Refuses blocks that take far more memory than any of their size on disk needs."""
        item_bytes = dict.fromkeys(get_args(Per), 0)
        for plane in self._planes:
            item_bytes[plane.per] += plane.item_bytes
        item_bytes["token"] += item_bytes.pop("segment")  # a segment has at least one token
        del item_bytes["entry"], item_bytes["byte"]  # their number is in a frame: see read_planes
        frame_bytes = sum(np.diff(offsets) for offsets, _ in columns.values())
        first = int(self._batch_starts[index])
        for row, stored in enumerate(np.asarray(frame_bytes).tolist()):
            sizes = self._sizes[first + row]
            size = sum(sizes[per] * count for per, count in item_bytes.items())
            if size > _FREE_BLOCK_BYTES + _MOST_EXPANSION * stored:
                raise CorruptCache(
                    f"{self.where}: block {first + row}: found {stored:,} bytes in frames, which "
                    f"its commit says expand to {size:,}. {REPAIR}"
                )

    def check_structure(self) -> None:
        """Every frame is there and decodes; used before a shard gets its name."""
        for block in range(len(self.commit.block_rows)):
            self.read_planes(block, self._planes)

    def read_planes(self, block: int, planes: Iterable[PlaneSpec]) -> dict[str, np.ndarray]:
        """Decompressed planes of one block, u8 each, by plane name."""
        batch = int(np.searchsorted(self._batch_starts, block, "right")) - 1
        row = block - int(self._batch_starts[batch])
        columns = self._columns(batch)
        sizes = self._sizes[block]
        where = self.where
        values: dict[str, np.ndarray] = {}
        for plane in planes:
            name = plane.name
            offsets, data = columns[name]
            per_item = plane.item_bytes
            if plane.per == "segment":
                size = int(values["num_segments.0"].view(np.uint32).sum())
                if size > sizes["token"]:
                    raise CorruptCache(
                        f"{where}: block {block}: found {size:,} segments, expected at most "
                        f"{sizes['token']:,}, the tokens. {REPAIR}"
                    )
            elif plane.per == "byte":
                size = int(values["reference_bytes.0"].view(np.uint32).sum(dtype=np.int64))
                stored = int(offsets[row + 1] - offsets[row])
                if size > _FREE_BLOCK_BYTES + _MOST_EXPANSION * stored:
                    raise CorruptCache(
                        f"{where}: block {block}, column reference_bytes: found {size:,} bytes of "
                        f"references in a frame of {stored:,}. {REPAIR}"
                    )
            elif plane.per == "entry":
                size = self._num_entries(block, row, columns, values["target_counts.0"])
            else:
                size = sizes[plane.per]
            values[name] = frames.decompress(
                data[offsets[row] : offsets[row + 1]],
                block=block,
                column=frames.column_code(plane.number, plane.plane),
                size=size * per_item,
                where=where,
            )
        return values

    def _num_entries(self, block: int, row: int, columns: "_Columns", counts: np.ndarray) -> int:
        """Entries of a block of a ragged kind; refuses more than its frames can reasonably hold.

        All planes of entries count together: one alone may be all zeros, and next to nothing.
        """
        entries = int(counts.sum(dtype=np.int64))
        offsets = (columns[plane.name][0] for plane in self._planes if plane.per == "entry")
        stored = sum(int(ends[row + 1] - ends[row]) for ends in offsets)
        if entries * _DECODED_ENTRY_BYTES > _FREE_BLOCK_BYTES + _MOST_EXPANSION * stored:
            raise CorruptCache(
                f"{self.where}: block {block}, column target_counts: found {entries:,} entries in "
                f"{stored:,} bytes of frames, far more than such a block can hold. {REPAIR}"
            )
        return entries

    def read_block(
        self,
        block: int,
        ranks: ClassRanks,
        *,
        hidden_layers: tuple[int, ...],
        targets: bool,
        skip: tuple[str, ...] = (),
        scales: ChannelScales = NO_SCALES,
    ) -> Block:
        """One decoded block; hidden states and targets only when asked for, `skip` never."""
        asked = hidden_layers, targets, skip
        if asked not in self._wanted:
            self._wanted[asked] = [p for p in self._planes if _wanted(p.column, *asked)]
        values = self.read_planes(block, self._wanted[asked])
        rows = slice(self._row_starts[block], self._row_starts[block + 1])
        lengths = self._tokens[rows], self._positions[rows]
        try:
            return from_planes(values, *lengths, self.manifest, ranks, scales)
        except CorruptCache as error:
            raise CorruptCache(f"{self.where}: block {block}, column {error}") from None


def empty_block(
    manifest: Manifest,
    ranks: ClassRanks,
    *,
    hidden_layers: tuple[int, ...],
    targets: bool,
    scales: ChannelScales = NO_SCALES,
) -> Block:
    """A block of no rows: which columns, types and widths any block has, without reading one."""
    nothing = np.zeros(0, np.uint8)
    names = [p.name for p in planes_of(manifest) if _wanted(p.column, hidden_layers, targets, ())]
    no_lengths = np.zeros(0, np.int32)
    values = dict.fromkeys(names, nothing)
    return from_planes(values, no_lengths, no_lengths, manifest, ranks, scales)


def _wanted(
    name: str, hidden_layers: tuple[int, ...], targets: bool, skip: tuple[str, ...]
) -> bool:
    """Whether the planes of a column are read; `name` ends in its layer or temperature."""
    stem, _, suffix = name.partition(".")
    source = COLUMN_OF[stem].source
    if stem in skip or source == "commit":  # the commit has those; `verify` compares the two
        return False
    if source == "states":
        return int(suffix) in hidden_layers
    return targets or source != "teacher"


def open_arrow(file: mmap.mmap | bytes) -> tuple[pa.Schema, list[pa.Message]]:
    """Schema and record batches of an Arrow IPC file; copies nothing, and reads no column.

    ArrowException, OSError, ValueError or struct.error where it is not as we write it: a compressed
    body, dictionaries, or metadata of more than a few MB.
    """
    _check_footer(file)
    reader = pa.ipc.open_file(pa.py_buffer(file))
    messages = _record_batches(file)
    if len(messages) != reader.num_record_batches:
        raise ValueError(
            f"{len(messages)} record batches, but {reader.num_record_batches} in the footer"
        )
    return reader.schema, messages


def _check_footer(file: mmap.mmap | bytes) -> None:
    """The last 10 bytes are the footer's length and a magic word."""
    size = int.from_bytes(file[-10:-6], "little")
    if size > _MAX_METADATA_BYTES:
        raise ValueError(f"a footer of {size:,} bytes")


def _record_batches(file: mmap.mmap | bytes) -> list[pa.Message]:
    """The record batches between a file's magic word and its footer; copies nothing.

    A compressed body would be expanded to whatever size it claims, so there may be none.
    """
    source = pa.BufferReader(pa.py_buffer(file))
    source.seek(8)
    schema, *batches = pa.ipc.MessageReader.open_stream(source)
    for message in (schema, *batches):
        wanted = "schema" if message is schema else "record batch"
        if message.type != wanted or message.metadata.size > _MAX_METADATA_BYTES:
            found = f"{message.type} of {message.metadata.size:,} bytes"
            raise ValueError(f"a message is a {found}, expected a {wanted}")
    if any(map(_is_compressed, batches)):
        raise ValueError("a record batch is compressed, expected a plain one")
    return batches


def _is_compressed(message: pa.Message) -> bool:
    """Whether the flatbuffer of a record batch, which Arrow has verified, names a codec."""
    data = memoryview(message.metadata)

    def field(table: int, index: int) -> int:
        vtable = table - struct.unpack_from("<i", data, table)[0]
        there = 4 + 2 * index < struct.unpack_from("<H", data, vtable)[0]
        offset = struct.unpack_from("<H", data, vtable + 4 + 2 * index)[0] if there else 0
        return table + offset if offset else 0

    def table_at(place: int) -> int:
        return place + int(struct.unpack_from("<I", data, place)[0])

    record_batch = table_at(field(table_at(0), 2))  # Message.header
    return field(record_batch, 3) != 0  # RecordBatch.compression
