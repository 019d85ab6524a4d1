"""Writes one shard, and the commit that says it is done.

A shard is published in four steps: a temporary file, flushed and opened again to check it; its
content name (`shards/00042-<hash>.arrow`); the commit (`commits/00042.json`) by exclusive create.
The first commit wins; the loser of a race deletes its own shard file unless it has the same name.
"""

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from shared.format import frames
from shared.format.blocks import Block
from shared.format.commits import (
    MAX_COMMIT_BYTES,
    Commit,
    commit_name,
    file_hash,
    packed_lengths,
    parse_commit,
    shard_name,
)
from shared.format.encoding import to_planes
from shared.format.manifest import FORMAT_VERSION, Manifest
from shared.format.reader import ShardReader
from shared.format.schema import planes_of
from shared.storage.base import Storage, crash_point, errors_explained
from shared.targets.hidden import NO_SCALES, ChannelScales
from shared.targets.record import ClassRanks

_BATCH_BLOCKS = 64  # Arrow's own metadata costs 1.3 KB for each record batch, so blocks share one
_BATCH_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class EncodedBlock:
    """A block as frames by plane name, with the lengths that the commit keeps."""

    frames: dict[str, bytes]
    row_tokens: np.ndarray
    row_positions: np.ndarray


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
    for plane in planes_of(manifest):
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
        self._planes = planes_of(manifest)
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
            row_tokens=packed_lengths(tokens),
            row_positions=packed_lengths(positions),
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


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
