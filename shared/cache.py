"""Opens a cache for reading: its rows, what is complete, and what a student run was started on."""

import operator
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, SupportsIndex, overload

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from shared.errors import CorruptCache, IncompleteCache
from shared.format import manifest_file
from shared.format.blocks import Block
from shared.format.column import PlaneSpec
from shared.format.commits import (
    MAX_COMMIT_BYTES,
    Commit,
    commit_name,
    file_hash,
    parse_commit,
    shard_name,
)
from shared.format.limits import MAX_SHARD_ROWS
from shared.format.manifest import Manifest
from shared.format.reader import ShardReader, empty_block
from shared.rows import BlockRows, Row
from shared.storage.base import Storage
from shared.storage.local import LocalStorage
from shared.targets.hidden import ChannelScale, ChannelScales
from shared.targets.record import ClassRanks

_OPEN_SHARDS = 64  # memory maps kept; a map costs address space and little else
_KEPT_BLOCKS = 8  # decoded ones, of a few threads that read rows in order
_KEPT_BYTES = 64 << 20  # of all of these; the last one read is kept whatever it holds
_MAX_SIDE_FILE_BYTES = 256 << 20
_ROWS_ON_TRUST = 1 << 22  # more of them must be backed by as many bytes of shards


class Cache(Sequence[Row]):
    """The committed shards of a cache, in shard order; `cache[i]` is row i. Safe in threads."""

    def __init__(
        self, storage: Storage, manifest: Manifest, cache_id: str, commits: list[Commit]
    ) -> None:
        self.storage, self.manifest, self.cache_id = storage, manifest, cache_id
        self.path, self.commits = storage.root, commits
        _check_rows(storage, commits)
        self.ranks = class_ranks(storage, manifest)
        self.scales = channel_scales(storage, manifest)
        lengths = [
            c.lengths(storage.where(commit_name(c.shard)), manifest.num_outputs) for c in commits
        ]
        empty = np.zeros(0, np.int32)
        self.row_tokens = np.concatenate([*(tokens for tokens, _ in lengths), empty])
        self.row_positions = np.concatenate([*(positions for _, positions in lengths), empty])
        self.block_rows = np.array([r for c in self.commits for r in c.block_rows], np.int64)
        self._row_starts = np.concatenate([[0], np.cumsum(self.block_rows)])
        blocks = [len(commit.block_rows) for commit in self.commits]
        self._block_starts = np.concatenate([[0], np.cumsum(blocks, dtype=np.int64)])
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._decoded: OrderedDict[int, BlockRows] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def num_rows(self) -> int:
        return len(self.row_tokens)

    @property
    def num_blocks(self) -> int:
        return len(self.block_rows)

    @property
    def missing_shards(self) -> list[int]:
        """Shards without a commit."""
        there = {commit.shard for commit in self.commits}
        return [shard for shard in range(self.manifest.plan.num_shards) if shard not in there]

    @property
    def has_targets(self) -> bool:
        return self.manifest.targets.has_targets

    @property
    def row_labels(self) -> np.ndarray:
        """How many positions of each row have a hard label, i32 [R]: all of them, or none."""
        if self.manifest.hard_labels == "none":
            return np.zeros_like(self.row_positions)
        return self.row_positions

    def snapshot(self) -> dict[str, str]:
        """Hash of every committed shard by its number: what a student run is started on."""
        return {str(commit.shard): commit.xxh3_128 for commit in self.commits}

    def restrict(self, snapshot: dict[str, str]) -> "Cache":
        """This cache with exactly the shards of a snapshot; one that is gone is an error."""
        there = {str(commit.shard): commit for commit in self.commits}
        for shard, digest in snapshot.items():
            if shard not in there or there[shard].xxh3_128 != digest:
                found = there[shard].xxh3_128 if shard in there else "no commit"
                raise CorruptCache(
                    f"{self.path}: this run was started on shard {shard} with hash {digest}, but "
                    f"now there is {found}. Restore the shard, or start a new run with another "
                    "--out."
                )
        commits = [commit for commit in self.commits if str(commit.shard) in snapshot]
        return Cache(self.storage, self.manifest, self.cache_id, commits)

    def channel_deviation(self, layer: int) -> torch.Tensor:
        """Standard deviation of each channel of a stored layer, float32 [D]."""
        arrays = learnt(self.storage, self.manifest)
        return torch.from_numpy(_of_channels(self.storage, self.manifest, arrays, layer, "std"))

    def shard_blocks(self, index: int) -> tuple[int, int]:
        """First block of a committed shard, and the one after its last."""
        return int(self._block_starts[index]), int(self._block_starts[index + 1])

    def read_block(
        self,
        block: int,
        *,
        hidden_layers: Sequence[int] = (),
        targets: bool = True,
        skip: tuple[str, ...] = (),
    ) -> Block:
        """Decodes one block; hidden states are never read unless asked for, columns in `skip`
        never."""
        reader, number = self._place(block)
        return reader.read_block(
            number,
            self.ranks,
            hidden_layers=tuple(hidden_layers),
            targets=targets and self.has_targets,
            skip=skip,
            scales=self.scales,
        )

    def read_planes(self, block: int, planes: Iterable[PlaneSpec]) -> dict[str, np.ndarray]:
        """Decompressed planes of one block as they lie on the disk, u8 each, by plane name."""
        reader, number = self._place(block)
        return reader.read_planes(number, planes)

    def _place(self, block: int) -> tuple[ShardReader, int]:
        """The shard of a block, and the number of the block in it."""
        if not 0 <= block < self.num_blocks:
            raise IndexError(f"block {block} of a cache with {self.num_blocks} blocks")
        shard = int(np.searchsorted(self._block_starts, block, "right")) - 1
        return self._reader(shard), block - int(self._block_starts[shard])

    def empty_block(self, *, hidden_layers: Sequence[int] = (), targets: bool = True) -> Block:
        """A block of no rows: which columns, types and widths any block has; reads nothing."""
        return empty_block(
            self.manifest,
            self.ranks,
            hidden_layers=tuple(hidden_layers),
            targets=targets and self.has_targets,
            scales=self.scales,
        )

    def __len__(self) -> int:
        return self.num_rows

    @overload
    def __getitem__(self, index: SupportsIndex) -> Row: ...

    @overload
    def __getitem__(self, index: slice | Iterable[SupportsIndex]) -> list[Row]: ...

    def __getitem__(self, index: Any) -> Row | list[Row]:
        """One row; a slice, or any number of indices, gives a list of rows.

        Negative indices count from the end. A block is decoded once for all rows of a list that are
        in it, and a few blocks are kept decoded for what is asked for next.
        """
        if isinstance(index, np.ndarray | torch.Tensor):
            index = index.tolist()  # of no dimension: a number
        if isinstance(index, slice):
            return self._rows(range(len(self))[index])
        if isinstance(index, Iterable) and not isinstance(index, str | bytes):
            return self._rows([self._number(item) for item in index])
        return self._row(self._number(index))

    def __iter__(self) -> Iterator[Row]:
        """All rows in order; each block is decoded once."""
        for block, count in enumerate(self.block_rows.tolist()):
            rows = self._block_rows(block)
            yield from map(rows.row, range(count))

    def _number(self, index: Any) -> int:
        """The number of a row, from 0, that an index of either sign means."""
        try:
            number = None if isinstance(index, bool | np.bool_) else operator.index(index)
        except TypeError:
            number = None
        if number is None:
            raise TypeError(
                f"cache[{index!r}]: found {type(index).__name__}, expected the number of a row, a "
                "slice or several numbers (of a mask: numpy.flatnonzero(mask))"
            )
        if not -len(self) <= number < len(self):
            raise IndexError(f"row {number} of a cache with {len(self)} rows")
        return number % len(self)

    def _row(self, number: int) -> Row:
        block = int(np.searchsorted(self._row_starts, number, "right")) - 1
        return self._block_rows(block).row(number - int(self._row_starts[block]))

    def _rows(self, numbers: Sequence[int]) -> list[Row]:
        """Rows in the order asked for, read in the order in which they lie."""
        places = sorted(range(len(numbers)), key=numbers.__getitem__)
        read = {place: self._row(numbers[place]) for place in places}
        return [read[place] for place in range(len(numbers))]

    def _block_rows(self, block: int) -> BlockRows:
        """A decoded block with all that it has, cut into rows; one of the last few if it can be.

        Threads decode beside each other, so that two of them may decode the same block.
        """
        with self._lock:
            rows = self._decoded.get(block)
        if rows is None:
            decoded = self.read_block(block, hidden_layers=self.manifest.hidden.layers)
            rows = BlockRows(decoded, self.manifest)
        with self._lock:
            self._decoded[block] = rows
            self._decoded.move_to_end(block)
            while len(self._decoded) > 1 and (
                len(self._decoded) > _KEPT_BLOCKS
                or sum(kept.num_bytes for kept in self._decoded.values()) > _KEPT_BYTES
            ):
                self._decoded.popitem(last=False)
        return rows

    def _reader(self, index: int) -> ShardReader:
        with self._lock:
            reader = self._readers.pop(index, None)
            if reader is None:
                commit = self.commits[index]
                path, where = self.storage.local(commit.file), self.storage.where(commit.file)
                reader = ShardReader(path, self.manifest, commit, where)
            self._readers[index] = reader
            while len(self._readers) > _OPEN_SHARDS:
                self._readers.popitem(last=False)
        return reader


