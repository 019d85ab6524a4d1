"""Reads a cache from the text of shared/FORMAT.md alone: nothing of our packages, only public formats.

It is what a stranger with another language would write: slow, obvious, and it checks all that the
text says can be checked. Letters: R rows, P positions, K entries, C classes, D channels.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
import zstandard

NUMBERS = {
    **{"row_ids": 1, "num_tokens": 2, "num_positions": 3, "input_ids": 4, "num_segments": 5},
    **{"segments": 6, "positions": 7, "labels": 8, "target_ids": 16, "target_codes": 17},
    **{"target_range": 18, "target_tail": 20, "label_logprob": 24, "entropy": 25},
    **{"log_partition_ratio": 32, "hidden": 64},
}
Manifest = dict[str, Any]
Read = Callable[..., np.ndarray]


def read_cache(cache: Path) -> Iterator[dict[str, Any]]:
    """Every row of the committed shards, in order; ValueError at the first thing that is not as written."""
    content = (cache / "manifest.json").read_bytes()
    cache_id = hashlib.sha256(content).hexdigest()
    check(
        (cache / "manifest.sha256").read_text() == f"{cache_id}  manifest.json\n", "manifest.sha256"
    )
    manifest = json.loads(content)
    check(manifest["format_version"] <= 1, "format_version")
    learnt: dict[str, np.ndarray] = {}
    for name, digest in manifest["side_files"].items():
        content = (cache / name).read_bytes()
        check(xxhash.xxh3_128_hexdigest(content) == digest, name)
        if name.startswith("learnt-"):
            check(name == f"learnt-{digest[:16]}.safetensors", name)
            learnt = safetensors(content)
    for path in sorted((cache / "commits").glob("*.json"), key=lambda path: int(path.stem)):
        commit = json.loads(path.read_bytes())
        checksum = commit.pop("checksum")
        canonical = json.dumps(commit, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
        check(xxhash.xxh3_128_hexdigest(canonical.encode()) == checksum, f"{path}: checksum")
        place = (cache_id, int(path.stem))
        check((commit["cache_id"], commit["shard"]) == place, f"{path}: cache_id, shard")
        yield from read_shard(cache, manifest, commit, learnt)


def read_shard(
    cache: Path, manifest: Manifest, commit: dict[str, Any], learnt: dict[str, np.ndarray]
) -> Iterator[dict[str, Any]]:
    file, shard = commit["file"], commit["shard"]
    content = (cache / file).read_bytes()
    check(len(content) == commit["num_bytes"], f"{file}: num_bytes")
    check(xxhash.xxh3_128_hexdigest(content) == commit["xxh3_128"], f"{file}: xxh3_128")
    check(file == f"shards/{shard:05d}-{commit['xxh3_128'][:16]}.arrow", f"{file}: name")
    reader = pa.ipc.open_file(content)
    metadata = {"format_version": "1", "cache_id": commit["cache_id"], "shard": str(shard)}
    found = {key.decode(): value.decode() for key, value in reader.schema.metadata.items()}
    check(metadata.items() <= found.items(), f"{file}: schema metadata")
    batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
    check([batch.num_rows for batch in batches] == commit["batch_blocks"], f"{file}: batch_blocks")
    table = pa.Table.from_batches(batches, reader.schema)
    check(table.num_rows == len(commit["block_rows"]), f"{file}: block_rows")

    num_rows, lengths = sum(commit["block_rows"]), {}
    for name in ("row_tokens", "row_positions"):
        plane = payload(base64.b64decode(commit[name], validate=True), 0, 0, 4 * num_rows, name)
        lengths[name] = plane.view("<u4").astype(int)
    first = 0
    for block, count in enumerate(commit["block_rows"]):

        def read(name: str, number: int, planes: int, items: int, size: int = 1) -> np.ndarray:
            """A column of the block as unsigned integers: planes put together, or items of `size` bytes."""
            total = np.zeros(items, np.uint64)
            for index in range(planes):
                column = table.column(f"{name}.{index}")
                check(column.type == pa.large_binary() and not column.null_count, f"{file}: {name}")
                frame = column[block].as_py()  # noqa: B023 (called within the iteration)
                code = number * 256 + index
                plane = payload(frame, block, code, items * size, f"{file}: block {block}, {name}")  # noqa: B023
                total |= plane.view(f"<u{size}").astype(np.uint64) << np.uint64(8 * index)
            return total.astype(np.int64)

        rows = slice(first, first + count)
        tokens, positions = lengths["row_tokens"][rows], lengths["row_positions"][rows]
        yield from read_block(manifest, learnt, read, tokens, positions)
        first += count


def read_block(
    manifest: Manifest,
    learnt: dict[str, np.ndarray],
    read: Read,
    tokens: np.ndarray,
    counts: np.ndarray,
) -> Iterator[dict[str, Any]]:
    """The rows of one block, of the given numbers of tokens and of positions."""
    targets, columns, hidden = manifest["targets"], manifest["columns"], manifest["hidden"]
    R, P, C = len(tokens), counts.sum(), targets["num_classes"]
    length_bytes = num_bytes(manifest["preprocessing"]["max_length"])

    def whole(name: str, planes: int, items: int, size: int = 1) -> np.ndarray:
        return read(name, NUMBERS[name], planes, items, size)

    check(np.array_equal(whole("num_tokens", 1, R, 4), tokens), "num_tokens")
    check(np.array_equal(whole("num_positions", 1, R, 4), counts), "num_positions")
    row_ids = whole("row_ids", 1, R, 8)
    input_ids = cut(
        whole("input_ids", num_bytes(manifest["tokenizer"]["num_ids"] - 1), tokens.sum()), tokens
    )
    segments = [np.array([n]) for n in tokens]
    if "segments" in columns:
        num_segments = whole("num_segments", 1, R, 4)
        segments = cut(whole("segments", length_bytes, num_segments.sum()), num_segments)
    positions = [
        np.delete(np.arange(n), np.cumsum(parts) - 1)
        for n, parts in zip(tokens, segments, strict=True)
    ]
    if "positions" in columns:
        positions = cut(whole("positions", length_bytes, P), counts)
    check([len(row) for row in positions] == counts.tolist(), "positions")
    check([part.sum() for part in segments] == tokens.tolist(), "segments")
    if "labels" in columns:
        labels = cut(whole("labels", num_bytes(C - 1), P), counts)
    else:
        labels = [ids[at + 1] for ids, at in zip(input_ids, positions, strict=True)]

    values: dict[str, np.ndarray] = {}
    if targets["kind"] == "topk":
        values |= distribution(targets, learnt["class_by_rank"], whole, P)
    if "label_logprob" in columns:
        values["label_logprob"] = (
            whole("label_logprob", 2, P).astype(np.uint16).view(np.float16).astype(float)
        )
    if "entropy" in columns:
        values["entropy"] = whole("entropy", 1, P) * np.log(C) / 255
    for index, T in enumerate(targets["temperatures"]):
        name = f"log_partition_ratio.{T:g}"
        code = read(name, NUMBERS["log_partition_ratio"] + index, 2, P)
        values[name] = code * (1 - 1 / T) * np.log(C) / 65535
    for index, (layer, D) in enumerate(zip(hidden["layers"], hidden["widths"], strict=True)):
        bits = read(f"hidden.{layer}", NUMBERS["hidden"] + index, 2, P * D).reshape(P, D)
        values[f"hidden.{layer}"] = (bits.astype(np.uint32) << 16).view(np.float32)
    of_rows = {name: cut(value, counts) for name, value in values.items()}
    for r in range(R):
        row = {"row_id": int(row_ids[r]), "input_ids": input_ids[r], "segments": segments[r]}
        row |= {"positions": positions[r], "labels": labels[r]}
        yield row | {name: parts[r] for name, parts in of_rows.items()}


def distribution(
    targets: dict[str, Any], class_by_rank: np.ndarray, whole: Read, P: int
) -> dict[str, np.ndarray]:
    """Class ids and probabilities of the entries, and the probability of the tail."""
    C, bits = targets["num_classes"], targets["value_bits"]
    K = min(targets["top_k"], C)
    ranks = np.cumsum(whole("target_ids", num_bytes(C - 1), P * K).reshape(P, K), axis=1)
    check(P == 0 or ranks.max() < C, "target_ids")
    codes = whole("target_codes", 2 if bits == 16 else 1, P * K).reshape(P, K)
    if bits == 16:
        nats = codes.astype(np.uint16).view(np.float16).astype(float)
    else:
        code = whole("target_range", 1, P)
        width = np.where(code == 0, 0.0, 2.0 ** (code / 16 - 4))
        nats = width[:, None] * (codes / {7: 127, 8: 254}[bits]) ** 2
        nats[codes == 255] = np.inf
    tail = whole("target_tail", 2, P)
    kept = np.where(tail == 65535, 1.0, 1 / (1 + np.exp(-14 + 31 * tail / 65534)))
    weights = np.exp(-nats)
    probabilities = kept[:, None] * weights / weights.sum(axis=1, keepdims=True)
    ids = class_by_rank[ranks].astype(np.int64)
    return {"target_ids": ids, "target_probabilities": probabilities, "target_tail": 1 - kept}


def payload(frame: bytes, block: int, code: int, size: int, where: str) -> np.ndarray:
    """The plane inside a frame, once its size, its checksum and its place have proved right."""
    header = zstandard.get_frame_parameters(frame)
    check(header.has_checksum and header.content_size == size + 8, f"{where}: frame")
    content = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    check(
        np.frombuffer(content[:8], "<u4").tolist() == [block, code], f"{where}: block, column code"
    )
    return np.frombuffer(content[8:], np.uint8)


def safetensors(content: bytes) -> dict[str, np.ndarray]:
    """The uint32 and float32 tensors of a safetensors file."""
    start = 8 + int.from_bytes(content[:8], "little")
    header, tensors = json.loads(content[8:start]), {}
    for name in header.keys() - {"__metadata__"}:
        dtype = {"U32": "<u4", "F32": "<f4"}[header[name]["dtype"]]
        begin, end = header[name]["data_offsets"]
        tensors[name] = np.frombuffer(content[start + begin : start + end], dtype)
    return tensors


def num_bytes(largest: int) -> int:
    return max(1, (largest.bit_length() + 7) // 8)


def cut(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(lengths)[:-1])


def check(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"not as FORMAT.md says: {what}")
