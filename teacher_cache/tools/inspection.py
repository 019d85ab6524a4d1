"""What a finished or unfinished cache is: inspect, verify, clean. Never loads a teacher."""

import logging
import math
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from shared.cache import (
    Cache,
    channel_scales,
    check_side_files,
    class_ranks,
    committed_shards,
    open_cache,
    read_commit,
)
from shared.errors import CorruptCache, TeacherCacheError
from shared.format import manifest_file
from shared.format.commits import Commit, commit_name, file_hash
from shared.format.manifest import Manifest
from shared.format.reader import ShardReader
from shared.format.schema import planes_of
from shared.models.tokenizer import load_cached_tokenizer
from shared.progress import Progress
from shared.rows import Row
from shared.storage import LocalStorage, Storage, temporary_files, temporary_writer
from shared.targets.sample import drawn_logprob
from teacher_cache.config import CleanConfig, InspectConfig, VerifyConfig
from teacher_cache.job.statistics import HIDDEN_ERRORS, add, histogram, kept_masses
from teacher_cache.tasks import window_view
from teacher_cache.tools import seal as seals
from teacher_cache.tools.said import said_of_row

log = logging.getLogger(__name__)

_PLACES_SHOWN, _CLASSES_SHOWN = 6, 6  # of a decoded row
_HISTOGRAM_BLOCKS = 16  # about 65,000 positions
_MISSING_LISTED = 20
_STALE_AFTER_S = 24 * 3600.0  # a temporary file of another host this old has no writer any more


def inspect(config: InspectConfig) -> dict[str, Any]:
    """Provenance, completeness, sizes, kept mass, entropy and a few decoded rows."""
    cache = open_cache(config.cache, allow_partial=True)
    numbers = {
        **summary(cache),
        "rows_shown": _rows_shown(cache, config.rows),
    }
    if config.html is not None and cache.has_targets and cache.manifest.targets.kind != "values":
        numbers["histograms"] = histograms(cache)
    return numbers


def summary(cache: Cache) -> dict[str, Any]:
    """The numbers of a cache from its manifest and commits alone; no shard is opened."""
    manifest, commits = cache.manifest, cache.commits
    positions = sum(commit.positions for commit in commits)
    columns: Counter[str] = Counter()
    statistics: Counter[str] = Counter()
    for commit in commits:
        columns.update(commit.column_bytes)
        add(statistics, commit.statistics)
    target_bytes = sum(size for name, size in columns.items() if name.startswith("target_"))
    per_position = 1 / max(1, positions)
    return {
        "cache_id": cache.cache_id,
        "format_version": manifest.format_version,
        "complete": not cache.missing_shards,
        "missing_shards": cache.missing_shards[:_MISSING_LISTED],
        "shards": len(commits),
        "num_shards": manifest.plan.num_shards,
        "rows": cache.num_rows,
        "tokens": sum(commit.tokens for commit in commits),
        "positions": positions,
        "bytes": sum(commit.num_bytes for commit in commits),
        "bytes_per_position": sum(commit.num_bytes for commit in commits) * per_position,
        "target_bytes_per_position": target_bytes * per_position,
        "column_bytes_per_position": {n: s * per_position for n, s in sorted(columns.items())},
        "kept_mass": _kept_mass(statistics, per_position),
        "entries": statistics["sum_entries"] * per_position,  # of ragged kinds
        "hidden_error": {
            str(layer): _hidden_error(statistics, layer)
            for layer in manifest.hidden.layers
            if f"max_hidden_error.{layer}" in statistics
        },
        "entropy": statistics["sum_entropy"] * per_position,
        # Of a regression, which has no entropy and no log-probability.
        "teacher_mse": statistics["sum_value_squared_error"] * per_position
        if manifest.targets.kind == "values" and manifest.labelled
        else None,
        "teacher_loss": -statistics["sum_label_logprob"] * per_position
        if manifest.labelled
        else None,
        "counters": {
            name: int(value)
            for name, value in statistics.items()
            if not name.startswith(("sum_", "max_"))
        },
        **_provenance(manifest),
    }


def _kept_mass(statistics: Counter[str], per_position: float) -> dict[str, float]:
    """Mean mass of the entries at each stored temperature."""
    masses = {}
    for name, value in sorted(statistics.items()):
        stem, _, temperature = name.partition(".")
        if stem == "sum_kept_mass":
            masses[temperature or "1"] = value * per_position
    return masses


def _hidden_error(statistics: Counter[str], layer: int) -> dict[str, float]:
    """By the length of the states: of all of them together, and of the worst one."""
    squared_error, squares, worst = (statistics[f"{name}.{layer}"] for name in HIDDEN_ERRORS)
    mean = math.sqrt(squared_error / squares) if squares else 0.0
    return {"mean": mean, "worst": worst}


def _provenance(manifest: Manifest) -> dict[str, Any]:
    fields = asdict(manifest)
    names = (
        "task",
        "problem_type",
        "teacher",
        "tokenizer",
        "corpus",
        "preprocessing",
        "targets",
        "hidden",
        "plan",
    )
    return {name: fields[name] for name in names}


