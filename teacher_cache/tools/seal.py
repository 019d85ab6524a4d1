"""`verify --seal`: one file with every commit and a sha256 of every shard, for archives.

xxh3 finds accidents; a sealed cache can also be held against a published sha256 of `index.arrow`.
Nothing needs the seal to read a cache. `verify` checks it where it is, and a shard that is dropped
takes it along.
"""

import hashlib
import struct
from pathlib import Path

import pyarrow as pa

from shared.cache import read_commits
from shared.errors import CorruptCache, IncompleteCache
from shared.format.commits import Commit
from shared.format.manifest import Manifest
from shared.format.reader import open_arrow
from shared.storage.base import Storage

INDEX = "index.arrow"
# An index holds the text of every commit, a name and a hash: 1.02 to 1.3 times its commits.
FREE_INDEX_BYTES = 1 << 20
MOST_INDEX_EXPANSION = 2


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
    path = storage.where(INDEX)
    commits = read_commits(storage, manifest, cache_id)
    try:
        sealed = _read(storage, commits, cache_id)
    except CorruptCache as error:  # too large, or no file
        raise CorruptCache(f"{error}. {_AGAIN}") from None
    except (pa.ArrowException, ValueError, struct.error) as error:
        raise CorruptCache(f"{path}: not readable as an index: {error}. {_AGAIN}") from None
    if not sealed.equals(_table(storage, commits, cache_id), check_metadata=True):
        raise CorruptCache(
            f"{path}: the shards and commits are not the ones that were sealed. {_AGAIN}"
        )


def _read(storage: Storage, commits: list[Commit], cache_id: str) -> pa.Table:
    """The index, without taking more memory than these commits do, whatever the file claims."""
    texts = sum(len(commit.to_json()) for commit in commits)
    data = storage.read(INDEX, max_bytes=FREE_INDEX_BYTES + MOST_INDEX_EXPANSION * texts)
    schema, messages = open_arrow(data)
    if not schema.equals(_schema(cache_id), check_metadata=True):
        found = ", ".join(f"{field.name} {field.type}" for field in schema)
        raise ValueError(f"its columns are {found[:200]}, or it is of another cache")
    batches = [pa.ipc.read_record_batch(message, schema) for message in messages]
    table = pa.Table.from_batches(batches, schema)
    table.validate(full=True)
    return table


_AGAIN = "Compare with a copy, or seal again with cache-teacher verify --seal."


def _schema(cache_id: str) -> pa.Schema:
    columns = [
        ("shard", pa.int64()),
        *((name, pa.string()) for name in ("file", "sha256", "commit")),
    ]
    return pa.schema(columns, {"cache_id": cache_id})


def _table(storage: Storage, commits: list[Commit], cache_id: str) -> pa.Table:
    rows = [
        {
            "shard": commit.shard,
            "file": commit.file,
            "sha256": _sha256(storage.local(commit.file)),
            "commit": commit.to_json().decode(),
        }
        for commit in commits
    ]
    return pa.Table.from_pylist(rows, _schema(cache_id))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