def open_cache(path: Path | str | Storage, *, allow_partial: bool = False) -> Cache:
    """Opens a cache in a folder, or in another store.

    Missing shards are an error unless `allow_partial`; no shard at all, a manifest or side file
    that was changed, or a newer format always is.
    """
    storage = LocalStorage(path) if isinstance(path, Path | str) else path
    manifest, cache_id = manifest_file.read(storage)
    check_side_files(storage, manifest)
    cache = Cache(storage, manifest, cache_id, read_commits(storage, manifest, cache_id))
    missing, shards = cache.missing_shards, manifest.plan.num_shards
    if not cache.commits:
        raise IncompleteCache(
            f"{storage.root}: none of {shards} shards is done. Run cache-teacher run again."
        )
    if missing and not allow_partial:
        raise IncompleteCache(
            f"{storage.root}: {shards - len(missing)} of {shards} shards are done (shard "
            f"{missing[0]} is the first missing one). Run the same cache-teacher run command again "
            "to finish it, or train on what is there with --allow-partial."
        )
    return cache


def check_side_files(storage: Storage, manifest: Manifest) -> None:
    """Every side file is there and is the one that the manifest names."""
    for name, digest in manifest.side_files.items():
        where, size = storage.where(name), storage.size(name)
        if size is None:
            raise CorruptCache(f"{where}: this file is missing; restore it from a copy.")
        if size > _MAX_SIDE_FILE_BYTES or file_hash(storage.local(name)) != digest:
            raise CorruptCache(
                f"{where}: its hash is not the one in the manifest ({size:,} bytes); restore "
                "it from a copy."
            )


