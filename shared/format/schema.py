"""Format 1 of a shard: its columns, one line per column, and the planes that a cache has of them.

A shard is an Arrow IPC *file* with an uncompressed body. One Arrow row is one block (consecutive
rows, together at least 4,096 positions). Every Arrow column is `large_binary` and holds, per block,
one zstandard frame: one byte plane of one column, named `<column>.<plane>`. The first 8 payload
bytes of a frame say which block and which plane it is, so that a frame can never be read in the
place of another one. Light columns (row ids, lengths) are frames too: nothing in a shard is
outside a checksum except Arrow's offsets, and a wrong offset breaks the frame it points at.

Sizes are never read from a frame: rows, tokens and positions of a block come from the commit, and
the expected byte count of every plane follows from them.
"""

from collections.abc import Iterator

import numpy as np

from shared.format.coding import (
    Bytes,
    Entropy,
    HiddenStates,
    LabelLogprob,
    LogPartitionRatios,
    Unsigned,
    Values,
    WholeNumbers,
)
from shared.format.column import Column, Contents, PlaneSpec
from shared.format.manifest import Manifest

MIN_BLOCK_POSITIONS = 4096  # 1,024 cost a fifth of the reading speed: benchmarks/README.md
ROW_CHUNK_BITS = 24  # row id = first document << 24 | chunk

_U32 = WholeNumbers("<u4", np.int32)
_INDEX = Unsigned(lambda manifest: manifest.max_row_tokens)

# In the order of a shard. Numbers are for ever: a column that goes away keeps its number, a new one
# takes a new number.
# fmt: off
COLUMNS: tuple[Column, ...] = (
    Column("row_ids", 1, "uint64", "row", "-", "first document << 24 | chunk",
           coding=WholeNumbers("<u8", np.uint64), present=lambda has: True),
    Column("num_tokens", 2, "uint32", "row", "tokens", "tokens of the row",
           coding=_U32, present=lambda has: True, source="commit"),
    Column("num_positions", 3, "uint32", "row", "positions", "positions of the row",
           coding=_U32, present=lambda has: True, source="commit"),
    Column("input_ids", 4, "uint32", "token", "token id", "what teacher and student read",
           coding=Unsigned(lambda m: m.tokenizer.num_ids - 1), present=lambda has: True),
    Column("token_type_ids", 9, "uint8", "token", "-", "which of two texts a token is of",
           coding=Unsigned(lambda m: 1), present=lambda has: has.token_types),
    Column("num_segments", 5, "uint32", "row", "segments", "parts of a packed row, or of a pair",
           coding=_U32, present=lambda has: has.segments),
    Column("segments", 6, "uint32", "segment", "tokens", "length of each segment, in row order",
           coding=_INDEX, present=lambda has: has.segments, counted_by="num_segments"),
    Column("positions", 7, "uint32", "position", "token index", "place of each target in its row",
           coding=_INDEX, present=lambda has: has.positions),
    Column("labels", 8, "uint32", "position", "class", "hard label of each position",
           coding=Unsigned(lambda m: m.targets.num_classes - 1),
           present=lambda has: has.labels, needs_labels=True),
    Column("label_values", 12, "float32", "position", "the corpus's", "hard label, where a number",
           coding=Values("label_values"),
           present=lambda has: has.label_values, needs_labels=True),
    Column("label_logprob", 24, "float16", "position", "nats", "the teacher's, of the hard label",
           coding=LabelLogprob(), present=lambda has: has.targets and has.label_logprob,
           source="teacher", needs_labels=True),
    Column("entropy", 25, "uint8", "position", "ln(C)/255 nats", "over all classes, T=1",
           coding=Entropy(), present=lambda has: has.targets, source="teacher"),
    Column("reference_bytes", 10, "uint32", "row", "bytes", "length of the row's reference",
           coding=_U32, present=lambda has: has.references),
    Column("reference", 11, "uint8", "byte", "UTF-8", "JSON that an answer is compared with",
           coding=Bytes(), present=lambda has: has.references, counted_by="reference_bytes"),
    Column("target_ids", 16, "uint32", "position", "rank gap", "entries, ascending by rank",
           source="teacher"),
    Column("target_codes", 17, "uint16", "position", "code", "log-probabilities of the entries",
           source="teacher"),
    Column("target_range", 18, "uint8", "position", "log step", "range of the log-probabilities",
           source="teacher"),
    Column("target_tail", 20, "uint16", "position", "31/65534 nats", "ln(tail mass / kept mass)",
           source="teacher"),
    Column("target_counts", 21, "uint8", "position", "entries", "entries, where they differ",
           source="teacher"),
    Column("target_values", 22, "float32", "position", "the corpus's", "the teacher's number",
           source="teacher"),
    Column("log_partition_ratio", 32, "uint16", "position", "(1-1/T) ln(C)/65535 nats", "per T",
           coding=LogPartitionRatios(), source="teacher"),
    Column("hidden", 64, "bfloat16", "state", "-", "hidden states, one column for each layer",
           coding=HiddenStates(), source="states"),
)
# fmt: on
COLUMN_OF: dict[str, Column] = {column.name: column for column in COLUMNS}


def columns_of(contents: Contents) -> tuple[str, ...]:
    """Names of the columns that a manifest lists; those of targets and states follow from it."""
    return tuple(c.name for c in COLUMNS if c.present is not None and c.present(contents))


def planes_of(manifest: Manifest) -> tuple[PlaneSpec, ...]:
    """Every plane of a shard of this cache, in file order."""
    return tuple(_planes(manifest))


def _planes(manifest: Manifest) -> Iterator[PlaneSpec]:
    for name in manifest.columns:
        if name in COLUMN_OF:  # others are of a later version
            yield from COLUMN_OF[name].planes(manifest)
    for shape in manifest.targets.plane_shapes:
        name, _, plane = shape.name.rpartition(".")
        number = COLUMN_OF[name].number
        yield PlaneSpec(name, int(plane), number, shape.per, shape.item_bytes)
    for column in COLUMNS:
        if column.present is None:
            yield from column.planes(manifest)
