"""Writes and reads one shard, and the commit that says a shard is done.

A shard is published in four steps: a temporary file, flushed and opened again to check it; its
content name (`shards/00042-<hash>.arrow`); the commit (`commits/00042.json`) by exclusive create.
The first commit wins; the loser of a race deletes its own shard file unless it has the same name.
"""

import base64
import json
import math
import mmap
import os
import stat
import struct
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import xxhash

from shared.errors import CorruptCache
from shared.format import frames
from shared.format.blocks import Block, from_planes, to_planes
from shared.format.manifest import FORMAT_VERSION, MAX_SHARD_ROWS, Manifest, build, parse_json
from shared.format.schema import Plane, layout
from shared.storage import Storage, crash_point, errors_explained
from shared.targets.hidden import NO_SCALES, ChannelScales, num_states
from shared.targets.planes import Per
from shared.targets.record import ClassRanks

MAX_COMMIT_BYTES = 16 << 20
_MAX_METADATA_BYTES = 4 << 20  # of Arrow, in one message or in the footer; ours have a few KB
_FREE_BLOCK_BYTES = 32 << 20  # what a block may hold however small its frames are, and how many
_MOST_EXPANSION = 64  # times as much as its frames otherwise; real ones expand 1.1 to 3 times
_DECODED_ENTRY_BYTES = 8  # of an entry of a ragged kind: class and log-probability
_BATCH_BLOCKS = 64  # Arrow's own metadata costs 1.3 KB for each record batch, so blocks share one
_BATCH_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class EncodedBlock:
    """A block as frames by plane name, with the lengths that the commit keeps."""

    frames: dict[str, bytes]
    row_tokens: np.ndarray
    row_positions: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """The record that shard `shard` is done: what its file is, and every length in it."""

    cache_id: str
    shard: int
    file: str
    num_bytes: int
    xxh3_128: str
    rows: int
    tokens: int
    positions: int
    batch_blocks: tuple[int, ...]
    block_rows: tuple[int, ...]
    row_tokens: str
    row_positions: str
    column_bytes: dict[str, int]
    statistics: dict[str, float]

    def lengths(self, where: str, num_outputs: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and positions of each row, i32 [rows] each.

        `num_outputs`: the positions that every row has, where these are outputs and not tokens.
        """
        tokens = _unpack(self.row_tokens, self.rows, f"{where}: row_tokens")
        positions = _unpack(self.row_positions, self.rows, f"{where}: row_positions")
        sums = (int(tokens.sum(dtype=np.int64)), int(positions.sum(dtype=np.int64)))
        counts = (sum(self.block_rows), sum(self.batch_blocks))
        least = min((*self.block_rows, *(count - 1 for count in self.batch_blocks), 0))
        if least < 0 or (*sums, *counts) != (
            *(self.tokens, self.positions),
            *(self.rows, len(self.block_rows)),
        ):
            raise CorruptCache(
                f"{where}: the lengths of its rows do not add up to its totals. {_REPAIR}"
            )
        if num_outputs and (positions != num_outputs).any():
            raise CorruptCache(
                f"{where}: a row of other than {num_outputs:,} positions, one for each label. "
                f"{_REPAIR}"
            )
        most = num_outputs or tokens
        if self.rows and (tokens.min() < 1 or positions.min() < 0 or (positions > most).any()):
            raise CorruptCache(
                f"{where}: a row without tokens, or with more positions than tokens. {_REPAIR}"
            )
        return tokens, positions

    def to_json(self) -> bytes:
        body = asdict(self)
        body["checksum"] = _checksum(body)
        return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def commit_name(shard: int) -> str:
    return f"commits/{shard:05d}.json"


def shard_name(shard: int, digest: str) -> str:
    """The content name of a shard file: its number and the first 16 digits of its xxh3_128."""
    return f"shards/{shard:05d}-{digest[:16]}.arrow"


def parse_commit(data: bytes, where: str) -> Commit:
    """A commit from its JSON; a byte changed anywhere is an error that names the file."""
    raw = parse_json(data, where)
    sound = data.isascii() and isinstance(raw, dict)
    if not sound or raw.pop("checksum", None) != _checksum(raw):
        raise CorruptCache(
            f"{where}: this commit does not match its own checksum. Delete it and run the same "
            "cache-teacher run command again: only its shard is redone."
        )
    commit = build(Commit, raw, where)
    for name, value in commit.statistics.items():  # a sum may be infinite, a count may not
        if math.isnan(value) or not (name.startswith("sum_") or math.isfinite(value)):
            raise CorruptCache(f"{where}: statistics: {name[:80]!r} is {value}. {_REPAIR}")
    return commit


def encode_block(
    block: Block,
    number: int,
    manifest: Manifest,
    ranks: ClassRanks,
    scales: ChannelScales = NO_SCALES,
) -> EncodedBlock:
    """Turns a block into one frame per plane; a pure function, safe in any thread."""
    values = to_planes(block, manifest, ranks, scales)
    return compress_planes(values, number, manifest, block.num_tokens, block.num_positions)


def compress_planes(
    values: Mapping[str, np.ndarray],
    number: int,
    manifest: Manifest,
    row_tokens: np.ndarray,
    row_positions: np.ndarray,
) -> EncodedBlock:
    """One frame per plane of the cache's layout, for block `number`."""
    encoded: dict[str, bytes] = {}
    for plane in layout(manifest):
        code = frames.column_code(plane.number, plane.plane)
        encoded[plane.name] = frames.compress(values[plane.name], block=number, column=code)
    return EncodedBlock(encoded, row_tokens, row_positions)


class ShardWriter:
    """Writes the blocks of one shard in order; commits on a clean exit only.

    With `statistics` set before the exit. `won` is true if this writer's commit is the one that
    counts.
    """

    def __init__(self, storage: Storage, manifest: Manifest, cache_id: str, shard: int) -> None:
        self.storage, self.manifest, self.cache_id, self.shard = storage, manifest, cache_id, shard
        self.statistics: dict[str, float] = {}
        self.won = False
        self._planes = layout(manifest)
        self._waiting: list[EncodedBlock] = []
        self._waiting_bytes = 0
        self._batches: list[int] = []  # blocks of each record batch
        self._blocks: list[int] = []  # rows of each block
        self._tokens: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []
        self._column_bytes: dict[str, int] = {}

    def __enter__(self) -> "ShardWriter":
        self._stack = ExitStack()
        temporary = self.storage.temporary(f"shards/{self.shard:05d}")
        self._temporary = self._stack.enter_context(temporary)
        with errors_explained(self.storage.root):
            self._sink = self._stack.enter_context(pa.OSFile(str(self._temporary), "wb"))
            self._writer = pa.ipc.new_file(self._sink, self._schema())
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        with self._stack:  # removes the temporary file, whatever happens
            if error is None:
                self._finish()

    def write(self, block: EncodedBlock) -> int:
        """Adds the next block; returns its bytes in frames."""
        size = sum(map(len, block.frames.values()))
        self._waiting.append(block)
        self._waiting_bytes += size
        self._blocks.append(len(block.row_tokens))
        self._tokens.append(block.row_tokens)
        self._positions.append(block.row_positions)
        for name, frame in block.frames.items():
            column = name.rpartition(".")[0]
            self._column_bytes[column] = self._column_bytes.get(column, 0) + len(frame)
        if len(self._waiting) >= _BATCH_BLOCKS or self._waiting_bytes >= _BATCH_BYTES:
            self._flush()
        return size

    def _schema(self) -> pa.Schema:
        metadata = {
            "format_version": str(FORMAT_VERSION),
            "cache_id": self.cache_id,
            "shard": str(self.shard),
        }
        fields = [(plane.name, pa.large_binary()) for plane in self._planes]
        return pa.schema(fields, metadata)

    def _flush(self) -> None:
        if not self._waiting:
            return
        arrays = [
            pa.array([block.frames[plane.name] for block in self._waiting], pa.large_binary())
            for plane in self._planes
        ]
        crash_point("before-record-batch")
        with errors_explained(self.storage.root):
            self._writer.write_batch(pa.record_batch(arrays, schema=self._schema()))
        self._batches.append(len(self._waiting))
        self._waiting, self._waiting_bytes = [], 0

    def _finish(self) -> None:
        """The rest of the file, then its content name, then the commit."""
        self._flush()
        with errors_explained(self.storage.root):
            self._writer.close()
            self._sink.close()
            crash_point("after-temporary-write")
            _sync(self._temporary)
        crash_point("after-fsync")
        commit = self._describe()
        ShardReader(self._temporary, self.manifest, commit).check_structure()
        self.storage.publish(self._temporary, commit.file)
        self.won = self.storage.put_new(commit_name(self.shard), commit.to_json())
        if not self.won:
            self._yield_to_winner(commit.file)

    def _describe(self) -> Commit:
        digest = file_hash(self._temporary)
        tokens = np.concatenate([*self._tokens, np.zeros(0, np.int32)])
        positions = np.concatenate([*self._positions, np.zeros(0, np.int32)])
        return Commit(
            cache_id=self.cache_id,
            shard=self.shard,
            file=shard_name(self.shard, digest),
            num_bytes=self._temporary.stat().st_size,
            xxh3_128=digest,
            rows=len(tokens),
            tokens=int(tokens.sum()),
            positions=int(positions.sum()),
            batch_blocks=tuple(self._batches),
            block_rows=tuple(self._blocks),
            row_tokens=_pack(tokens),
            row_positions=_pack(positions),
            column_bytes=dict(sorted(self._column_bytes.items())),
            statistics=dict(sorted(self.statistics.items())),
        )

    def _yield_to_winner(self, file: str) -> None:
        """Another writer committed this shard first; ours goes unless the winner names it too."""
        name = commit_name(self.shard)
        data = self.storage.read(name, max_bytes=MAX_COMMIT_BYTES)
        winner = parse_commit(data, self.storage.where(name))
        if winner.file != file:
            self.storage.delete(file)


_Columns = dict[str, tuple[np.ndarray, memoryview]]


class ShardReader:
    """Reads blocks of one committed shard through a memory map; safe in several threads."""

    def __init__(
        self, path: Path, manifest: Manifest, commit: Commit, where: str | None = None
    ) -> None:
        """`where`: what messages call the shard, if it is not read at its own place."""
        self.path, self.manifest, self.commit = path, manifest, commit
        self.where = str(path) if where is None else where
        self._planes = layout(manifest)
        self._wanted: dict[tuple[tuple[int, ...], bool, tuple[str, ...]], list[Plane]] = {}
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
                f"first. {_REPAIR}"
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
                f"{self.commit.num_bytes:,}. {_REPAIR}"
            )
        try:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._schema, self._messages = open_arrow(self._map)
            self._check_schema(self._schema)
        except (pa.ArrowException, OSError, ValueError, struct.error) as error:
            raise CorruptCache(f"{self.where}: not readable as Arrow: {error}. {_REPAIR}") from None
        found, expected = len(self._messages), len(self.commit.batch_blocks)
        if found != expected:
            raise CorruptCache(
                f"{self.where}: {found} record batches, but its commit says {expected}. {_REPAIR}"
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
                    f"{self.where}: {key} is {metadata.get(key)!r}, expected {value!r}. {_REPAIR}"
                )
        for plane in self._planes:
            index = schema.get_field_index(plane.name)
            if index < 0 or schema.field(index).type != pa.large_binary():
                raise CorruptCache(f"{self.where}: the column {plane.name} is missing. {_REPAIR}")

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
            raise CorruptCache(f"{self.where}: not readable as Arrow: {error}. {_REPAIR}") from None
        columns: _Columns = {}
        for name, array in arrays.items():
            if array.null_count or len(array) != self.commit.batch_blocks[index]:
                raise CorruptCache(
                    f"{self.where}: record batch {index}, column {name}: {len(array)} blocks, "
                    f"{array.null_count} of them null; expected "
                    f"{self.commit.batch_blocks[index]}. {_REPAIR}"
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
                    f"its commit says expand to {size:,}. {_REPAIR}"
                )

    def check_structure(self) -> None:
        """Every frame is there and decodes; used before a shard gets its name."""
        for block in range(len(self.commit.block_rows)):
            self.read_planes(block, self._planes)

    def read_planes(self, block: int, planes: Iterable[Plane]) -> dict[str, np.ndarray]:
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
                        f"{sizes['token']:,}, the tokens. {_REPAIR}"
                    )
            elif plane.per == "byte":
                size = int(values["reference_bytes.0"].view(np.uint32).sum(dtype=np.int64))
                stored = int(offsets[row + 1] - offsets[row])
                if size > _FREE_BLOCK_BYTES + _MOST_EXPANSION * stored:
                    raise CorruptCache(
                        f"{where}: block {block}, column reference_bytes: found {size:,} bytes of "
                        f"references in a frame of {stored:,}. {_REPAIR}"
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
                f"{stored:,} bytes of frames, far more than such a block can hold. {_REPAIR}"
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
    names = [p.name for p in layout(manifest) if _wanted(p.column, hidden_layers, targets, ())]
    no_lengths = np.zeros(0, np.int32)
    values = dict.fromkeys(names, nothing)
    return from_planes(values, no_lengths, no_lengths, manifest, ranks, scales)


def _wanted(
    column: str, hidden_layers: tuple[int, ...], targets: bool, skip: tuple[str, ...]
) -> bool:
    stem, _, suffix = column.partition(".")
    if stem in skip:
        return False
    if stem == "hidden":
        return int(suffix) in hidden_layers
    if stem in ("num_tokens", "num_positions"):
        return False  # the commit has them; `verify` compares the two
    if stem.startswith("target_") or stem in ("label_logprob", "entropy", "log_partition_ratio"):
        return targets
    return True


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


def file_hash(path: Path) -> str:
    """xxh3_128 of a file, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(8 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _checksum(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def _pack(lengths: np.ndarray) -> str:
    plane = np.ascontiguousarray(lengths, "<u4").view(np.uint8)
    return base64.b64encode(frames.compress(plane, block=0, column=0)).decode()


def _unpack(text: str, rows: int, where: str) -> np.ndarray:
    if not 0 <= rows <= MAX_SHARD_ROWS:
        raise CorruptCache(
            f"{where}: {rows:,} rows in one shard, expected at most {MAX_SHARD_ROWS:,}; a smaller "
            "--shard-tokens makes shards of fewer rows"
        )
    try:
        frame = memoryview(base64.b64decode(text, validate=True))
    except ValueError as error:
        raise CorruptCache(f"{where}: not base64: {error}") from None
    plane = frames.decompress(frame, block=0, column=0, size=4 * rows, where=where)
    lengths = plane.view(np.int32)
    if lengths.min(initial=0) < 0:
        raise CorruptCache(f"{where}: a length of 2**31 or more. {_REPAIR}")
    return lengths


_MISSING = (
    "this shard is missing though its commit is there. "
    "Run cache-teacher verify --drop-bad, then run again."
)
_REPAIR = (
    "Run cache-teacher verify CACHE --drop-bad, then cache-teacher run again: only this shard "
    "is redone."
)