def class_ranks(storage: Storage, manifest: Manifest) -> ClassRanks:
    """The learnt order of the classes; their own order in a cache without a teacher."""
    arrays = learnt(storage, manifest)
    count = manifest.targets.num_classes
    if not arrays:
        own = np.arange(count, dtype=np.uint32)
        return ClassRanks(own, own)
    classes = arrays.get("class_by_rank", np.zeros(0, np.uint32))
    fits = classes.dtype == np.uint32 and classes.shape == (count,)
    if not fits or not np.array_equal(np.sort(classes), np.arange(count)):
        raise CorruptCache(
            f"{storage.where(_learnt_name(manifest))}: class_by_rank is no order of the "
            f"{count} classes; restore it from a copy."
        )
    return ClassRanks.from_classes(classes)


def channel_scales(storage: Storage, manifest: Manifest) -> ChannelScales:
    """What int8 states are relative to, for each layer; nothing where the codec needs nothing."""
    if manifest.hidden.codec != "int8":
        return {}
    arrays = learnt(storage, manifest)

    def of(layer: int) -> ChannelScale:
        names = ("centre", "unit")
        centre, unit = (_of_channels(storage, manifest, arrays, layer, name) for name in names)
        if not (np.isfinite(centre).all() and np.isfinite(unit).all() and unit.min() > 0):
            raise CorruptCache(
                f"{storage.where(_learnt_name(manifest))}: hidden.{layer}.centre or .unit holds "
                "NaN, infinity or a unit that is not above 0; restore it from a copy."
            )
        return ChannelScale(centre, unit)

    return {layer: of(layer) for layer in manifest.hidden.layers}


