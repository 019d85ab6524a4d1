"""`verify --seal`: one file with every commit and a sha256 of every shard, for archives.

xxh3 finds accidents; a sealed cache can also be held against a published sha256 of `index.arrow`.
Nothing needs the seal to read a cache. `verify` checks it where it is, and a shard that is dropped
takes it along.
"""

import hashlib
from pathlib import Path

import pyarrow as pa

from shared.cache import read_commits
from shared.errors import CorruptCache, IncompleteCache
from shared.manifest import Manifest
from shared.shards import Commit
from shared.storage import Storage

INDEX = "index.arrow"


def seal(storage: Storage, manifest: Manifest, cache_id: str) -> None:
    """Writes index.arrow; every shard must be committed."""
    commits = read_commits(storage, manifest, cache_id)
    missing = manifest.plan.num_shards - len(commits)
    if missing:
        raise IncompleteCache(
            f"{storage.root}: {missing} of {manifest.plan.num_shards} shards are missing, so it "
            "cannot be sealed. Run cache-teacher run to its end first."
        )
    sink = pa.BufferOutputStream()
    table = _table(storage, commits, cache_id)
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    storage.put(INDEX, sink.getvalue().to_pybytes())


def check_seal(storage: Storage, manifest: Manifest, cache_id: str) -> None:
    """Every commit and the sha256 of every shard against index.arrow."""
    path = storage.path(INDEX)
    try:
        sealed = pa.ipc.open_file(pa.py_buffer(storage.read(INDEX))).read_all()
        sealed.validate(full=True)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptCache(f"{path}: not readable as Arrow: {error}. {_AGAIN}") from None
    now = _table(storage, read_commits(storage, manifest, cache_id), cache_id)
    if not sealed.schema.equals(now.schema, check_metadata=True) or not sealed.equals(now):
        raise CorruptCache(
            f"{path}: the shards and commits are not the ones that were sealed. {_AGAIN}"
        )


_AGAIN = "Compare with a copy, or seal again with cache-teacher verify --seal."


def _table(storage: Storage, commits: list[Commit], cache_id: str) -> pa.Table:
    return pa.table(
        {
            "shard": pa.array([commit.shard for commit in commits], pa.int64()),
            "file": pa.array([commit.file for commit in commits], pa.string()),
            "sha256": pa.array([_sha256(storage.path(c.file)) for c in commits], pa.string()),
            "commit": pa.array([commit.to_json().decode() for commit in commits], pa.string()),
        },
        metadata={"cache_id": cache_id},
    )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
