"""A block: consecutive rows decoded as numpy arrays, and what it looks like as byte planes.

R rows, T tokens, P positions, S of them with hidden states, D channels. A pure mapping in both
directions; which planes exist is `schema.layout`'s matter, and files are `shards`'.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from shared import arrays, windows
from shared.arrays import ranges
from shared.errors import CorruptCache
from shared.format.manifest import Manifest
from shared.format.schema import layout
from shared.targets import hidden, scalars
from shared.targets.hidden import NO_SCALES, ChannelScales
from shared.targets.record import ClassRanks, Target


@dataclass(slots=True)
class Block:
    """Decoded consecutive rows.

    `positions` are token indices inside the row; `labels` is None where the hard label is the next
    token, and -1 where there is none; `label_values` (NaN: none) and `target_values` are what
    corpus and teacher say in a regression; `segments` are the lengths of the documents' parts of
    packed rows; `hidden` holds bfloat16 bit patterns. `positions` are written only where they are
    not the task's default.
    """

    row_ids: np.ndarray  # u64 [R]
    num_tokens: np.ndarray  # i32 [R]
    num_positions: np.ndarray  # i32 [R]
    input_ids: np.ndarray  # i32 [T]
    positions: np.ndarray  # i32 [P]
    segments: np.ndarray | None = None  # i32, of all rows one after another
    num_segments: np.ndarray | None = None  # i32 [R]
    token_type_ids: np.ndarray | None = None  # i32 [T]
    labels: np.ndarray | None = None  # i32 [P]
    label_values: np.ndarray | None = None  # f32 [P]
    target_values: np.ndarray | None = None  # f32 [P]
    reference: np.ndarray | None = None  # u8, the UTF-8 of all rows one after another
    reference_bytes: np.ndarray | None = None  # i32 [R]
    target: Target | None = None
    label_logprob: np.ndarray | None = None  # f32 [P]
    entropy: np.ndarray | None = None  # f32 [P]
    log_partition_ratio: dict[float, np.ndarray] = field(default_factory=dict)  # f32 [P] each
    hidden: dict[int, np.ndarray] = field(default_factory=dict)  # u16 [S, D] each


def to_planes(
    block: Block,
    manifest: Manifest,
    ranks: ClassRanks,
    scales: ChannelScales = NO_SCALES,
) -> dict[str, np.ndarray]:
    """Every plane of the cache's layout by name, u8 each; int8 states need their layers' scales."""
    planes = layout(manifest)
    columns: dict[str, Sequence[np.ndarray]] = {
        "row_ids": [_whole(block.row_ids, "<u8")],
        "num_tokens": [_whole(block.num_tokens, "<u4")],
        "num_positions": [_whole(block.num_positions, "<u4")],
    }
    if block.num_segments is not None:
        columns["num_segments"] = [_whole(block.num_segments, "<u4")]
    if block.reference is not None and block.reference_bytes is not None:
        columns["reference_bytes"] = [_whole(block.reference_bytes, "<u4")]
        columns["reference"] = [block.reference]
    for name in ("input_ids", "token_type_ids", "segments", "positions", "labels"):
        count = sum(plane.column == name for plane in planes)
        if count:
            columns[name] = arrays.split_planes(getattr(block, name).astype(np.uint32), count)
    if block.label_values is not None:
        columns["label_values"] = scalars.encode_values(block.label_values)
    if block.label_logprob is not None:
        columns["label_logprob"] = scalars.encode_label_logprob(block.label_logprob)
    if block.entropy is not None:
        classes = manifest.targets.num_classes
        columns["entropy"] = [scalars.encode_entropy(block.entropy, classes)]
        for t, ratio in block.log_partition_ratio.items():
            encoded = scalars.encode_log_partition_ratio(ratio, t, classes)
            columns[f"log_partition_ratio.{t:g}"] = encoded
    for layer, states in block.hidden.items():
        codec_name = manifest.hidden.codec
        columns[f"hidden.{layer}"] = hidden.encode(states, codec_name, scales.get(layer))
    named = {
        f"{column}.{index}": plane
        for column, parts in columns.items()
        for index, plane in enumerate(parts)
    }
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
    spec, count = manifest.targets, int(num_positions.sum())
    segments = num_segments = None
    if "segments.0" in values:
        segments, num_segments = _joined(values, "segments"), _unsigned(values["num_segments.0"])
        predicted = None if "positions.0" in values else num_positions
        _check_segments(segments, num_segments, num_tokens, predicted)
    if "positions.0" in values:
        positions = _joined(values, "positions")
        _check_positions(
            positions, num_tokens, num_positions, own_labels=manifest.hard_labels != "next"
        )
    elif manifest.layout == "outputs":
        positions = ranges(np.zeros_like(num_positions), num_positions).astype(np.int32)
    else:
        positions = _default_positions(num_tokens, num_positions, segments)
    block = Block(
        row_ids=values["row_ids.0"].view(np.uint64),
        num_tokens=num_tokens,
        num_positions=num_positions,
        input_ids=_joined(values, "input_ids"),
        positions=positions,
        segments=segments,
        num_segments=num_segments,
        labels=_joined(values, "labels") if "labels.0" in values else None,
        token_type_ids=_joined(values, "token_type_ids") if "token_type_ids.0" in values else None,
    )
    if manifest.hard_labels == "none" and manifest.problem_type == "regression":
        block.label_values = np.full(count, np.nan, np.float32)
    elif manifest.hard_labels == "none":
        block.labels = np.full(count, -1, np.int32)
    if "reference.0" in values:
        block.reference = values["reference.0"]
        block.reference_bytes = _unsigned(values["reference_bytes.0"])
    for name, found_T, limit in (
        ("input_ids", block.input_ids, manifest.tokenizer.num_ids),
        ("labels", block.labels, spec.num_classes),
    ):
        if found_T is not None and found_T.max(initial=0) >= limit:
            raise CorruptCache(
                f"{name}: found {found_T.max()}, expected below {limit}. "
                "Run cache-teacher verify CACHE --drop-bad, then run again."
            )
    if manifest.layout == "window":
        windows.check(block, spec.num_classes)
    if parts := _parts(values, "label_values"):
        block.label_values = scalars.decode_values(parts, "label_values")
    if any(shape.name in values for shape in spec.plane_shapes):
        kept = spec.decode(values, count, ranks)
        block.target_values, block.target = (kept, None) if spec.numbers else (None, kept)
    if "label_logprob.0" in values:
        block.label_logprob = scalars.decode_label_logprob(_parts(values, "label_logprob"))
    if "entropy.0" in values:
        block.entropy = scalars.decode_entropy(values["entropy.0"], spec.num_classes)
    for t in spec.temperatures:
        if parts := _parts(values, f"log_partition_ratio.{t:g}"):
            ratio = scalars.decode_log_partition_ratio(parts, t, spec.num_classes)
            block.log_partition_ratio[t] = ratio
    for layer, width in zip(manifest.hidden.layers, manifest.hidden.widths, strict=True):
        if parts := _parts(values, f"hidden.{layer}"):
            codec_name = manifest.hidden.codec
            block.hidden[layer] = hidden.decode(parts, codec_name, width, scales.get(layer))
    return block


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


def _whole(values: np.ndarray, dtype: str) -> np.ndarray:
    return np.ascontiguousarray(values, dtype).view(np.uint8)


def _unsigned(plane: np.ndarray) -> np.ndarray:
    return plane.view(np.uint32).astype(np.int32)


def _parts(values: Mapping[str, np.ndarray], column: str) -> list[np.ndarray]:
    parts: list[np.ndarray] = []
    while (name := f"{column}.{len(parts)}") in values:
        parts.append(values[name])
    return parts


def _joined(values: Mapping[str, np.ndarray], column: str) -> np.ndarray:
    return arrays.join_planes(_parts(values, column), np.uint32).view(np.int32)


def _default_positions(
    num_tokens: np.ndarray, num_positions: np.ndarray, segments: np.ndarray | None
) -> np.ndarray:
    """Every token of each segment but its last, as an index inside the row; i32 [P]."""
    if segments is None:  # a row is one segment: 2.4 times as fast as the general case
        counts = num_tokens - 1
        starts = np.cumsum(counts, dtype=np.int32) - counts
        return np.arange(counts.sum(), dtype=np.int32) - np.repeat(starts, counts)
    predicted = segments - 1
    segment_starts = np.repeat(np.cumsum(segments) - segments, predicted)
    row_starts = np.repeat(np.cumsum(num_tokens) - num_tokens, num_positions)
    first = np.repeat(np.cumsum(predicted) - predicted, predicted)
    within = np.arange(len(first)) - first
    return (segment_starts + within - row_starts).astype(np.int32)