def _of_channels(
    storage: Storage, manifest: Manifest, arrays: dict[str, np.ndarray], layer: int, name: str
) -> np.ndarray:
    """`hidden.<layer>.<name>` of the learnt arrays, float32 [D]."""
    width = dict(zip(manifest.hidden.layers, manifest.hidden.widths, strict=True)).get(layer)
    found = arrays.get(f"hidden.{layer}.{name}", np.zeros(0))
    if found.dtype != np.float32 or found.shape != (width,):
        raise CorruptCache(
            f"{storage.where(_learnt_name(manifest))}: hidden.{layer}.{name} is not {width} "
            "numbers of type float32; restore it from a copy."
        )
    return found


def learnt(storage: Storage, manifest: Manifest) -> dict[str, np.ndarray]:
    """What calibration learnt: class order, channel statistics; empty without a teacher."""
    name = _learnt_name(manifest)
    if not name:
        return {}
    try:
        return load_safetensors(storage.read(name, max_bytes=_MAX_SIDE_FILE_BYTES))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CorruptCache(f"{storage.where(name)}: {error!r}; restore it from a copy.") from None


def _learnt_name(manifest: Manifest) -> str:
    return next((name for name in manifest.side_files if name.startswith("learnt-")), "")


def read_commit(storage: Storage, manifest: Manifest, cache_id: str, shard: int) -> Commit:
    """The commit of one shard; of another cache, or out of place, is an error."""
    path = storage.where(commit_name(shard))
    commit = parse_commit(storage.read(commit_name(shard), max_bytes=MAX_COMMIT_BYTES), path)
    if commit.cache_id != cache_id or commit.shard != shard:
        raise CorruptCache(
            f"{path}: belongs to shard {commit.shard} of cache {commit.cache_id[:12]}, expected "
            f"shard {shard} of cache {cache_id[:12]}. Delete it and run cache-teacher run again."
        )
    if commit.file != shard_name(shard, commit.xxh3_128):
        raise CorruptCache(
            f"{path}: names the file {commit.file[:80]!r}, which is no file of shard {shard} with "
            f"hash {commit.xxh3_128[:80]!r}. Delete it and run cache-teacher run again."
        )
    return commit


def read_commits(storage: Storage, manifest: Manifest, cache_id: str) -> list[Commit]:
    """Every commit there is, in shard order."""
    shards = manifest.plan.num_shards
    numbers = committed_shards(storage)
    if numbers and numbers[-1] >= shards:
        raise CorruptCache(
            f"{storage.root}: a commit of shard {numbers[-1]}, but there are {shards}"
        )
    return [read_commit(storage, manifest, cache_id, shard) for shard in numbers]


def committed_shards(storage: Storage) -> list[int]:
    """Numbers of the shards with a commit, from the file names alone."""
    names = set(storage.list("commits"))
    stems = [name.removeprefix("commits/").removesuffix(".json") for name in names]
    numbers = {int(stem) for stem in stems if stem.isdecimal()}
    return sorted(number for number in numbers if commit_name(number) in names)


def _check_rows(storage: Storage, commits: list[Commit]) -> None:
    """Lengths take 8 bytes a row in memory, but may take next to nothing in a commit."""
    rows = sum(min(max(0, commit.rows), MAX_SHARD_ROWS) for commit in commits)
    if rows <= _ROWS_ON_TRUST:
        return
    size = sum(storage.size(commit.file) or 0 for commit in commits)
    if rows > size:
        raise CorruptCache(
            f"{storage.root}: its commits claim {rows:,} rows, but all shards together have "
            f"{size:,} bytes. Run cache-teacher verify {storage.root} to see which are wrong."
        )
