"""manifest.json: published once, never changed, read strictly.

An unknown format version is refused, a missing or ill-typed field is an error that names it,
unknown fields are ignored (a newer writer may add some). Every number that sizes follow from has
limits, checked before anything is allocated.
"""

import hashlib

from shared.errors import CacheMismatch, ConfigError, CorruptCache, IncompleteCache
from shared.format.limits import problems
from shared.format.manifest import FORMAT_VERSION, Manifest
from shared.storage.base import Storage
from shared.strict import build, parse_json

MANIFEST = "manifest.json"
MANIFEST_HASH = "manifest.sha256"
MAX_MANIFEST_BYTES = 16 << 20
_MAX_HASH_BYTES = 1024


def publish(storage: Storage, manifest: Manifest) -> bool:
    """Writes the manifest if the cache has none; false if another process was first."""
    for problem in problems(manifest):
        raise ConfigError(
            f"{storage.root}: {problem}. This version cannot write such a cache: ask for less, or "
            "for another --shard-tokens."
        )
    won = storage.put_new(MANIFEST, manifest.to_json())
    write_hash(storage)
    return won


def write_hash(storage: Storage) -> None:
    """Adds manifest.sha256, which a crash right after the manifest may have left out."""
    digest = hashlib.sha256(storage.read(MANIFEST, max_bytes=MAX_MANIFEST_BYTES)).hexdigest()
    storage.put_new(MANIFEST_HASH, f"{digest}  {MANIFEST}\n".encode())


def read(storage: Storage) -> tuple[Manifest, str]:
    """The manifest and the cache id; every byte is checked against manifest.sha256."""
    path = storage.where(MANIFEST)
    if not storage.exists(MANIFEST):
        raise IncompleteCache(
            f"{storage.root}: no cache here ({MANIFEST} is missing). "
            "Make one with cache-teacher run --out, or name another folder."
        )
    data = storage.read(MANIFEST, max_bytes=MAX_MANIFEST_BYTES)
    digest = hashlib.sha256(data).hexdigest()
    if not storage.exists(MANIFEST_HASH):
        raise IncompleteCache(
            f"{storage.root}: {MANIFEST_HASH} is missing, so the start of this cache was cut "
            "short. Run the same cache-teacher run command again."
        )
    recorded = (
        storage.read(MANIFEST_HASH, max_bytes=_MAX_HASH_BYTES).decode("utf-8", "replace").split()
    )
    if not recorded or recorded[0] != digest:
        raise CorruptCache(
            f"{path}: its sha256 is {digest} but {MANIFEST_HASH} says "
            f"{(recorded or ['nothing'])[0]}. "
            "One of the two files was changed; restore it from a copy."
        )
    raw = parse_json(data, path)
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version < 1:
        raise CorruptCache(f"{path}: format {version}; the first one is 1")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CacheMismatch(
            f"{path}: format {version} needs a newer teacher-cache; this one reads up to format "
            f"{FORMAT_VERSION}. Run pip install --upgrade teacher-cache."
        )
    manifest = build(Manifest, raw, path)
    for problem in problems(manifest):
        raise CorruptCache(f"{path}: {problem}. Restore it from a copy.")
    return manifest, digest
