"""`cache-teacher verify` and `clean`: every byte is what was written, no other file lies around."""

import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shared.cache import (
    channel_scales,
    check_side_files,
    class_ranks,
    committed_shards,
    read_commit,
)
from shared.errors import CorruptCache, TeacherCacheError
from shared.format import manifest_file
from shared.format.commits import Commit, commit_name, file_hash
from shared.format.manifest import Manifest
from shared.format.reader import ShardReader
from shared.format.schema import planes_of
from shared.progress import Progress
from shared.storage.base import Storage
from shared.storage.local import LocalStorage, temporary_files, temporary_writer
from teacher_cache.config import CleanConfig, VerifyConfig
from teacher_cache.tools import seal as seals

_STALE_AFTER_S = 24 * 3600.0  # a temporary file of another host this old has no writer any more


@dataclass(slots=True)
class Verification:
    """What `verify` found; `bad` maps a shard to the first thing wrong with it."""

    shards: int = 0
    num_shards: int = 0
    bytes: int = 0
    bad: dict[int, str] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)
    sealed: bool = False

    @property
    def sound(self) -> bool:
        return not self.bad


def verify(config: VerifyConfig) -> Verification:
    """Reads every byte of every committed shard; --drop-bad removes the commits of bad ones."""
    storage = LocalStorage(config.cache)
    manifest, cache_id = manifest_file.read(storage)
    check_side_files(storage, manifest)
    found = Verification(num_shards=manifest.plan.num_shards)
    numbers = committed_shards(storage)
    with Progress("verify", total=len(numbers), unit="shards") as progress:
        for shard in numbers:
            try:
                found.bytes += _verify_shard(storage, manifest, cache_id, shard).num_bytes
            except TeacherCacheError as error:
                found.bad[shard] = str(error)
            found.shards += 1
            progress.advance(1, bad=len(found.bad))
    if config.drop_bad and found.bad:
        storage.delete(seals.INDEX)
        for shard in found.bad:
            storage.delete(commit_name(shard))
            found.dropped.append(shard)
    if found.sound and config.seal:
        seals.seal(storage, manifest, cache_id)
    elif found.sound and storage.exists(seals.INDEX):
        seals.check_seal(storage, manifest, cache_id)
    found.sealed = storage.exists(seals.INDEX)
    return found


def _verify_shard(storage: Storage, manifest: Manifest, cache_id: str, shard: int) -> Commit:
    """Every checksum and count of one shard: file hash, frames, lengths, decoded values."""
    commit = read_commit(storage, manifest, cache_id, shard)
    path, where = storage.local(commit.file), storage.where(commit.file)
    reader = ShardReader(path, manifest, commit, where)
    ranks, planes = class_ranks(storage, manifest), planes_of(manifest)
    scales = channel_scales(storage, manifest)
    tokens, positions = commit.lengths(where, manifest.num_outputs)
    start = 0
    for number, rows in enumerate(commit.block_rows):
        values = reader.read_planes(number, planes)
        for name, expected in (("num_tokens", tokens), ("num_positions", positions)):
            stored = values[f"{name}.0"].view(np.uint32)
            if not np.array_equal(stored, expected[start : start + rows]):
                raise CorruptCache(f"{where}: block {number}, column {name}: not as in the commit")
        layers = manifest.hidden.layers
        reader.read_block(number, ranks, hidden_layers=layers, targets=True, scales=scales)
        start += rows
    digest = file_hash(path)
    if digest != commit.xxh3_128:
        raise CorruptCache(
            f"{where}: its xxh3_128 is {digest}, but its commit says {commit.xxh3_128}. The bytes "
            "between the frames were changed."
        )
    return commit


def clean(config: CleanConfig) -> list[str]:
    """Removes shards that no commit names and temporary files that have no writer any more."""
    storage = LocalStorage(config.cache)
    manifest, cache_id = manifest_file.read(storage)
    removable = [
        *_unnamed_shards(storage, manifest, cache_id),
        *_unnamed_side_files(storage, manifest),
        *_stale(storage.root),
    ]
    if not config.dry_run:
        for path in removable:
            path.unlink(missing_ok=True)
    return [path.relative_to(storage.root).as_posix() for path in removable]


def _unnamed_shards(storage: LocalStorage, manifest: Manifest, cache_id: str) -> Iterator[Path]:
    """Shard files without a commit; young ones are left, their commit may be a moment away."""
    named = set()
    for shard in committed_shards(storage):
        try:
            named.add(read_commit(storage, manifest, cache_id, shard).file)
        except CorruptCache as error:
            raise CorruptCache(f"{error} Nothing was removed.") from None
    for name in storage.list("shards"):
        path = storage.local(name)
        number = name.removeprefix("shards/").partition("-")[0]
        if not number.isdecimal():
            continue  # not ours
        shard = int(number)
        superseded = storage.exists(commit_name(shard))
        if name not in named and (superseded or _age_s(path) > _STALE_AFTER_S):
            yield path


def _unnamed_side_files(storage: LocalStorage, manifest: Manifest) -> Iterator[Path]:
    """Left by a first start of another job that lost, or died before its manifest."""
    learnt = [name for name in storage.list() if name.startswith("learnt-")]
    for name in [*learnt, *storage.list("tokenizer")]:
        if name not in manifest.side_files:
            yield storage.local(name)


def _stale(root: Path) -> Iterator[Path]:
    for path in temporary_files(root):
        host, process = temporary_writer(path)
        dead = host == socket.gethostname() and not _alive(process)
        if dead or _age_s(path) > _STALE_AFTER_S:
            yield path


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _age_s(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
