"""Format 1 of a shard: its columns, one field per column, and how a block becomes frames.

A shard is an Arrow IPC *file* with an uncompressed body. One Arrow row is one block (consecutive
rows, together at least 4,096 positions). Every Arrow column is `large_binary` and holds, per block,
one zstandard frame: one byte plane of one column, named `<column>.<plane>`. The first 8 payload
bytes of a frame say which block and which plane it is, so that a frame can never be read in the
place of another one. Light columns (row ids, lengths) are frames too: nothing in a shard is
outside a checksum except Arrow's offsets, and a wrong offset breaks the frame it points at.

Sizes are never read from a frame: rows, tokens and positions of a block come from the commit, and
the expected byte count of every plane follows from them.
"""

from dataclasses import dataclass

from shared.format.manifest import Manifest
from shared.targets.hidden import plane_bytes
from shared.targets.planes import Per

MIN_BLOCK_POSITIONS = 4096  # 1,024 cost a fifth of the reading speed: benchmarks/README.md
ROW_CHUNK_BITS = 24  # row id = first document << 24 | chunk


@dataclass(frozen=True, slots=True)
class Column:
    """One column of format 1; `number` goes into the header of each of its frames."""

    name: str
    number: int
    dtype: str
    per: Per
    unit: str
    meaning: str


# Numbers are for ever: a column that goes away keeps its number, a new one takes a new number.
COLUMNS: tuple[Column, ...] = (
    Column("row_ids", 1, "uint64", "row", "-", "first document << 24 | chunk"),
    Column("num_tokens", 2, "uint32", "row", "tokens", "tokens of the row"),
    Column("num_positions", 3, "uint32", "row", "positions", "positions of the row"),
    Column("input_ids", 4, "uint32", "token", "token id", "what teacher and student read"),
    Column("num_segments", 5, "uint32", "row", "segments", "parts of a packed row, or of a pair"),
    Column("segments", 6, "uint32", "segment", "tokens", "length of each segment, in row order"),
    Column("positions", 7, "uint32", "position", "token index", "place of each target in its row"),
    Column("labels", 8, "uint32", "position", "class", "hard label of each position"),
    Column("token_type_ids", 9, "uint8", "token", "-", "which of two texts a token is of"),
    Column("reference_bytes", 10, "uint32", "row", "bytes", "length of the row's reference"),
    Column("reference", 11, "uint8", "byte", "UTF-8", "JSON that an answer is compared with"),
    Column("label_values", 12, "float32", "position", "the corpus's", "hard label, where a number"),
    Column("target_ids", 16, "uint32", "position", "rank gap", "entries, ascending by rank"),
    Column("target_codes", 17, "uint16", "position", "code", "log-probabilities of the entries"),
    Column("target_range", 18, "uint8", "position", "log step", "range of the log-probabilities"),
    Column("target_tail", 20, "uint16", "position", "31/65534 nats", "ln(tail mass / kept mass)"),
    Column("target_counts", 21, "uint8", "position", "entries", "entries, where they differ"),
    Column("target_values", 22, "float32", "position", "the corpus's", "the teacher's number"),
    Column("label_logprob", 24, "float16", "position", "nats", "the teacher's, of the hard label"),
    Column("entropy", 25, "uint8", "position", "ln(C)/255 nats", "over all classes, T=1"),
    Column("log_partition_ratio", 32, "uint16", "position", "(1-1/T) ln(C)/65535 nats", "per T"),
    Column("hidden", 64, "bfloat16", "state", "-", "hidden states, one column for each layer"),
)
_NUMBERS = {column.name: column.number for column in COLUMNS}
_WHOLE_NUMBERS = {
    "row_ids": 8,
    "num_tokens": 4,
    "num_positions": 4,
    "num_segments": 4,
    "reference_bytes": 4,
}


@dataclass(frozen=True, slots=True)
class Plane:
    """One Arrow column: a byte plane of a column, and its bytes for each row, token, entry, ...

    A state is a position with hidden states: each, or every n-th of a row.
    """

    column: str
    plane: int
    number: int
    per: Per
    item_bytes: int

    @property
    def name(self) -> str:
        return f"{self.column}.{self.plane}"


def bytes_for(largest: int) -> int:
    """Bytes that hold the number `largest`: 1 up to 255, 2 up to 65,535, and so on."""
    return max(1, (largest.bit_length() + 7) // 8)


def layout(manifest: Manifest) -> tuple[Plane, ...]:
    """Every plane of a shard of this cache, in file order."""
    planes: list[Plane] = []

    def add(name: str, per: Per, count: int, number: int, item_bytes: int = 1) -> None:
        planes.extend(Plane(name, plane, number, per, item_bytes) for plane in range(count))

    token_bytes = bytes_for(manifest.tokenizer.num_ids - 1)
    index_bytes = bytes_for(manifest.max_row_tokens)
    widths = {
        "input_ids": token_bytes,
        "segments": index_bytes,
        "positions": index_bytes,
        "labels": bytes_for(manifest.targets.num_classes - 1),
        "label_logprob": 2,
        "entropy": 1,
        "token_type_ids": 1,
        "reference": 1,
        "label_values": 4,
    }
    described = {column.name: column for column in COLUMNS}
    for name in manifest.columns:
        if name not in described:
            continue  # of a later version
        per, number = described[name].per, _NUMBERS[name]
        if name in _WHOLE_NUMBERS:
            add(name, per, 1, number, _WHOLE_NUMBERS[name])
        else:
            add(name, per, widths[name], number)
    for shape in manifest.targets.plane_shapes:
        column, _, plane = shape.name.rpartition(".")
        planes.append(Plane(column, int(plane), _NUMBERS[column], shape.per, shape.item_bytes))
    for index, temperature in enumerate(manifest.targets.temperatures):
        number = _NUMBERS["log_partition_ratio"] + index
        add(f"log_partition_ratio.{temperature:g}", "position", 2, number)
    for index, layer in enumerate(manifest.hidden.layers):
        number, width = _NUMBERS["hidden"] + index, manifest.hidden.widths[index]
        sizes = enumerate(plane_bytes(manifest.hidden.codec, width))
        planes += [Plane(f"hidden.{layer}", n, number, "state", size) for n, size in sizes]
    return tuple(planes)


def optional_columns(
    *,
    segments: bool,
    positions: bool,
    labels: bool,
    targets: bool,
    label_values: bool = False,
    label_logprob: bool = True,
    token_types: bool = False,
    references: bool = False,
) -> list[str]:
    """Names of the non-target columns a cache has; what is absent follows the task's default."""
    names = ["row_ids", "num_tokens", "num_positions", "input_ids"]
    if token_types:
        names.append("token_type_ids")
    if segments:
        names += ["num_segments", "segments"]
    if positions:
        names.append("positions")
    if labels:
        names.append("labels")
    if label_values:
        names.append("label_values")
    if targets and label_logprob:
        names.append("label_logprob")
    if targets:
        names.append("entropy")
    if references:
        names += ["reference_bytes", "reference"]
    return names
