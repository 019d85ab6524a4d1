"""Writes and reads one shard, and the commit that says a shard is done.

A shard is published in four steps: a temporary file, flushed and opened again to check it; its
content name (`shards/00042-<hash>.arrow`); the commit (`commits/00042.json`) by exclusive create.
The first commit wins; the loser of a race deletes its own shard file unless it has the same name.
"""

import base64
import json
import mmap
import os
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash

from shared import frames
from shared.blocks import Block, from_planes, to_planes
from shared.codec import ClassRanks
from shared.errors import CorruptCache
from shared.manifest import FORMAT_VERSION, Manifest, build, parse_json
from shared.schema import Plane, layout
from shared.storage import Storage, crash_point

MAX_COMMIT_BYTES = 64 << 20
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

    def lengths(self, where: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and positions of each row, i32 [rows] each."""
        tokens = _unpack(self.row_tokens, self.rows, f"{where}: row_tokens")
        positions = _unpack(self.row_positions, self.rows, f"{where}: row_positions")
        sums = (int(tokens.sum(dtype=np.int64)), int(positions.sum(dtype=np.int64)))
        counts = (sum(self.block_rows), sum(self.batch_blocks))
        negative = min((*self.block_rows, *self.batch_blocks, 0)) < 0
        if negative or (*sums, *counts) != (
            *(self.tokens, self.positions),
            *(self.rows, len(self.block_rows)),
        ):
            raise CorruptCache(f"{where}: the lengths of its rows do not add up to its totals")
        return tokens, positions

    def to_json(self) -> bytes:
        body = asdict(self)
        body["checksum"] = _checksum(body)
        return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def commit_name(shard: int) -> str:
    return f"commits/{shard:05d}.json"


def parse_commit(data: bytes, where: str) -> Commit:
    """A commit from its JSON; a byte changed anywhere is an error that names the file."""
    raw = parse_json(data, where)
    if not isinstance(raw, dict) or raw.pop("checksum", None) != _checksum(raw):
        raise CorruptCache(
            f"{where}: this commit does not match its own checksum. Delete it and run the same "
            "cache-teacher run command again: only its shard is redone."
        )
    return build(Commit, raw, where)


def encode_block(block: Block, number: int, manifest: Manifest, ranks: ClassRanks) -> EncodedBlock:
    """Turns a block into one frame per plane; a pure function, safe in any thread."""
    values = to_planes(block, manifest, ranks)
    encoded: dict[str, bytes] = {}
    for plane in layout(manifest):
        code = frames.column_code(plane.number, plane.plane)
        encoded[plane.name] = frames.compress(values[plane.name], block=number, column=code)
    return EncodedBlock(encoded, block.num_tokens, block.num_positions)


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
        with self.storage.errors_explained():
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
        with self.storage.errors_explained():
            self._writer.write_batch(pa.record_batch(arrays, schema=self._schema()))
        self._batches.append(len(self._waiting))
        self._waiting, self._waiting_bytes = [], 0

    def _finish(self) -> None:
        """The rest of the file, then its content name, then the commit."""
        self._flush()
        with self.storage.errors_explained():
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
            file=f"shards/{self.shard:05d}-{digest[:16]}.arrow",
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
        winner = parse_commit(data, str(self.storage.path(name)))
        if winner.file != file:
            self.storage.delete(file)


_Columns = dict[str, tuple[np.ndarray, memoryview]]


class ShardReader:
    """Reads blocks of one committed shard through a memory map; safe in several threads."""

    def __init__(self, path: Path, manifest: Manifest, commit: Commit) -> None:
        self.path, self.manifest, self.commit = path, manifest, commit
        self._planes = layout(manifest)
        self._wanted: dict[tuple[tuple[int, ...], bool], list[Plane]] = {}
        self._tokens, self._positions = commit.lengths(f"commit of {path.name}")
        self._row_starts = np.concatenate([[0], np.cumsum(commit.block_rows, dtype=np.int64)])
        self._sizes = [
            {
                "row": end - start,
                "token": int(self._tokens[start:end].sum()),
                "position": int(self._positions[start:end].sum()),
            }
            for start, end in pairwise(self._row_starts.tolist())
        ]
        self._open()

    def _open(self) -> None:
        try:
            size = self.path.stat().st_size
        except FileNotFoundError:
            raise CorruptCache(f"{self.path}: {_MISSING}") from None
        if size != self.commit.num_bytes:
            raise CorruptCache(
                f"{self.path}: {size:,} bytes, but its commit says {self.commit.num_bytes:,}. "
                f"{_REPAIR}"
            )
        try:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._reader = pa.ipc.open_file(pa.py_buffer(self._map))
            self._check_schema(self._reader.schema)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CorruptCache(f"{self.path}: not readable as Arrow: {error}. {_REPAIR}") from None
        found, expected = self._reader.num_record_batches, len(self.commit.batch_blocks)
        if found != expected:
            raise CorruptCache(
                f"{self.path}: {found} record batches, but its commit says {expected}. {_REPAIR}"
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
                    f"{self.path}: {key} is {metadata.get(key)!r}, expected {value!r}. {_REPAIR}"
                )
        for plane in self._planes:
            index = schema.get_field_index(plane.name)
            if index < 0 or schema.field(index).type != pa.large_binary():
                raise CorruptCache(f"{self.path}: the column {plane.name} is missing. {_REPAIR}")

    def _columns(self, index: int) -> "_Columns":
        """Offsets i64 [blocks + 1] and bytes of each plane of a batch, fully validated once."""
        if index in self._batches:
            return self._batches[index]
        try:
            batch = self._reader.get_batch(index)
            arrays = {plane.name: batch.column(plane.name) for plane in self._planes}
            for array in arrays.values():
                array.validate(full=True)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CorruptCache(f"{self.path}: not readable as Arrow: {error}. {_REPAIR}") from None
        columns: _Columns = {}
        for name, array in arrays.items():
            if array.null_count or len(array) != self.commit.batch_blocks[index]:
                raise CorruptCache(
                    f"{self.path}: record batch {index}, column {name}: {len(array)} blocks, "
                    f"{array.null_count} of them null; expected "
                    f"{self.commit.batch_blocks[index]}. {_REPAIR}"
                )
            _, offsets, data = array.buffers()
            first, last = array.offset, array.offset + len(array) + 1
            values = np.frombuffer(offsets, np.int64, count=last)[first:]
            columns[name] = values, memoryview(b"" if data is None else data)
        self._batches[index] = columns
        return columns

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
        where = str(self.path)
        values: dict[str, np.ndarray] = {}
        for plane in planes:
            name = plane.name
            offsets, data = columns[name]
            per_item = plane.item_bytes
            if plane.per == "segment":
                size = int(values["num_segments.0"].view(np.uint32).sum())
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

    def read_block(
        self, block: int, ranks: ClassRanks, *, hidden_layers: tuple[int, ...], targets: bool
    ) -> Block:
        """One decoded block; hidden states and targets only when asked for."""
        asked = hidden_layers, targets
        if asked not in self._wanted:
            wanted = [p for p in self._planes if _wanted(p.column, hidden_layers, targets)]
            self._wanted[asked] = wanted
        values = self.read_planes(block, self._wanted[asked])
        rows = slice(self._row_starts[block], self._row_starts[block + 1])
        return from_planes(values, self._tokens[rows], self._positions[rows], self.manifest, ranks)


def _wanted(column: str, hidden_layers: tuple[int, ...], targets: bool) -> bool:
    stem, _, suffix = column.partition(".")
    if stem == "hidden":
        return int(suffix) in hidden_layers
    if stem in ("num_tokens", "num_positions"):
        return False  # the commit has them; `verify` compares the two
    if stem.startswith("target_") or stem in ("label_logprob", "entropy", "log_partition_ratio"):
        return targets
    return True


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
    if rows > MAX_COMMIT_BYTES:
        raise CorruptCache(f"{where}: {rows:,} rows in one shard")
    try:
        frame = memoryview(base64.b64decode(text, validate=True))
    except ValueError as error:
        raise CorruptCache(f"{where}: not base64: {error}") from None
    plane = frames.decompress(frame, block=0, column=0, size=4 * rows, where=where)
    return plane.view(np.uint32).astype(np.int32)


_MISSING = (
    "this shard is missing though its commit is there. "
    "Run cache-teacher verify --drop-bad, then run again."
)
_REPAIR = (
    "Run cache-teacher verify CACHE --drop-bad, then cache-teacher run again: only this shard "
    "is redone."
)
