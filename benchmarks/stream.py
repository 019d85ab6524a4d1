"""How fast a cache is read: the codec alone, and whole micro-batches through BatchStream.

    python benchmarks/stream.py --tokens 4194304 --top-k 32 --row-tokens 1024

Writes a cache with the real writer into a temporary folder, opens it, and measures in one process
  codec         read_block of every block, in one thread
  stream        one epoch of micro-batches, shuffled, one decoding thread; CPU time is that of all
                threads, so that per-core rates count the collating and the consumer too
  waiting       a consumer that is busy elsewhere for --step-seconds a step, as with a GPU: the
                share of its time it then waits for data, after the first batch
Pages of the files are in memory already. Prints one JSON line.

Targets are synthetic (151,936 classes, frequent ones more likely, a tail of about 5 %), or with
--sample FILE those of a file as benchmarks/codec.py reads them, over and over: no position returns
within a block of fewer positions than the file has.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import load_file

from shared.cache import Cache, open_cache
from shared.format import manifest as manifests
from shared.format import manifest_file
from shared.format.blocks import Block
from shared.format.column import Contents
from shared.format.manifest import (
    BatchPlan,
    CorpusInfo,
    HiddenSpec,
    Manifest,
    Preprocessing,
    TokenizerInfo,
)
from shared.format.schema import MIN_BLOCK_POSITIONS, columns_of
from shared.format.writer import ShardWriter, encode_block
from shared.storage.local import LocalStorage
from shared.targets.record import ClassRanks, Target
from shared.targets.spec import TargetSpec
from student_train.data.order import Order, OrderSpec
from student_train.data.stream import BatchStream, StreamSpec

CLASSES = 151_936
ROWS_PER_SHARD = 256


@dataclass(slots=True)
class Clock:
    wall_s: float = 0.0
    cpu_s: float = 0.0


@contextmanager
def measured() -> Iterator[Clock]:
    clock, wall, cpu = Clock(), time.perf_counter(), time.process_time()
    yield clock
    clock.wall_s, clock.cpu_s = time.perf_counter() - wall, time.process_time() - cpu


def synthetic_manifest(args: argparse.Namespace, num_shards: int) -> Manifest:
    layers = (-1,) if args.hidden else ()
    return Manifest(
        format_version=manifests.FORMAT_VERSION,
        task="causal-lm",
        teacher=None,
        tokenizer=TokenizerInfo(
            hash="0", num_ids=CLASSES, bos_token_id=None, eos_token_id=0, template_hash="0"
        ),
        corpus=CorpusInfo(source="synthetic", fingerprint="0", num_documents=0),
        preprocessing=Preprocessing(
            split="train",
            columns=("text",),
            sample_by="document",
            encoding_errors="strict",
            limit_documents=0,
            max_length=args.row_tokens,
            pack=False,
        ),
        rows_id="0",
        targets=TargetSpec(kind="topk", num_classes=CLASSES, top_k=args.top_k),
        hidden=HiddenSpec(layers=layers, widths=(args.hidden,) * len(layers), codec="bf16"),
        columns=tuple(
            columns_of(Contents(segments=False, positions=False, labels=False, targets=True))
        ),
        plan=BatchPlan(
            documents_per_shard=ROWS_PER_SHARD,
            num_shards=num_shards,
            estimated_tokens=args.tokens,
            forward_tokens=args.row_tokens,
            chunk_positions=args.row_tokens,
            cpu_threads=1,
            asked_shard_tokens=ROWS_PER_SHARD * args.row_tokens,
            asked_forward_tokens="auto",
        ),
        seed=0,
        nonfinite="error",
        origin=None,
        side_files={},
    )


def synthetic_target(args: argparse.Namespace, first: int, count: int) -> Target:
    """The targets of `count` positions, of which `first` is the first."""
    generator, k = np.random.default_rng(first), args.top_k
    # Rare enough that 32 ids take 30 bytes, as those of a teacher's text do.
    rank_PK = (CLASSES - k) ** (generator.random((count, k)) ** 2)
    ids_PK = np.sort(rank_PK.astype(np.int32), axis=1) + np.arange(k, dtype=np.int32)
    drops_PK = generator.exponential(4 / k, (count, k)).cumsum(axis=1)
    drops_PK = generator.permuted(drops_PK, axis=1)
    log_tail_P = np.log(0.05 * 2 * generator.random(count) + 1e-4)
    kept_P = np.log1p(-np.exp(log_tail_P)) - np.log(np.exp(-drops_PK).sum(axis=1))
    return Target(
        ids=ids_PK,
        logprobs=(kept_P[:, None] - drops_PK).astype(np.float32),
        log_tail=log_tail_P.astype(np.float32),
    )


def sample_of(path: Path, k: int) -> Target:
    """The k likeliest classes of each position; classes are renamed to their ranks."""
    arrays = load_file(path)
    logprobs_NK = (arrays["logits"] - arrays["lse"][:, None])[:, :k].astype(np.float32)
    tail_N = 1 - np.exp(logprobs_NK.astype(np.float64)).sum(axis=1)
    ids_NK = arrays["ids"][:, :k].astype(np.int64)
    by_rank = np.argsort(-np.bincount(ids_NK.reshape(-1), minlength=CLASSES), kind="stable")
    ranks = np.empty(CLASSES, np.int32)
    ranks[by_rank] = np.arange(CLASSES, dtype=np.int32)
    return Target(ranks[ids_NK], logprobs_NK, np.log(np.maximum(tail_N, 1e-7)).astype(np.float32))


def block_of(args: argparse.Namespace, sample: Target | None, first_row: int, rows: int) -> Block:
    generator = np.random.default_rng(first_row)
    first, count = first_row * (args.row_tokens - 1), rows * (args.row_tokens - 1)
    if sample is None:
        target = synthetic_target(args, first, count)
    else:
        at = np.arange(first, first + count) % len(sample.ids)
        target = Target(sample.ids[at], sample.logprobs[at], sample.log_tail[at])
    return Block(
        row_ids=np.arange(first_row, first_row + rows, dtype=np.uint64) << np.uint64(24),
        num_tokens=np.full(rows, args.row_tokens, np.int32),
        num_positions=np.full(rows, args.row_tokens - 1, np.int32),
        input_ids=(CLASSES ** generator.random(rows * args.row_tokens)).astype(np.int32),
        positions=np.tile(np.arange(args.row_tokens - 1, dtype=np.int32), rows),
        target=target,
        label_logprob=-generator.exponential(3, count).astype(np.float32),
        entropy=generator.uniform(0, 6, count).astype(np.float32),
        hidden={-1: _noise_states(generator, count, args.hidden)} if args.hidden else {},
    )


def _noise_states(generator: np.random.Generator, count: int, width: int) -> np.ndarray:
    states = torch.from_numpy(generator.standard_normal((count, width), np.float32))
    return states.to(torch.bfloat16).view(torch.uint16).numpy()


def write_cache(folder: Path, args: argparse.Namespace) -> None:
    rows = args.tokens // args.row_tokens
    rows_per_block = -(-MIN_BLOCK_POSITIONS // (args.row_tokens - 1))
    storage, ranks = LocalStorage(folder), ClassRanks.from_classes(np.arange(CLASSES))
    manifest = synthetic_manifest(args, -(-rows // ROWS_PER_SHARD))
    manifest_file.publish(storage, manifest)
    sample = sample_of(args.sample, args.top_k) if args.sample else None
    for shard, first in enumerate(range(0, rows, ROWS_PER_SHARD)):
        last = min(first + ROWS_PER_SHARD, rows)
        with ShardWriter(storage, manifest, manifest.cache_id, shard) as writer:
            for number, row in enumerate(range(first, last, rows_per_block)):
                block = block_of(args, sample, row, min(rows_per_block, last - row))
                writer.write(encode_block(block, number, manifest, ranks))


def stream_of(cache: Cache, args: argparse.Namespace) -> BatchStream:
    spec = OrderSpec(batch_tokens=args.batch_tokens, epochs=1)
    order = Order(cache.block_rows, cache.row_tokens, spec)
    reading = StreamSpec(
        accumulation=args.accumulation,
        threads=args.threads,
        hidden_layers=(-1,) if args.hidden else (),
    )
    return BatchStream(cache, order, reading, max_steps=order.steps_for_epochs(1))


def read_blocks(cache: Cache, args: argparse.Namespace) -> Clock:
    layers = (-1,) if args.hidden else ()
    with measured() as clock:
        for block in range(cache.num_blocks):
            cache.read_block(block, hidden_layers=layers)
    return clock


def read_stream(cache: Cache, args: argparse.Namespace) -> tuple[Clock, float]:
    """The time of an epoch, and the seconds until its first batch."""
    stream = stream_of(cache, args)
    with measured() as clock:
        batches = iter(stream)
        next(batches)
        first_batch_s = stream.seconds_waited
        for _ in batches:
            pass
    return clock, first_batch_s


def waiting_share(cache: Cache, args: argparse.Namespace) -> float:
    stream = stream_of(cache, args)
    batches = iter(stream)
    next(batches)
    stream.seconds_waited = 0.0
    with measured() as clock:
        for index, _ in enumerate(batches):
            if index % args.accumulation == 0:
                time.sleep(args.step_seconds)
    return stream.seconds_waited / clock.wall_s


def best(clocks: list[Clock], positions: int, name: str) -> dict[str, float]:
    """Of several runs the fastest: other work on the machine only ever slows one down."""
    return {
        f"{name}_mpositions_per_cpu_s": round(positions / min(c.cpu_s for c in clocks) / 1e6, 2),
        f"{name}_mpositions_per_wall_s": round(positions / min(c.wall_s for c in clocks) / 1e6, 2),
    }


def measure(args: argparse.Namespace) -> dict[str, object]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder), args)
        bytes_on_disk = sum(path.stat().st_size for path in Path(folder, "shards").iterdir())
        cache = open_cache(folder)
        positions = int(cache.row_positions.sum(dtype=np.int64))
        blocks = [read_blocks(cache, args) for _ in range(args.repeats)]
        streams = [read_stream(cache, args) for _ in range(args.repeats)]
        share = waiting_share(cache, args)
    return {
        "positions": positions,
        "bytes_per_position": round(bytes_on_disk / positions, 1),
        **best(blocks, positions, "codec"),
        **best([clock for clock, _ in streams], positions, "stream"),
        "first_batch_ms": round(1e3 * min(first for _, first in streams), 1),
        "waiting_share": round(share, 4),
    }


def environment() -> dict[str, str | int | None]:
    cpu = Path("/proc/cpuinfo")
    models = [
        line.partition(":")[2].strip()
        for line in (cpu.read_text().splitlines() if cpu.exists() else [])
        if line.startswith("model name")
    ]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "torch", "pyarrow", "zstandard")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Speed of reading a cache; prints one JSON line.")
    parser.add_argument("--tokens", type=int, default=1 << 22)
    parser.add_argument("--row-tokens", type=int, default=1024)
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--sample", type=Path, help="safetensors file of real distributions")
    parser.add_argument("--hidden", type=int, default=0, help="width of cached hidden states")
    parser.add_argument("--batch-tokens", type=int, default=16_384)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--step-seconds", type=float, default=0.05)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print(json.dumps(vars(args) | measure(args) | environment(), default=str))


if __name__ == "__main__":
    main()
