"""How long it takes to open a cache of many small shards, and what reading its rows in order costs.

    python benchmarks/open.py --shards 20000

Writes one shard with the real writer into a temporary folder and gives every other shard a commit
of its own that says the same (opening reads commits, and no shard). Then measures in one process
  open       open_cache, pages of the files in memory already
and with a second cache, of --blocks blocks in one shard,
  rows       `for row in cache`, over the time of decoding each of its blocks once.
Prints one JSON line.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from stream import CLASSES, Clock, block_of, environment, measured, synthetic_manifest

from shared.cache import open_cache, read_commit
from shared.format import manifest_file
from shared.format.commits import commit_name, shard_name
from shared.format.schema import MIN_BLOCK_POSITIONS
from shared.format.writer import ShardWriter, encode_block
from shared.storage.local import LocalStorage
from shared.targets.record import ClassRanks


def write_cache(folder: Path, args: argparse.Namespace, *, shards: int, blocks: int) -> None:
    """A cache whose shard 0 has `blocks` blocks and whose other shards have a commit only."""
    storage, ranks = LocalStorage(folder), ClassRanks.from_classes(np.arange(CLASSES))
    manifest = synthetic_manifest(args, shards)
    manifest_file.publish(storage, manifest)
    rows = -(-MIN_BLOCK_POSITIONS // (args.row_tokens - 1))
    with ShardWriter(storage, manifest, manifest.cache_id, 0) as writer:
        for number in range(blocks):
            block = block_of(args, None, number * rows, rows)
            writer.write(encode_block(block, number, manifest, ranks))
    commit = read_commit(storage, manifest, manifest.cache_id, 0)
    for shard in range(1, shards):
        its = replace(commit, shard=shard, file=shard_name(shard, commit.xxh3_128))
        (folder / commit_name(shard)).write_bytes(its.to_json())


def best_of(repeats: int, work: Callable[[], object]) -> Clock:
    """The fastest of some runs: other work on the machine only ever slows one down."""
    clocks = []
    for _ in range(repeats):
        with measured() as clock:
            work()
        clocks.append(clock)
    return Clock(min(c.wall_s for c in clocks), min(c.cpu_s for c in clocks))


def measure(args: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder), args, shards=args.shards, blocks=1)
        opened = best_of(args.repeats, lambda: open_cache(folder))
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder), args, shards=1, blocks=args.blocks)
        cache = open_cache(folder)
        blocks = best_of(args.repeats, lambda: [*map(cache.read_block, range(args.blocks))])
        rows = best_of(args.repeats, lambda: [cache[i] for i in range(len(cache))])
    return {
        "open_s": round(opened.wall_s, 3),
        "open_cpu_s": round(opened.cpu_s, 3),
        "open_cpu_us_per_shard": round(opened.cpu_s / args.shards * 1e6, 1),
        "rows": len(cache),
        "blocks_cpu_s": round(blocks.cpu_s, 3),
        "rows_cpu_s": round(rows.cpu_s, 3),
        "rows_over_blocks": round(rows.cpu_s / blocks.cpu_s, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Opening a cache; prints one JSON line.")
    parser.add_argument("--shards", type=int, default=20_000)
    parser.add_argument("--blocks", type=int, default=32)
    parser.add_argument("--row-tokens", type=int, default=256)
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    args.tokens, args.hidden = args.shards * args.row_tokens, 0
    torch.set_num_threads(1)
    print(json.dumps(vars(args) | measure(args) | environment()))


if __name__ == "__main__":
    main()
