"""`cache-teacher repack`: a smaller cache out of a cache, without the teacher.

Fewer entries, fewer bits, fewer hidden layers, a slice of the documents; shard i of the new cache
holds what is kept of shard i of the old one, so it resumes and shares work as a capture does. What
stays is copied bit by bit. Only where entries or bits are fewer are targets decoded and encoded
again: what was dropped joins the tail, and the values that stay are rounded once more. The manifest
says which cache it came from.

R rows, P positions, K entries.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from shared.arrays import mixed_bits, ranges
from shared.cache import Cache, class_ranks, open_cache
from shared.errors import CacheMismatch, ConfigError
from shared.format import manifest_file
from shared.format.column import PlaneSpec
from shared.format.commits import commit_name
from shared.format.encoding import from_planes
from shared.format.manifest import HiddenSpec, Manifest, differences
from shared.format.schema import ROW_CHUNK_BITS, planes_of
from shared.format.writer import ShardWriter, compress_planes
from shared.progress import Progress
from shared.storage.base import Storage
from shared.storage.local import LocalStorage
from shared.targets.hidden import num_states
from shared.targets.planes import Per
from shared.targets.record import ClassRanks
from shared.targets.spec import TargetSpec
from teacher_cache.config import RepackConfig
from teacher_cache.job.statistics import HIDDEN_ERRORS, add, block_sums
from teacher_cache.select.fewer import logprobs_of
from teacher_cache.select.kinds import SELECTORS

log = logging.getLogger(__name__)

_THRESHOLD_BLOCKS = 16  # looked at for the threshold of fewer entries: 65,536 positions


def repack(config: RepackConfig) -> None:
    """Writes the smaller cache; run again to resume."""
    source = open_cache(config.cache)
    storage = LocalStorage(config.out)
    manifest, cache_id = _publish_or_adopt(storage, source, _smaller(config, source))
    ranks = class_ranks(storage, manifest)
    documents = config.document_range(manifest.corpus.num_documents)
    with Progress("repack", total=len(source.commits), unit="shards") as progress:
        for index, commit in enumerate(source.commits):
            if not storage.exists(commit_name(commit.shard)):
                with ShardWriter(storage, manifest, cache_id, commit.shard) as writer:
                    _copy(source, index, documents, ranks, writer)
            progress.advance(1)


def _copy(
    source: Cache, index: int, documents: range, ranks: ClassRanks, writer: ShardWriter
) -> None:
    """What is kept of one shard, block by block."""
    manifest = writer.manifest
    kept = _hidden_errors(source.commits[index].statistics, manifest.hidden.layers)
    statistics = Counter(kept)
    parts = _parts(source, manifest, index, documents, statistics)
    for number, part in enumerate(parts):
        planes = _planes(part, source, manifest, ranks, statistics)
        lengths = part.num_tokens, part.num_positions
        writer.write(compress_planes(planes, number, manifest, *lengths))
    writer.statistics = dict(statistics)


def _smaller(config: RepackConfig, source: Cache) -> Manifest:
    """The manifest of the new cache: less of the same, and where it came from."""
    old = source.manifest
    return replace(
        old,
        targets=_smaller_targets(config, source),
        hidden=_fewer_layers(config, old.hidden),
        origin={"cache_id": source.cache_id, "documents": config.documents},
    )


def _smaller_targets(config: RepackConfig, source: Cache) -> TargetSpec:
    old = source.manifest.targets
    asked = {
        "top_k": config.top_k,
        "mean_entries": config.mean_entries,
        "value_bits": config.value_bits,
    }
    for name, value in asked.items():
        if value and name not in old.of_kind.reads:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option}: {config.cache} holds {old.kind} targets")
    entries = old.mean_entries if old.ragged else old.top_k
    wanted = (config.mean_entries if old.ragged else config.top_k) or entries
    bits = config.value_bits or old.value_bits
    if wanted > entries or bits > old.value_bits:
        raise ConfigError(
            f"--{'mean-entries' if old.ragged else 'top-k'} {wanted:g} --value-bits {bits}: "
            f"{config.cache} holds {entries:g} entries of {old.value_bits} bits; repacking only "
            "makes smaller"
        )
    if not old.ragged:
        return replace(old, top_k=int(wanted), value_bits=bits)
    spec = replace(old, mean_entries=wanted, value_bits=bits)
    return spec if wanted == entries else replace(spec, threshold=_threshold(spec, source))


def _threshold(spec: TargetSpec, source: Cache) -> float:
    """The threshold that gives `spec.mean_entries`, by some blocks of the cache."""
    step = max(1, source.num_blocks // _THRESHOLD_BLOCKS)
    blocks = [source.read_block(number) for number in range(0, source.num_blocks, step)]
    logprobs_NK = logprobs_of([block.target for block in blocks if block.target])
    return SELECTORS[spec.kind].find_threshold(logprobs_NK, spec)


def _fewer_layers(config: RepackConfig, old: HiddenSpec) -> HiddenSpec:
    if config.drop_hidden:
        return replace(old, layers=(), widths=())
    if not config.hidden_layers:
        return old
    gone = sorted(set(config.hidden_layers) - set(old.layers))
    if gone:
        there = ", ".join(map(str, old.layers)) or "none"
        raise ConfigError(f"--hidden-layers {gone[0]}: {config.cache} holds layers {there}")
    pairs = [
        (n, w) for n, w in zip(old.layers, old.widths, strict=True) if n in config.hidden_layers
    ]
    layers, widths = zip(*pairs, strict=True)
    return replace(old, layers=layers, widths=widths)


def _hidden_errors(statistics: Mapping[str, float], layers: Sequence[int]) -> dict[str, float]:
    """What the capture measured on all rows of a shard; without the teacher there is no more."""
    kept = {f"{name}.{layer}" for name in HIDDEN_ERRORS for layer in layers}
    return {name: value for name, value in statistics.items() if name in kept}


def _publish_or_adopt(storage: Storage, source: Cache, manifest: Manifest) -> tuple[Manifest, str]:
    if not storage.exists(manifest_file.MANIFEST):
        for name in manifest.side_files:
            storage.put_new(name, source.storage.read(name))
        manifest_file.publish(storage, manifest)
    manifest_file.write_hash(storage)
    found, cache_id = manifest_file.read(storage)
    lines = list(differences(asdict(found), asdict(manifest)))
    if lines:
        raise CacheMismatch(
            f"{storage.root}: this folder holds another cache. {'; '.join(lines)}. Choose another "
            "OUT, or ask for the same thing to go on with this one."
        )
    return found, cache_id


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a block as planes by name, u8: the items of one row after those of another."""

    planes: dict[str, np.ndarray]
    num_tokens: np.ndarray  # i32 [R]
    num_positions: np.ndarray  # i32 [R]


