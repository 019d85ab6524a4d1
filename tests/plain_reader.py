"""Reads a cache by the text of shared/format/FORMAT.md alone: nothing of our packages is imported.

It is what a stranger would write: slow and obvious, with every check that the text allows for.
P positions, E entries of all of them, C classes, D channels.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
import zstandard

Layout = dict[str, tuple[int, int, int, int, str]]  # number, planes, bytes of an item, items per


def read_cache(cache: Path) -> Iterator[dict[str, Any]]:
    """Every row of the committed shards in order; ValueError where anything is not as written."""
    content = (cache / "manifest.json").read_bytes()
    cache_id = hashlib.sha256(content).hexdigest()
    line = (cache / "manifest.sha256").read_text()
    check(line == f"{cache_id}  manifest.json\n", "manifest.sha256")
    manifest = json.loads(content)
    check(manifest["format_version"] == 1, "format_version")
    kinds = ("topk", "adaptive", "sample", "dense", "values", "none")
    check(manifest["targets"]["kind"] in kinds, "targets.kind")
    check(manifest["hidden"]["codec"] in ("bf16", "fp8", "int8"), "hidden.codec")
    learnt: dict[str, np.ndarray] = {}
    for name, digest in manifest["side_files"].items():
        content = (cache / name).read_bytes()
        check(xxhash.xxh3_128_hexdigest(content) == digest, name)
        if name.startswith("learnt-"):
            check(name == f"learnt-{digest[:16]}.safetensors", name)
            learnt = safetensors(content)
    for path in sorted((cache / "commits").glob("*.json"), key=lambda path: int(path.stem)):
        content = path.read_bytes()
        commit = json.loads(content)
        content = content.replace(f'"checksum":"{commit["checksum"]}",'.encode(), b"", 1)
        check(xxhash.xxh3_128_hexdigest(content) == commit["checksum"], f"{path}: checksum")
        check(commit["cache_id"] == cache_id, f"{path}: cache_id")
        check(path.name == f"{commit['shard']:05d}.json", f"{path}: shard")
        check(commit["shard"] < manifest["plan"]["num_shards"], f"{path}: plan.num_shards")
        every = manifest["hidden"].get("every", 1)
        for values in read_shard(cache, layout(manifest), commit, every):
            yield from rows(values, manifest, learnt)


def read_shard(
    cache: Path, columns: Layout, commit: dict[str, Any], every: int
) -> Iterator[dict[str, np.ndarray]]:
    """The columns of each block, as the integers that the planes of a column make together."""
    content = (cache / commit["file"]).read_bytes()
    digest = xxhash.xxh3_128_hexdigest(content)
    check(digest == commit["xxh3_128"], f"{commit['file']}: xxh3_128")
    check(len(content) == commit["num_bytes"], f"{commit['file']}: num_bytes")
    name = f"shards/{commit['shard']:05d}-{digest[:16]}.arrow"
    check(commit["file"] == name, f"{commit['file']}: name")
    reader = pa.ipc.open_file(content)
    expected = {"format_version": 1, "cache_id": commit["cache_id"], "shard": commit["shard"]}
    for key, value in expected.items():
        check(reader.schema.metadata[key.encode()] == str(value).encode(), f"{name}: {key}")
    batches = [reader.get_batch(index) for index in range(reader.num_record_batches)]
    check([len(batch) for batch in batches] == commit["batch_blocks"], f"{name}: batch_blocks")
    table = pa.Table.from_batches(batches, reader.schema)
    table.validate(full=True)
    check(len(table) == len(commit["block_rows"]), f"{name}: block_rows")
    check(commit["rows"] == sum(commit["block_rows"]), f"{name}: rows")
    lengths = {}
    for key in ("tokens", "positions"):
        frame = base64.b64decode(commit[f"row_{key}"], validate=True)
        lengths[key] = plane(frame, 0, 0, 4 * commit["rows"]).view("<u4")
        check(lengths[key].sum() == commit[key], f"{name}: {key}")
    first = 0
    for block, num_rows in enumerate(commit["block_rows"]):
        of_rows = slice(first, first + num_rows)
        first += num_rows
        tokens, positions = lengths["tokens"][of_rows], lengths["positions"][of_rows]
        states = np.ceil(positions / every).astype(np.int64)
        counts = {"row": num_rows, "token": tokens.sum(), "position": positions.sum()}
        counts["state"] = states.sum()
        values: dict[str, np.ndarray] = {}
        for column, (number, planes, size, items, per) in columns.items():
            values[column] = np.zeros(int(counts[per]) * items, np.int64)
            first_plane = 1 if column.endswith(".scale") else 0
            for index in range(planes):
                arrow = table.column(f"{column.removesuffix('.scale')}.{first_plane + index}")
                check(arrow.type == pa.large_binary() and not arrow.null_count, column)
                frame = arrow[block].as_py()
                code = number * 256 + first_plane + index
                content = plane(frame, block, code, values[column].size * size)
                values[column] |= content.view(f"<u{size}").astype(np.int64) << 8 * index
            if column == "num_segments":
                counts["segment"] = values[column].sum()
            if column == "reference_bytes":
                counts["byte"] = values[column].sum()
            if column == "target_counts":
                counts["entry"] = values[column].sum()
        check(np.array_equal(values["num_tokens"], tokens), f"{name}: num_tokens")
        check(np.array_equal(values["num_positions"], positions), f"{name}: num_positions")
        yield values


def layout(manifest: dict[str, Any]) -> Layout:
    """Every column of this cache, as in the table."""
    targets, hidden = manifest["targets"], manifest["hidden"]
    kind, C = targets["kind"], targets["num_classes"]
    class_bytes = num_bytes(targets["num_classes"] - 1)
    options = manifest["preprocessing"]
    longest = options["max_length"]
    if manifest["task"] == "seq2seq-lm":
        longest += 1 + options["max_target_length"]
    place_bytes = num_bytes(longest)
    table: Layout = {
        "row_ids": (1, 1, 8, 1, "row"),
        "num_tokens": (2, 1, 4, 1, "row"),
        "num_positions": (3, 1, 4, 1, "row"),
        "input_ids": (4, num_bytes(manifest["tokenizer"]["num_ids"] - 1), 1, 1, "token"),
        "num_segments": (5, 1, 4, 1, "row"),
        "segments": (6, place_bytes, 1, 1, "segment"),
        "positions": (7, place_bytes, 1, 1, "position"),
        "labels": (8, class_bytes, 1, 1, "position"),
        "token_type_ids": (9, 1, 1, 1, "token"),
        "reference_bytes": (10, 1, 4, 1, "row"),
        "reference": (11, 1, 1, 1, "byte"),
        "label_values": (12, 4, 1, 1, "position"),
        "label_logprob": (24, 2, 1, 1, "position"),
        "entropy": (25, 1, 1, 1, "position"),
    }
    table = {name: column for name, column in table.items() if name in manifest["columns"]}
    entries, per = {
        "topk": (min(targets["top_k"], C), "position"),
        "dense": (C, "position"),
    }.get(kind, (1, "entry"))
    halves = kind == "dense" or targets["value_bits"] == 16
    if kind in ("adaptive", "sample"):
        table["target_counts"] = (21, 1, 1, 1, "position")
    if kind in ("topk", "adaptive", "sample"):
        table["target_ids"] = (16, class_bytes, 1, entries, per)
    if kind == "values":
        table["target_values"] = (22, 4, 1, 1, "position")
    elif kind != "none":
        table["target_codes"] = (17, 2 if halves else 1, 1, entries, per)
    if kind == "topk" and not halves:
        table["target_range"] = (18, 1, 1, 1, "position")
    if kind in ("topk", "adaptive"):
        table["target_tail"] = (20, 2, 1, 1, "position")
    for index, T in enumerate(targets["temperatures"]):
        table[f"log_partition_ratio.{T:g}"] = (32 + index, 2, 1, 1, "position")
    for index, (layer, D) in enumerate(zip(hidden["layers"], hidden["widths"], strict=True)):
        scale_planes = {"bf16": 0, "fp8": 1, "int8": 2}[hidden["codec"]]
        table[f"hidden.{layer}"] = (64 + index, 1 if scale_planes else 2, 1, D, "state")
        if scale_planes:  # planes behind those of the numbers, here a column of their own
            table[f"hidden.{layer}.scale"] = (64 + index, scale_planes, 1, 1, "state")
    return table


def rows(
    values: dict[str, np.ndarray], manifest: dict[str, Any], learnt: dict[str, np.ndarray]
) -> Iterator[dict[str, Any]]:
    """The rows of a block: defaults filled in, codes turned into what they mean."""
    tokens, counts, targets = values["num_tokens"], values["num_positions"], manifest["targets"]
    input_ids, segments = cut(values["input_ids"], tokens), cut(tokens, np.ones_like(tokens))
    if "segments" in values:
        segments = cut(values["segments"], values["num_segments"])
    ends = [np.cumsum(lengths) for lengths in segments]
    check([end[-1] for end in ends] == tokens.tolist(), "segments")
    default = [np.setdiff1d(np.arange(end[-1]), end - 1) for end in ends]
    of_outputs = manifest.get("problem_type", "single_label") != "single_label"
    if of_outputs:
        default = [np.arange(len(manifest["labels"]))] * len(counts)
    positions = cut(values["positions"], counts) if "positions" in values else default
    check([len(places) for places in positions] == counts.tolist(), "num_positions")
    if "label_values" in values:
        labels = cut(float32(values["label_values"]), counts)
    elif "labels" in values:
        labels = cut(values["labels"], counts)
    elif not manifest.get("labelled", True):
        none = np.nan if manifest["problem_type"] == "regression" else -1
        labels = [np.full(count, none) for count in counts]
    else:
        labels = [ids[places + 1] for ids, places in zip(input_ids, positions, strict=True)]

    of_positions: dict[str, np.ndarray] = {}
    of_entries: dict[str, np.ndarray] = {}
    sizes = counts
    if targets["kind"] == "values":
        of_positions["target_values"] = float32(values["target_values"])
    elif targets["kind"] != "none":
        entries, tail = distributions(values, targets, learnt)
        if targets["kind"] in ("topk", "dense"):
            of_positions |= {name: part.reshape(len(tail), -1) for name, part in entries.items()}
        else:
            of_entries, of_positions["target_counts"] = entries, values["target_counts"]
            sizes = np.array([part.sum() for part in cut(values["target_counts"], counts)])
        of_positions["target_tail"] = tail
        if "label_logprob" in values:
            of_positions["label_logprob"] = half(values["label_logprob"])
        of_positions["entropy"] = values["entropy"] * np.log(targets["num_classes"]) / 255
    for T in targets["temperatures"]:
        ratio = values[f"log_partition_ratio.{T:g}"] / 65535
        ratio *= (1 - 1 / T) * np.log(targets["num_classes"])
        of_positions[f"log_partition_ratio.{T:g}"] = ratio
    of_rows: dict[str, Any] = {name: cut(part, counts) for name, part in of_positions.items()}
    of_rows |= {name: cut(part, sizes) for name, part in of_entries.items()}
    hidden = manifest["hidden"]
    states = np.ceil(counts / hidden.get("every", 1)).astype(np.int64)
    for layer, D in zip(hidden["layers"], hidden["widths"], strict=True):
        bits = hidden_bits(values, f"hidden.{layer}", D, hidden["codec"], learnt)
        of_rows[f"hidden.{layer}"] = cut(bits, states)
    of_rows |= {"row_id": values["row_ids"], "input_ids": input_ids, "segments": segments}
    of_rows |= {"positions": positions, "labels": labels}
    if "token_type_ids" in values:
        of_rows["token_type_ids"] = cut(values["token_type_ids"], tokens)
    if "reference" in values:
        texts = cut(values["reference"], values["reference_bytes"])
        of_rows["reference"] = [json.loads(text.astype(np.uint8).tobytes()) for text in texts]
    for index in range(len(tokens)):
        yield {name: content[index] for name, content in of_rows.items()}


def float32(bits: np.ndarray) -> np.ndarray:
    """Numbers by their bits, which must be finite."""
    numbers = bits.astype(np.uint32).view(np.float32)
    check(bool(np.isfinite(numbers).all()), "a number")
    return numbers


def distributions(
    values: dict[str, np.ndarray], targets: dict[str, Any], learnt: dict[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Class and probability (of a sample: weight) of every entry, [E]; the mass of the tail [P]."""
    kind, C, codes = targets["kind"], targets["num_classes"], values["target_codes"]
    if kind in ("adaptive", "sample"):
        counts = values["target_counts"]
    else:
        K = C if kind == "dense" else min(targets["top_k"], C)
        counts = np.full(len(codes) // K, K)
    check(counts.min(initial=1) >= 1, "target_counts")
    if kind == "dense":
        classes = np.tile(np.arange(C), len(counts))
    else:
        class_by_rank = learnt["class_by_rank"]
        check(np.array_equal(np.sort(class_by_rank), np.arange(C)), "class_by_rank")
        ranks = [np.cumsum(gaps) for gaps in cut(values["target_ids"], counts)]
        check(max((end[-1] for end in ranks if len(end)), default=0) < C, "target_ids")
        classes = class_by_rank[np.concatenate(ranks)].astype(np.int64)
    nats = nats_of(codes, counts, values, targets)
    weights = np.exp(-nats)
    if kind == "sample":
        return {"target_ids": classes, "target_probabilities": weights}, np.zeros(len(counts))
    tail = values.get("target_tail", np.full(len(counts), 65535))
    ratio = np.where(tail == 65535, -np.inf, -14 + 31 * tail / 65534)
    sums = np.array([part.sum() for part in cut(weights, counts)])[: len(counts)]
    check(bool((sums > 0).all()), "target_codes")
    probabilities = weights * np.repeat(1 / (1 + np.exp(ratio)) / sums, counts)
    of_entries = {"target_ids": classes, "target_probabilities": probabilities}
    return of_entries, 1 / (1 + np.exp(-ratio))


def nats_of(
    codes: np.ndarray, counts: np.ndarray, values: dict[str, np.ndarray], targets: dict[str, Any]
) -> np.ndarray:
    """How far each entry lies below the height of its kind, [E]."""
    kind, bits = targets["kind"], targets["value_bits"]
    if kind == "dense" or bits == 16:
        drawn = (codes == 65535) & (kind == "sample")
        check(bool((drawn | (codes <= 0x7C00)).all()), "target_codes")
        return np.where(drawn, -np.log(targets.get("threshold") or 1), half(codes))
    if kind == "topk":
        code = values["target_range"]
        ranges = np.repeat(np.where(code == 0, 0, 2 ** (code / 16 - 4)), counts)
        levels = {7: 127, 8: 254}[bits]
        return np.where(codes == 255, np.inf, ranges * (codes / levels) ** 2)
    levels, nats_of_threshold = {7: 127, 8: 255}[bits], -np.log(targets["threshold"])
    if kind == "adaptive":
        return nats_of_threshold * (codes / levels) ** 2
    kept = (3 + nats_of_threshold) * ((codes - 1) / (levels - 1)) ** 2
    return np.where(codes == 0, nats_of_threshold, kept)


def hidden_bits(
    values: dict[str, np.ndarray], name: str, D: int, codec: str, learnt: dict[str, np.ndarray]
) -> np.ndarray:
    """The bits of bfloat16 hidden states, [states, D]."""
    codes = values[name].reshape(-1, D)
    if codec == "bf16":
        return codes
    scale = values[f"{name}.scale"].reshape(-1, 1)
    if codec == "fp8":
        check(scale.min(initial=16) >= 16 and scale.max(initial=16) <= 254, f"{name}: scale")
        exponent, mantissa = codes >> 3 & 15, codes & 7
        small = mantissa / 8 * 2.0**-6
        normal = (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        check(not np.any((exponent == 15) & (mantissa == 7)), f"{name}: NaN")
        size = np.where(exponent == 0, small, normal) * 2.0 ** (scale - 135)
        numbers = np.where(codes & 128, -size, size).astype(np.float32)
        bits = numbers.view(np.uint32)
        check(not np.any(bits & 0xFFFF), f"{name}: no bfloat16")
        return (bits >> 16).astype(np.int64)
    a = (scale << 16).astype("<u4").view("<f4")
    q = np.where(codes > 127, codes - 256, codes).astype(np.float32)
    numbers = learnt[f"{name}.centre"] + (q * a) * learnt[f"{name}.unit"]
    return round_to_bfloat16(numbers)


def round_to_bfloat16(numbers: np.ndarray) -> np.ndarray:
    """Bits of the nearest bfloat16; of two as near, the even one."""
    bits = numbers.astype(np.float32).view(np.uint32).astype(np.int64)
    below, rest = bits >> 16, bits & 0xFFFF
    return below + ((rest > 0x8000) | ((rest == 0x8000) & (below & 1 == 1)))


def plane(frame: bytes, block: int, code: int, size: int) -> np.ndarray:
    """The bytes inside a frame, once its size, its checksum and its place have proved right."""
    where = f"frame of block {block}, column {code >> 8}, plane {code & 255}"
    header = zstandard.get_frame_parameters(frame)
    check(header.has_checksum and header.content_size == 8 + size, where)
    content = zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    check(np.frombuffer(content, "<u4", count=2).tolist() == [block, code], where)
    return np.frombuffer(content, np.uint8, offset=8)


def safetensors(content: bytes) -> dict[str, np.ndarray]:
    """The uint32 and float32 tensors of a safetensors file."""
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    arrays = {}
    for name, tensor in header.items():
        first, end = tensor["data_offsets"]
        dtype = {"U32": "<u4", "F32": "<f4"}[tensor["dtype"]]
        arrays[name] = np.frombuffer(content[start + first : start + end], dtype)
    return arrays


def num_bytes(largest: int) -> int:
    """B(largest) of the text."""
    return max(1, (largest.bit_length() + 7) // 8)


def half(codes: np.ndarray) -> np.ndarray:
    """IEEE half precision from its bits."""
    return codes.astype("<u2").view("<f2").astype(np.float64)


def cut(values: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(values, np.cumsum(lengths)[:-1])


def check(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"not as shared/format/FORMAT.md says: {what}")
