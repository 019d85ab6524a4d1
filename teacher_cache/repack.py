"""`cache-teacher repack`: a smaller cache out of a cache, without the teacher.

Fewer entries, fewer bits, fewer hidden layers, a slice of the documents; shard i of the new cache
holds what is kept of shard i of the old one, so it resumes and shares work as a capture does. What
was dropped from a target joins its tail; the values that stay are rounded once more. The manifest
says which cache it came from.

P positions, K entries.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from shared import manifest as manifests
from shared.blocks import Block
from shared.cache import Cache, class_ranks, open_cache
from shared.errors import CacheMismatch, ConfigError
from shared.manifest import HiddenSpec, Manifest, differences
from shared.progress import Progress
from shared.schema import ROW_CHUNK_BITS
from shared.shards import ShardWriter, commit_name, encode_block
from shared.storage import Storage
from shared.target import Target, TargetSpec
from teacher_cache.config import RepackConfig
from teacher_cache.statistics import block_sums

log = logging.getLogger(__name__)


def repack(config: RepackConfig) -> None:
    """Writes the smaller cache; run again to resume."""
    source = open_cache(config.cache)
    storage = Storage(config.out)
    manifest, cache_id = _publish_or_adopt(storage, source, _smaller(config, source))
    ranks = class_ranks(storage, manifest)
    documents = config.document_range(manifest.corpus.num_documents)
    with Progress("repack", total=len(source.commits), unit="shards") as progress:
        for index, commit in enumerate(source.commits):
            if not storage.exists(commit_name(commit.shard)):
                statistics: Counter[str] = Counter()
                with ShardWriter(storage, manifest, cache_id, commit.shard) as writer:
                    blocks = _blocks(source, manifest, index, documents, statistics)
                    for number, block in enumerate(blocks):
                        statistics.update(block_sums(block, manifest.targets))
                        writer.write(encode_block(block, number, manifest, ranks))
                    writer.statistics = dict(statistics)
            progress.advance(1)


def _smaller(config: RepackConfig, source: Cache) -> Manifest:
    """The manifest of the new cache: less of the same, and where it came from."""
    old = source.manifest
    return replace(
        old,
        targets=_smaller_targets(config, old.targets),
        hidden=_fewer_layers(config, old.hidden),
        origin={"cache_id": source.cache_id, "documents": config.documents},
    )


def _smaller_targets(config: RepackConfig, old: TargetSpec) -> TargetSpec:
    if not (config.top_k or config.value_bits):
        return old
    if old.kind != "topk":
        raise ConfigError(f"--top-k, --value-bits: {config.cache} holds {old.kind} targets")
    top_k, bits = config.top_k or old.top_k, config.value_bits or old.value_bits
    if top_k > old.top_k or bits > old.value_bits:
        raise ConfigError(
            f"--top-k {top_k} --value-bits {bits}: {config.cache} holds {old.top_k} entries of "
            f"{old.value_bits} bits; repacking only makes smaller"
        )
    return replace(old, top_k=top_k, value_bits=bits)


def _fewer_layers(config: RepackConfig, old: HiddenSpec) -> HiddenSpec:
    if config.drop_hidden:
        return HiddenSpec(layers=(), widths=(), codec=old.codec)
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
    return HiddenSpec(layers=layers, widths=widths, codec=old.codec)


def _publish_or_adopt(storage: Storage, source: Cache, manifest: Manifest) -> tuple[Manifest, str]:
    if not storage.exists(manifests.MANIFEST):
        for name in manifest.side_files:
            storage.put_new(name, source.storage.read(name))
        manifests.publish(storage, manifest)
    manifests.write_hash(storage)
    found, cache_id = manifests.read(storage)
    lines = list(differences(asdict(found), asdict(manifest)))
    if lines:
        raise CacheMismatch(
            f"{storage.root}: this folder holds another cache. {'; '.join(lines)}. Choose another "
            "OUT, or ask for the same thing to go on with this one."
        )
    return found, cache_id


def _blocks(
    source: Cache, manifest: Manifest, index: int, documents: range, left_out: Counter[str]
) -> Iterator[Block]:
    """The blocks of one shard with the rows of these documents, targets and layers cut down."""
    first, last = source.shard_blocks(index)
    for number in range(first, last):
        block = source.read_block(number, hidden_layers=manifest.hidden.layers)
        document = (block.row_ids >> np.uint64(ROW_CHUNK_BITS)).astype(np.int64)
        kept = (document >= documents.start) & (document < documents.stop)
        left_out["rows_left_out"] += int((~kept).sum())
        if not kept.all():
            block = only_rows(block, kept)
        if len(block.row_ids) == 0:
            continue
        if block.target is not None:
            block.target = _smaller_target(block.target, manifest.targets)
        yield block


def _smaller_target(target: Target, spec: TargetSpec) -> Target:
    """Weights of a sample are on a code already, so no random bit moves them."""
    if spec.kind == "topk":
        return fewer_entries(target, spec.num_entries)
    if spec.kind == "sample":
        target.random_bits = np.zeros(len(target.log_tail), np.uint64)
    return target


def only_rows(block: Block, kept_R: np.ndarray) -> Block:
    """The rows of a block where `kept_R` [R] is true."""
    tokens, positions = (np.repeat(kept_R, n) for n in (block.num_tokens, block.num_positions))

    def at(values: np.ndarray | None, mask: np.ndarray) -> Any:
        return None if values is None else values[mask]

    segments = None if block.num_segments is None else np.repeat(kept_R, block.num_segments)
    target = block.target
    return Block(
        row_ids=block.row_ids[kept_R],
        num_tokens=block.num_tokens[kept_R],
        num_positions=block.num_positions[kept_R],
        input_ids=block.input_ids[tokens],
        positions=block.positions[positions],
        segments=None if segments is None else at(block.segments, segments),
        num_segments=at(block.num_segments, kept_R),
        labels=at(block.labels, positions),
        target=None if target is None else target.at(np.flatnonzero(positions)),
        label_logprob=at(block.label_logprob, positions),
        entropy=at(block.entropy, positions),
        log_partition_ratio={t: r[positions] for t, r in block.log_partition_ratio.items()},
        hidden={layer: states[positions] for layer, states in block.hidden.items()},
    )


def fewer_entries(target: Target, num_entries: int) -> Target:
    """The most probable entries, ties to the smaller class; the others join the tail."""
    if num_entries == target.ids.shape[1]:
        return target
    order_PK = np.lexsort((target.ids, -target.logprobs), axis=1)
    ids = np.take_along_axis(target.ids, order_PK, axis=1)
    logprobs = np.take_along_axis(target.logprobs, order_PK, axis=1)
    dropped = np.exp(logprobs[:, num_entries:].astype(np.float64)).sum(axis=1)
    with np.errstate(divide="ignore"):
        log_tail = np.log(np.exp(target.log_tail.astype(np.float64)) + dropped)
    return Target(
        ids=np.ascontiguousarray(ids[:, :num_entries]),
        logprobs=np.ascontiguousarray(logprobs[:, :num_entries]),
        log_tail=log_tail.astype(np.float32),
    )
