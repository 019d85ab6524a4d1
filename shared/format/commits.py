"""The commit of a shard: the record that it is done, what its file is, and every length in it."""

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from shared.errors import CorruptCache
from shared.format import frames
from shared.format.limits import MAX_SHARD_ROWS
from shared.strict import build, parse_json

MAX_COMMIT_BYTES = 16 << 20
REPAIR = (
    "Run cache-teacher verify CACHE --drop-bad, then cache-teacher run again: only this shard "
    "is redone."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """The record that shard `shard` is done: what its file is, and every length in it."""

    cache_id: str
    shard: int
    file: str
    num_bytes: int
    xxh3_128: str
    rows: int
    tokens: int
    positions: int
    batch_blocks: tuple[int, ...]
    block_rows: tuple[int, ...]
    row_tokens: str
    row_positions: str
    column_bytes: dict[str, int]
    statistics: dict[str, float]

    def lengths(self, where: str, num_outputs: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and positions of each row, i32 [rows] each.

        `num_outputs`: the positions that every row has, where these are outputs and not tokens.
        """
        tokens = _unpacked_lengths(self.row_tokens, self.rows, f"{where}: row_tokens")
        positions = _unpacked_lengths(self.row_positions, self.rows, f"{where}: row_positions")
        sums = (int(tokens.sum(dtype=np.int64)), int(positions.sum(dtype=np.int64)))
        counts = (sum(self.block_rows), sum(self.batch_blocks))
        least = min((*self.block_rows, *(count - 1 for count in self.batch_blocks), 0))
        if least < 0 or (*sums, *counts) != (
            *(self.tokens, self.positions),
            *(self.rows, len(self.block_rows)),
        ):
            raise CorruptCache(
                f"{where}: the lengths of its rows do not add up to its totals. {REPAIR}"
            )
        if num_outputs and (positions != num_outputs).any():
            raise CorruptCache(
                f"{where}: a row of other than {num_outputs:,} positions, one for each label. "
                f"{REPAIR}"
            )
        most = num_outputs or tokens
        if self.rows and (tokens.min() < 1 or positions.min() < 0 or (positions > most).any()):
            raise CorruptCache(
                f"{where}: a row without tokens, or with more positions than tokens. {REPAIR}"
            )
        return tokens, positions

    def to_json(self) -> bytes:
        body = asdict(self)
        body["checksum"] = _checksum(body)
        return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def commit_name(shard: int) -> str:
    return f"commits/{shard:05d}.json"


def shard_name(shard: int, digest: str) -> str:
    """The content name of a shard file: its number and the first 16 digits of its xxh3_128."""
    return f"shards/{shard:05d}-{digest[:16]}.arrow"


def parse_commit(data: bytes, where: str) -> Commit:
    """A commit from its JSON; a byte changed anywhere is an error that names the file."""
    raw = parse_json(data, where)
    sound = data.isascii() and isinstance(raw, dict)
    if not sound or raw.pop("checksum", None) != _checksum(raw):
        raise CorruptCache(
            f"{where}: this commit does not match its own checksum. Delete it and run the same "
            "cache-teacher run command again: only its shard is redone."
        )
    commit = build(Commit, raw, where)
    for name, value in commit.statistics.items():  # a sum may be infinite, a count may not
        if math.isnan(value) or not (name.startswith("sum_") or math.isfinite(value)):
            raise CorruptCache(f"{where}: statistics: {name[:80]!r} is {value}. {REPAIR}")
    return commit


def file_hash(path: Path) -> str:
    """xxh3_128 of a file, in hexadecimal."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while piece := file.read(8 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _checksum(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(text.encode())


def packed_lengths(lengths: np.ndarray) -> str:
    """The lengths of all rows of a shard as text: a frame, in base64."""
    plane = np.ascontiguousarray(lengths, "<u4").view(np.uint8)
    return base64.b64encode(frames.compress(plane, block=0, column=0)).decode()


def _unpacked_lengths(text: str, rows: int, where: str) -> np.ndarray:
    if not 0 <= rows <= MAX_SHARD_ROWS:
        raise CorruptCache(
            f"{where}: {rows:,} rows in one shard, expected at most {MAX_SHARD_ROWS:,}; a smaller "
            "--shard-tokens makes shards of fewer rows"
        )
    try:
        frame = memoryview(base64.b64decode(text, validate=True))
    except ValueError as error:
        raise CorruptCache(f"{where}: not base64: {error}") from None
    plane = frames.decompress(frame, block=0, column=0, size=4 * rows, where=where)
    lengths = plane.view(np.int32)
    if lengths.min(initial=0) < 0:
        raise CorruptCache(f"{where}: a length of 2**31 or more. {REPAIR}")
    return lengths