def _spread(cache: Cache, count: int) -> list[int]:
    return sorted({int(i) for i in np.linspace(0, cache.num_rows - 1, count)}) if count else []


def _rows_shown(cache: Cache, count: int) -> list[dict[str, Any]]:
    """Some rows as text; the tokenizer, which may take a second to load, is loaded once."""
    rows = cache[_spread(cache, count)]
    if not rows:
        return []
    tokenizer = load_cached_tokenizer(cache.storage)
    return [_decoded(cache, row, tokenizer) for row in rows]


def _decoded(cache: Cache, row: Row, tokenizer: Any) -> dict[str, Any]:
    """One row as text, with the teacher's best classes at its first positions."""
    shown: dict[str, Any] = {
        "row_id": row.row_id,
        "document": row.row_id >> 24,
        "tokens": len(row.input_ids),
        "text": tokenizer.decode(row.input_ids[:64]),
    }
    if cache.manifest.task == "sequence-classification":
        return shown | {"said": said_of_row(row, cache.manifest)}
    if cache.manifest.layout.name == "window":
        classes = cache.manifest.targets.num_classes
        return shown | {"window": window_view.shown(row, classes, tokenizer)}
    begin = 0  # of the sequence that the positions are in
    if cache.manifest.layout.name == "pair":
        begin = row.segments[0]
        shown["text"] = tokenizer.decode(row.input_ids[: min(begin, 64)])
        shown["target"] = tokenizer.decode(row.input_ids[begin:][:64])
        shown["reference"] = row.reference
    if row.targets is None:
        return shown
    targets, spec = row.targets, cache.manifest.targets
    sample = spec.kind == "sample"
    drawn = float(drawn_logprob(spec)) if sample else 1.0
    sizes = [spec.num_entries] * len(row.positions)
    if targets.counts is not None:
        sizes = targets.counts.tolist()
    ids, logprobs = targets.ids.flatten().split(sizes), targets.logprobs.flatten().split(sizes)
    names, manifest = cache.manifest.labels, cache.manifest
    name_of = names.__getitem__ if names else lambda token: str(tokenizer.decode([token]))
    shown["positions"] = []
    for place in range(min(_PLACES_SHOWN, len(row.positions))):
        best = logprobs[place].argsort(descending=True, stable=True)
        as_they_are = logprobs[place] != drawn
        rest = 1 - float(logprobs[place][as_they_are].exp().sum())
        shown["positions"].append(
            {
                **_context(cache, tokenizer, row, int(row.positions[place]), begin),
                "hard_label": name_of(int(row.labels[place])) if manifest.labelled else None,
                "teacher": [
                    {
                        "token": name_of(int(ids[place][slot])),
                        "p": round(float(logprobs[place][slot].exp()), 4),
                        "drawn": not bool(as_they_are[slot]),
                    }
                    for slot in best[:_CLASSES_SHOWN].tolist()
                ],
                "entries": sizes[place],
                # Of a sample the tail is what its drawn entries stand for.
                "rest": "left to the drawn" if sample else "tail",
                "tail_mass": round(
                    max(0.0, rest) if sample else float(targets.tail_mass[place]), 4
                ),
            }
        )
    return shown


def _context(cache: Cache, tokenizer: Any, row: Row, position: int, begin: int) -> dict[str, str]:
    """The tokens near a position that its prediction is made from; its sequence starts there."""
    around = tokenizer.decode(row.input_ids[max(0, position - 5) : position + 4])
    if cache.manifest.labels:
        return {"of": tokenizer.decode([int(row.input_ids[position])]), "around": around}
    if cache.manifest.task == "masked-lm":
        return {"around": around}
    return {"after": tokenizer.decode(row.input_ids[begin : position + 1][-8:])}


def histograms(cache: Cache) -> dict[str, Any]:
    """Positions by entropy, by tail mass and by entries, of some blocks spread over the cache.

    The tail mass of a sample is that of all classes not kept as they are.
    """
    spec = cache.manifest.targets
    chosen = np.unique(np.linspace(0, cache.num_blocks - 1, _HISTOGRAM_BLOCKS).astype(int))
    blocks = [cache.read_block(number) for number in chosen.tolist()]
    entropy = np.concatenate([block.entropy for block in blocks if block.entropy is not None])
    targets = [block.target for block in blocks if block.target is not None]
    tail = np.concatenate([1 - kept_masses(target, spec, {})[1.0] for target in targets])
    step = math.log(spec.num_classes) / 255
    found = {
        "blocks": len(blocks),
        "positions": len(entropy),
        # 8 of the 256 stored steps in each bar: another number would draw a comb.
        "entropy": histogram(entropy, -step / 2, 255.5 * step, bars=32),
        "tail_mass": histogram(tail.clip(0, 1), 0, 1),
    }
    if spec.ragged:
        counts = np.concatenate([t.counts for t in targets if t.counts is not None])
        most = int(counts.max())
        found["entries"] = histogram(counts, 0.5, most + 0.5, bars=min(40, most))
    return found


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