def _parts(
    source: Cache, manifest: Manifest, index: int, documents: range, left_out: Counter[str]
) -> Iterator[Part]:
    """What is left of the blocks of one shard: rows of these documents, planes of these columns."""
    hidden = [f"hidden.{layer}" for layer in manifest.hidden.layers]
    planes = [
        plane
        for plane in planes_of(source.manifest)
        if plane.column in hidden or not plane.column.startswith("hidden.")
    ]
    starts = np.concatenate([[0], np.cumsum(source.block_rows)])
    for number in range(*source.shard_blocks(index)):
        rows = slice(starts[number], starts[number + 1])
        values = source.read_planes(number, planes)
        whole = Part(values, source.row_tokens[rows], source.row_positions[rows])
        document = (values["row_ids.0"].view(np.uint64) >> np.uint64(ROW_CHUNK_BITS)).astype(int)
        kept_R = (document >= documents.start) & (document < documents.stop)
        left_out["rows_left_out"] += int((~kept_R).sum())
        if kept_R.any():
            yield only_rows(whole, kept_R, planes, hidden_every=manifest.hidden.every)


def only_rows(
    part: Part, kept_R: np.ndarray, planes: Sequence[PlaneSpec], *, hidden_every: int
) -> Part:
    """The rows where `kept_R` [R] is true; bytes are taken as they are."""
    items_R: dict[Per, Any] = {
        "row": 1,
        "token": part.num_tokens,
        "position": part.num_positions,
        "state": num_states(part.num_positions, hidden_every),
    }
    if "num_segments.0" in part.planes:
        items_R["segment"] = part.planes["num_segments.0"].view(np.uint32)
    if "reference_bytes.0" in part.planes:
        items_R["byte"] = part.planes["reference_bytes.0"].view(np.uint32)
    kept = {per: np.repeat(kept_R, items) for per, items in items_R.items()}
    if "target_counts.0" in part.planes:
        kept["entry"] = np.repeat(kept["position"], part.planes["target_counts.0"])
    values = {
        plane.name: part.planes[plane.name].reshape(-1, plane.item_bytes)[kept[plane.per]].ravel()
        for plane in planes
    }
    return Part(values, part.num_tokens[kept_R], part.num_positions[kept_R])


def _planes(
    part: Part, source: Cache, manifest: Manifest, ranks: ClassRanks, statistics: Counter[str]
) -> dict[str, np.ndarray]:
    """The planes of a part in the new cache; targets are coded anew only where they change."""
    light = {n: plane for n, plane in part.planes.items() if not n.startswith("hidden.")}
    lengths = part.num_tokens, part.num_positions
    block = from_planes(light, *lengths, source.manifest, source.ranks)
    changed: dict[str, np.ndarray] = {}
    if block.target is not None and manifest.targets != source.manifest.targets:
        sizes = part.num_positions
        place_P = ranges(np.zeros(len(sizes), np.int64), sizes)
        # The 1 keeps this draw apart from the first one, whose bits are of seed, row and position.
        bits = mixed_bits(manifest.seed, np.repeat(block.row_ids, sizes), place_P, 1)
        block.target.random_bits = bits
        old, new = source.manifest.targets, manifest.targets
        if (old.top_k, old.threshold) != (new.top_k, new.threshold):
            block.target = SELECTORS[new.kind].fewer(block.target, new)
        changed = manifest.targets.encode(block.target, ranks)
    add(statistics, block_sums(block, manifest.targets))
    return part.planes | changed
