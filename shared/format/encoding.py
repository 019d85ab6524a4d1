"""A block as byte planes and back: a pure mapping in both directions.

R rows, T tokens, P positions. Which planes exist, and how each is written, is in `schema.COLUMNS`;
files are `shards`' matter.
"""

from collections.abc import Mapping

import numpy as np

from shared.errors import CorruptCache
from shared.format.blocks import Block
from shared.format.coding import Context
from shared.format.manifest import Manifest
from shared.format.schema import COLUMNS, planes_of
from shared.targets.hidden import NO_SCALES, ChannelScales
from shared.targets.record import ClassRanks


def to_planes(
    block: Block,
    manifest: Manifest,
    ranks: ClassRanks,
    scales: ChannelScales = NO_SCALES,
) -> dict[str, np.ndarray]:
    """Every plane of this cache by name, u8 each; int8 states need their layers' scales."""
    planes, context = planes_of(manifest), Context(manifest, ranks, scales)
    there = {plane.column.partition(".")[0] for plane in planes}
    named: dict[str, np.ndarray] = {}
    for column in COLUMNS:
        if column.name in there:
            named |= column.encode(block, context)
    kept = block.target_values if manifest.targets.numbers else block.target
    if kept is not None:
        named |= manifest.targets.encode(kept, ranks)
    return {plane.name: named[plane.name] for plane in planes}


def from_planes(
    values: Mapping[str, np.ndarray],
    num_tokens: np.ndarray,
    num_positions: np.ndarray,
    manifest: Manifest,
    ranks: ClassRanks,
    scales: ChannelScales = NO_SCALES,
) -> Block:
    """The block that these planes hold; columns that were not read stay None or absent."""
    context = Context(manifest, ranks, scales)
    found = {column.name: column.decode(values, context) for column in COLUMNS}
    found = {name: value for name, value in found.items() if value is not None}
    for column in COLUMNS:
        if column.counted_by and column.name not in found:
            found.pop(column.counted_by, None)
    found |= {"num_tokens": num_tokens, "num_positions": num_positions}
    segments = found.get("segments")
    if segments is not None:
        predicted = None if "positions" in found else num_positions
        _check_segments(segments, found["num_segments"], num_tokens, predicted)
    if "positions" in found:
        own_labels = manifest.hard_labels != "next"
        _check_positions(found["positions"], num_tokens, num_positions, own_labels=own_labels)
    else:
        found["positions"] = manifest.layout.default_positions(num_tokens, num_positions, segments)
    block = Block(**found)
    _without_labels(block, manifest)
    _check_classes(block, manifest)
    manifest.layout.check(block, manifest.targets.num_classes)
    if any(shape.name in values for shape in manifest.targets.plane_shapes):
        kept = manifest.targets.decode(values, int(num_positions.sum()), ranks)
        numbers = manifest.targets.numbers
        block.target_values, block.target = (kept, None) if numbers else (None, kept)
    return block


def _without_labels(block: Block, manifest: Manifest) -> None:
    """Writes down that no position has a hard label, where none is stored and none follows."""
    if manifest.hard_labels != "none":
        return
    if manifest.problem.numbers:
        block.label_values = np.full(len(block.positions), np.nan, np.float32)
    else:
        block.labels = np.full(len(block.positions), -1, np.int32)


def _check_classes(block: Block, manifest: Manifest) -> None:
    """Tokens are of the vocabulary, and labels are classes."""
    for name, found, limit in (
        ("input_ids", block.input_ids, manifest.tokenizer.num_ids),
        ("labels", block.labels, manifest.targets.num_classes),
    ):
        if found is not None and found.max(initial=0) >= limit:
            raise CorruptCache(
                f"{name}: found {found.max()}, expected below {limit}. "
                "Run cache-teacher verify CACHE --drop-bad, then run again."
            )


def _check_segments(
    segments: np.ndarray,
    num_segments: np.ndarray,
    num_tokens: np.ndarray,
    predicted: np.ndarray | None,
) -> None:
    """Each has a token at least, and they add up to their rows.

    `predicted`: the positions of each row where every token but a segment's last has a target.
    """
    ends = np.cumsum(num_segments)
    sums = np.diff(np.concatenate([[0], np.cumsum(segments)])[np.concatenate([[0], ends])])
    fits = len(segments) == ends[-1] if len(ends) else not len(segments)
    if (
        not fits
        or segments.min(initial=1) < 1
        or not np.array_equal(sums, num_tokens)
        or (predicted is not None and not np.array_equal(num_tokens - num_segments, predicted))
    ):
        raise CorruptCache(
            "segments: found lengths that do not add up to the rows that the commit lists. "
            "Run cache-teacher verify CACHE --drop-bad, then run again."
        )


def _check_positions(
    positions: np.ndarray, num_tokens: np.ndarray, num_positions: np.ndarray, *, own_labels: bool
) -> None:
    """Each is a token of its row, and has one behind it where that is its hard label."""
    limits = np.repeat(num_tokens - (not own_labels), num_positions)
    if (positions >= limits).any():
        raise CorruptCache(
            "positions: found one behind the end of its row. "
            "Run cache-teacher verify CACHE --drop-bad, then run again."
        )
