"""Bytes, fidelity and speed of the target codec; prints one JSON line.

    python benchmarks/codec.py [--samples DIR] [--rows 4096 1024 128] [--k 64 32 16]
                               [--mean-entries 12]

DIR holds safetensors files with `ids` [N, M] by descending probability, `logits` [N, M], `lse` [N]
over the full vocabulary, and `vocab_size` in the metadata; without it a Zipf-like set is made.
Ranks are learnt from the kept ids (top k) of the first half, as a capture learns them from its
calibration sample; everything is measured on whole blocks of the second half (where a block is more
than that, on one block and the ranks of what is before it). Bytes are those of
the frames, headers and checksums included. Speeds are positions per second of CPU time of one
thread: encode with compression, decode with decompression and all checks of the frames.

--mean-entries measures `adaptive` and `sample` too. What a sample draws of the mass beyond the M
known classes are classes by how often the others are known, each once more: 119,000 of them never
are.

N positions, M classes known of each, P positions of a block, K entries of each or E of all.
"""

import argparse
import itertools
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zstandard
from safetensors import safe_open

from shared.format import frames
from shared.format.schema import MIN_BLOCK_POSITIONS
from shared.targets.base import TargetKind
from shared.targets.kinds import KINDS
from shared.targets.ragged import MAX_ENTRIES, RANGE_BEYOND, drawn_logprob
from shared.targets.record import ClassRanks, Target
from shared.targets.spec import TargetSpec
from teacher_cache.select.kinds import SELECTORS

Doubles = npt.NDArray[np.float64]
SYNTHETIC_CLASSES = 151_936


@dataclass(frozen=True, slots=True)
class Sample:
    """Distributions of one teacher, as far as they are known."""

    name: str
    num_classes: int
    ids_NM: npt.NDArray[np.int32]
    probs_NM: Doubles


def main() -> None:
    """Measures every combination and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=Path)
    parser.add_argument("--rows", type=int, nargs="+", default=[MIN_BLOCK_POSITIONS, 1024, 128])
    parser.add_argument("--k", type=int, nargs="+", default=[64, 32, 16])
    parser.add_argument("--value-bits", type=int, nargs="+", default=[7], choices=[7, 8, 16])
    parser.add_argument("--mean-entries", type=float, nargs="*", default=[12])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    results = []
    for sample in load(args.samples) if args.samples else [synthetic(5120)]:
        for bits in args.value_bits:
            for top_k in args.k:
                spec = TargetSpec(
                    kind="topk", num_classes=sample.num_classes, top_k=top_k, value_bits=bits
                )
                for rows in args.rows:
                    results.append(measure(sample, spec, rows, args.repeats))
                    print(table_line(results[-1]), file=sys.stderr)
        ragged = [name for name, kind in KINDS.items() if kind.ragged]
        for entries, kind in itertools.product(args.mean_entries, ragged):
            spec = ragged_spec(sample, kind, entries)
            for rows in args.rows:
                results.append(measure_ragged(sample, spec, rows, args.repeats))
                print(ragged_line(results[-1]), file=sys.stderr)
    print(json.dumps({"benchmark": "codec", **environment(), "results": results}))


def load(folder: Path) -> Iterator[Sample]:
    """Every safetensors file of a folder."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as file:
            log_p = file.get_tensor("logits").astype(np.float64) - file.get_tensor("lse")[:, None]
            ids = file.get_tensor("ids").astype(np.int32)
            yield Sample(path.stem, int(file.metadata()["vocab_size"]), ids, np.exp(log_p))


def synthetic(positions: int) -> Sample:
    """Classes drawn by a Zipf law, anew at each position; probabilities fall as a power."""
    rng, known = np.random.default_rng(0), 256
    drawn = np.exp(rng.random((positions, 4 * known)) * np.log(SYNTHETIC_CLASSES)) - 1
    ids = np.empty((positions, known), np.int32)
    for row, candidates in zip(ids, drawn.astype(np.int32), strict=True):
        _, first = np.unique(candidates, return_index=True)
        row[:] = candidates[np.sort(first)[:known]]
    power = rng.uniform(1.1, 2.5, (positions, 1))
    logits = -power * np.log(np.arange(1, known + 1)) + 0.3 * rng.normal(size=ids.shape)
    logits = -np.sort(-logits, axis=1)
    rest = np.exp(-power[:, 0] * np.log(known)) * known / (power[:, 0] - 1)
    total = np.exp(logits).sum(axis=1) + rest
    class_of = rng.permutation(SYNTHETIC_CLASSES).astype(np.int32)
    return Sample("zipf", SYNTHETIC_CLASSES, class_of[ids], np.exp(logits) / total[:, None])


def measure(sample: Sample, spec: TargetSpec, rows: int, repeats: int) -> dict[str, Any]:
    """One line of the results."""
    half = min(len(sample.ids_NM) // 2, len(sample.ids_NM) - rows)
    kept_ids = sample.ids_NM[:half, : spec.num_entries]
    ranks = ClassRanks.from_counts(np.bincount(kept_ids.ravel(), minlength=spec.num_classes))
    starts = range(half, len(sample.ids_NM) - rows + 1, rows)
    truths = [cells(sample, slice(start, start + rows), spec.num_entries) for start in starts]
    targets = [
        Target(sample.ids_NM[start : start + rows, : spec.num_entries], *as_logs(truth))
        for start, truth in zip(starts, truths, strict=True)
    ]
    blocks = [encode(target, spec, ranks) for target in targets]
    decoded = [decode(block, rows, spec, ranks) for block in blocks]
    kl = np.concatenate([divergence(*each) for each in zip(targets, truths, decoded, strict=True)])
    positions = rows * len(blocks)
    size = {
        name: round(sum(len(block[name]) for block in blocks) / positions, 3) for name in blocks[0]
    }
    pairs = list(zip(targets, decoded, strict=True))
    return {
        "sample": sample.name,
        "classes": spec.num_classes,
        "k": spec.top_k,
        "value_bits": spec.value_bits,
        "rows": rows,
        "positions": positions,
        "bytes_per_position": round(sum(size.values()), 2),
        "planes": size,
        "bytes_if_no_ids_return": round(without_returning_ids(targets, spec, ranks, size), 2),
        "kl_mean": float(f"{kl.mean():.3g}"),
        "kl_p99": float(f"{np.quantile(kl, 0.99):.3g}"),
        "kl_max": float(f"{kl.max():.3g}"),
        "ids_identical": all(same_ids(*pair) for pair in pairs),
        "encode_per_s": speed(
            lambda: [encode(t, spec, ranks) for t in targets], positions, repeats
        ),
        "decode_per_s": speed(
            lambda: [decode(b, rows, spec, ranks) for b in blocks], positions, repeats
        ),
        "unpack_per_s": speed(lambda: [unpack(b, rows, spec) for b in blocks], positions, repeats),
    }


def ragged_spec(sample: Sample, kind: TargetKind, mean_entries: float) -> TargetSpec:
    """With the threshold that calibration would find."""
    known = torch.from_numpy(np.log(sample.probs_NM[:, :MAX_ENTRIES])).float()
    spec = TargetSpec(kind=kind, num_classes=sample.num_classes, mean_entries=mean_entries)
    return replace(spec, threshold=SELECTORS[spec.kind].find_threshold(known, spec))


def measure_ragged(sample: Sample, spec: TargetSpec, rows: int, repeats: int) -> dict[str, Any]:
    """One line of the results, for positions that differ in their number of entries."""
    half = min(len(sample.ids_NM) // 2, len(sample.ids_NM) - rows)
    target = adaptive(sample, spec) if spec.kind == "adaptive" else drawn(sample, spec)
    before = target.at(np.arange(half))
    ranks = ClassRanks.from_counts(np.bincount(before.ids, minlength=spec.num_classes))
    starts = range(half, len(sample.ids_NM) - rows + 1, rows)
    targets = [target.at(np.arange(start, start + rows)) for start in starts]
    planes = [spec.encode(each, ranks) for each in targets]
    blocks = [encode(each, spec, ranks) for each in targets]
    sizes = [{name: plane.size for name, plane in each.items()} for each in planes]
    positions = rows * len(blocks)
    size = {
        name: round(sum(len(block[name]) for block in blocks) / positions, 3) for name in blocks[0]
    }

    def decode_all() -> None:
        for block, each in zip(blocks, sizes, strict=True):
            parts = {
                name: frames.decompress(frame, block=0, column=n, size=each[name], where="memory")
                for n, (name, frame) in enumerate(block.items())
            }
            spec.decode(parts, rows, ranks)

    return {
        "sample": sample.name,
        "classes": spec.num_classes,
        "kind": spec.kind,
        "threshold": spec.threshold,
        "mean_entries": round(float(target.counts.mean()), 3),
        "value_bits": spec.value_bits,
        "rows": rows,
        "positions": positions,
        "bytes_per_position": round(sum(size.values()), 2),
        "planes": size,
        "encode_per_s": speed(
            lambda: [encode(t, spec, ranks) for t in targets], positions, repeats
        ),
        "decode_per_s": speed(decode_all, positions, repeats),
    }


def adaptive(sample: Sample, spec: TargetSpec) -> Target:
    """Every known class of at least the threshold, and the largest."""
    kept_NM = sample.probs_NM >= spec.threshold
    kept_NM[:, 0] = True
    tail_N = np.maximum(1 - (sample.probs_NM * kept_NM).sum(axis=1), 1e-7)
    logs_NM = np.log(sample.probs_NM).astype(np.float32)
    return Target(
        sample.ids_NM[kept_NM],
        logs_NM[kept_NM],
        np.log(tail_N).astype(np.float32),
        kept_NM.sum(axis=1).astype(np.int32),
    )


def drawn(sample: Sample, spec: TargetSpec) -> Target:
    """A systematic sample of each position; the known classes come first along its line."""
    rng = np.random.default_rng(0)
    frequency = np.bincount(sample.ids_NM.ravel(), minlength=sample.num_classes) + 1.0
    frequency /= frequency.sum()
    weight = float(drawn_logprob(spec))
    ids: list[int] = []
    logs: list[float] = []
    counts: list[int] = []
    for ids_M, probs_M in zip(sample.ids_NM, sample.probs_NM, strict=True):
        kept_M = probs_M >= spec.threshold
        kept_M[0] |= probs_M[0] >= spec.threshold * math.exp(-RANGE_BEYOND)
        ends = np.cumsum(probs_M[~kept_M])
        rest = max(0.0, 1 - probs_M[kept_M].sum())
        points = np.arange(rng.random() * spec.threshold, rest, spec.threshold)
        known = points[points < ends[-1]]
        hit = ids_M[~kept_M][np.searchsorted(ends, known, side="right")]
        beyond = rng.choice(sample.num_classes, len(points) - len(known), p=frequency)
        others = dict.fromkeys([*hit.tolist(), *beyond.tolist()]).keys() - set(ids_M[kept_M])
        ids += [*ids_M[kept_M].tolist(), *others]
        logs += [*np.log(probs_M[kept_M]).tolist(), *[weight] * len(others)]
        counts.append(int(kept_M.sum()) + len(others))
    positions = len(sample.ids_NM)
    return Target(
        np.array(ids, np.int32),
        np.array(logs, np.float32),
        np.full(positions, -np.inf, np.float32),
        np.array(counts, np.int32),
        rng.integers(0, 2**63, positions).astype(np.uint64),
    )


def cells(sample: Sample, rows: slice, entries: int) -> Doubles:
    """True probabilities [P, K + 1] of the entries and the tail, scaled to sum to 1.

    The logits of a sample are rounded, so the tail is at least what is known of it.
    """
    probs_PM = sample.probs_NM[rows]
    kept_PK = probs_PM[:, :entries]
    known_P = probs_PM[:, entries:].sum(axis=1)
    tail_P = np.maximum(1 - kept_PK.sum(axis=1), known_P)
    cells_PK = np.column_stack([kept_PK, tail_P])
    return cells_PK / cells_PK.sum(axis=1, keepdims=True)


def as_logs(cells_PK: Doubles) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Log-probabilities and log-tail, as a target holds them."""
    logs = np.log(cells_PK).astype(np.float32)
    return np.ascontiguousarray(logs[:, :-1]), logs[:, -1].copy()


def encode(target: Target, spec: TargetSpec, ranks: ClassRanks) -> dict[str, bytes]:
    """Frames by plane name."""
    planes = spec.encode(target, ranks)
    return {
        name: frames.compress(plane, block=0, column=number)
        for number, (name, plane) in enumerate(planes.items())
    }


def unpack(block: dict[str, bytes], rows: int, spec: TargetSpec) -> dict[str, frames.Plane]:
    """Planes by name."""
    sizes = {shape.name: shape.item_bytes * rows for shape in spec.plane_shapes}
    return {
        name: frames.decompress(frame, block=0, column=number, size=sizes[name], where="memory")
        for number, (name, frame) in enumerate(block.items())
    }


def decode(block: dict[str, bytes], rows: int, spec: TargetSpec, ranks: ClassRanks) -> Target:
    """What a reader of the cache does."""
    return spec.decode(unpack(block, rows, spec), rows, ranks)


def divergence(target: Target, truth_PK: Doubles, decoded: Target) -> Doubles:
    """KL(true || decoded) over the K + 1 cells of each position, in nats."""
    by_id = np.argsort(target.ids, axis=1)
    truth_PK = np.column_stack([np.take_along_axis(truth_PK, by_id, 1), truth_PK[:, -1]])
    by_id = np.argsort(decoded.ids, axis=1)
    found_PK = np.column_stack([np.take_along_axis(decoded.logprobs, by_id, 1), decoded.log_tail])
    return (truth_PK * (np.log(truth_PK) - found_PK.astype(np.float64))).sum(axis=1)


def same_ids(target: Target, decoded: Target) -> bool:
    """Each position has the same set of classes."""
    return np.array_equal(np.sort(target.ids, axis=1), np.sort(decoded.ids, axis=1))


def without_returning_ids(
    targets: list[Target], spec: TargetSpec, ranks: ClassRanks, size: dict[str, float]
) -> float:
    """Bytes per position if the gaps of each slot were independent of those of the others.

    zstandard finds sets of ids that return within a block; how often they do depends on the text.
    """
    rng = np.random.default_rng(0)
    total = sum(value for name, value in size.items() if not name.startswith("target_ids"))
    for target in targets:
        planes = spec.encode(target, ranks)
        id_planes = [plane for name, plane in planes.items() if name.startswith("target_ids")]
        gap_SPK = np.stack(id_planes).reshape(len(id_planes), *target.ids.shape)
        for slot in range(spec.num_entries):
            gap_SPK[:, :, slot] = gap_SPK[:, rng.permutation(len(target.ids)), slot]
        packed = [frames.compress(plane, block=0, column=0) for plane in gap_SPK]
        total += sum(map(len, packed)) / len(target.ids) / len(targets)
    return total


def speed(work: Callable[[], object], positions: int, repeats: int) -> int:
    """Positions per second of this thread's CPU time, the median of the repeats."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.thread_time()
        work()
        seconds.append(time.thread_time() - start)
    return round(positions / statistics.median(seconds[1:]))


def environment() -> dict[str, Any]:
    """What a number means nothing without."""
    return {
        "command": " ".join(sys.argv),
        "processor": processor(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "zstandard": zstandard.__version__,
        "zstd": ".".join(map(str, zstandard.ZSTD_VERSION)),
    }


def processor() -> str:
    """Its name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table_line(result: dict[str, Any]) -> str:
    """The main figures of one result."""
    return (
        f"{result['sample']:>5} k={result['k']:<3} {result['value_bits']:>2} bits "
        f"{result['rows']:>4} rows: {result['bytes_per_position']:6.2f} B "
        f"(no ids return: {result['bytes_if_no_ids_return']:6.2f}) "
        f"KL {result['kl_mean']:.1e}, p99 {result['kl_p99']:.1e}; "
        f"encode {result['encode_per_s'] / 1e6:.2f}, decode {result['decode_per_s'] / 1e6:.2f} M/s"
    )


def ragged_line(result: dict[str, Any]) -> str:
    """The main figures of one result."""
    return (
        f"{result['sample']:>5} {result['kind']} {result['mean_entries']:.1f} entries, "
        f"{result['rows']:>4} rows: {result['bytes_per_position']:6.2f} B; "
        f"encode {result['encode_per_s'] / 1e6:.2f}, decode {result['decode_per_s'] / 1e6:.2f} M/s"
    )


if __name__ == "__main__":
    main()
