"""Long runs: memory and open files stay flat, work grows with the corpus, bytes have gates.

Memory is what a process holds for itself (RssAnon): pages of a mapped shard are the system's to
take back at any time.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.format import manifest as manifests
from shared.format.blocks import Block
from shared.format.schema import MIN_BLOCK_POSITIONS
from shared.format.writer import ShardWriter, encode_block
from shared.storage.local import LocalStorage
from shared.targets.record import ClassRanks, Target
from shared.targets.spec import TargetSpec
from tests.conftest import WORDS
from tests.shared.format.test_shards import cache_manifest

pytestmark = pytest.mark.slow

SHARDS, DOCUMENTS_EACH, WORDS_EACH = 200, 26, 20  # a tenth is more than calibration looks at

# Captures, then reads every block twice; prints what the process held at each shard and each pass.
WATCHED = """
import json, os, sys, time
from pathlib import Path
import torch
from shared import open_cache
from shared.storage import local
from teacher_cache.config import CaptureConfig
from teacher_cache.job.run import run

def state():
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    kilobytes = {name: int(status[name].split()[0]) for name in ("RssAnon", "VmHWM")}
    files = len(os.listdir("/proc/self/fd"))
    return kilobytes | {"files": files, "cpu_s": time.process_time()}

def crash_point(name):
    if name == "before-publish":
        shards.append(state())

torch.set_num_threads(1)
shards, passes = [], []
local.crash_point = crash_point
options = json.loads(sys.argv[1])
config = CaptureConfig(**options | {"out": Path(options["out"]), "hidden_layers": (-1,)})
run(config)
cache = open_cache(config.out)
for _ in range(3):
    for number in range(cache.num_blocks):
        cache.read_block(number, hidden_layers=(-1,))
    passes.append(state())
print(json.dumps({"shards": shards, "passes": passes}))
"""


@pytest.fixture(scope="module")
def watched(teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """What a capture of 20 and of 200 shards held, and its cache."""
    folder, found = tmp_path_factory.mktemp("long"), {}
    chance = np.random.default_rng(0)
    lines = [
        " ".join(chance.choice(WORDS, WORDS_EACH)) + "\n" for _ in range(SHARDS * DOCUMENTS_EACH)
    ]
    for shards in (SHARDS // 10, SHARDS):
        corpus = folder / f"corpus-{shards}.txt"
        corpus.write_text("".join(lines[: shards * DOCUMENTS_EACH]))
        options = {
            "teacher": str(teacher_dir),
            "corpus": str(corpus),
            "out": str(folder / f"cache-{shards}"),
            "shard_tokens": 1280,  # of 49 tokens or so in a document
            "max_length": 64,
            "top_k": 8,
            "device": "cpu",
        }
        done = subprocess.run(
            [sys.executable, "-c", WATCHED, json.dumps(options)],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        found[shards] = json.loads(done.stdout) | {"cache": Path(options["out"])}
    return found


def median(states: list[dict[str, float]], name: str) -> float:
    return float(np.median([state[name] for state in states]))


def test_memory_and_open_files_stay_flat_over_200_shards(watched):
    shards = watched[SHARDS]["shards"]
    assert 0.9 * SHARDS <= len(shards) <= 1.1 * SHARDS
    early, late = shards[20:60], shards[-40:]
    assert median(late, "RssAnon") == pytest.approx(median(early, "RssAnon"), rel=0.05)
    assert {state["files"] for state in late} <= {state["files"] for state in early}


def test_reading_again_and_again_takes_no_more(watched):
    """200 shards are more than a reader keeps open."""
    first, *_, last = watched[SHARDS]["passes"]
    assert last["RssAnon"] == pytest.approx(first["RssAnon"], rel=0.05)
    assert last["files"] == first["files"]


def test_ten_times_the_corpus_takes_the_same_memory_and_ten_times_the_work(watched):
    few, many = watched[SHARDS // 10], watched[SHARDS]
    peaks = [found["shards"][-1]["VmHWM"] for found in (few, many)]
    assert peaks[1] == pytest.approx(peaks[0], rel=0.05)
    # A median over shards forgives what else the machine does; the late shards are those that would
    # pay for anything that grows with the number of shards.
    per_shard = [
        float(np.median(np.diff([state["cpu_s"] for state in states])))
        for states in (few["shards"], many["shards"][-SHARDS // 2 :])
    ]
    assert per_shard[1] < 1.1 * per_shard[0]


# Bytes ------------------------------------------------------------------------------------------

CLASSES, ROW = 151_936, 1024


def teacher_like(rows: int, top_k: int, seed: int, exponent: float) -> list[Block]:
    """Rows of 1,024 tokens from a Zipf law; candidates of a position are drawn from it as well.

    Probabilities fall as a power of the place, steeper at some positions than at others.
    """
    chance = np.random.default_rng(seed)
    class_of = np.random.default_rng(7).permutation(CLASSES).astype(np.int32)

    def zipf(shape: tuple[int, ...]) -> np.ndarray:
        """Ranks whose chance falls as rank ** -exponent."""
        power = 1 - exponent
        return ((1 - chance.random(shape) * (1 - CLASSES**power)) ** (1 / power) - 1).astype("i4")

    blocks = []
    per_block = -(-MIN_BLOCK_POSITIONS // (ROW - 1))
    for start in range(0, rows, per_block):
        count = min(per_block, rows - start)
        positions = count * (ROW - 1)
        ranks_PK = np.empty((positions, top_k), np.int32)
        for line, candidates in zip(ranks_PK, zipf((positions, 8 * top_k)), strict=True):
            _, first = np.unique(candidates, return_index=True)
            line[:] = candidates[np.sort(first)[:top_k]]
        power_P1 = chance.uniform(1.1, 2.5, (positions, 1))
        logits_PK = -power_P1 * np.log(np.arange(1, top_k + 1))
        logits_PK = -np.sort(-(logits_PK + 0.3 * chance.normal(size=logits_PK.shape)), axis=1)
        rest_P = np.exp(-power_P1[:, 0] * np.log(top_k)) * top_k / (power_P1[:, 0] - 1)
        total_P = np.exp(logits_PK).sum(axis=1) + rest_P
        logprobs_PK = (logits_PK - np.log(total_P)[:, None]).astype(np.float32)
        blocks.append(
            Block(
                row_ids=np.arange(start, start + count, dtype=np.uint64) << np.uint64(24),
                num_tokens=np.full(count, ROW, np.int32),
                num_positions=np.full(count, ROW - 1, np.int32),
                input_ids=class_of[zipf((count * ROW,))],
                positions=np.zeros(0, np.int32),
                target=Target(
                    class_of[ranks_PK], logprobs_PK, np.log(rest_P / total_P).astype(np.float32)
                ),
                label_logprob=logprobs_PK[:, 0] - chance.exponential(1, positions).astype("f4"),
                entropy=chance.uniform(0.2, 6, positions).astype(np.float32),
            )
        )
    return blocks


@pytest.mark.parametrize(
    ("exponent", "top_k", "most_bytes"),
    [(0.0, 32, 88), (0.0, 64, 155), (1.25, 32, 60), (1.25, 64, 108)],
)
def test_bytes_on_the_disk_stay_within_their_gates(exponent, top_k, most_bytes, tmp_path):
    """Bytes of targets for each position, and 7 for all other columns.

    Exponent 0, classes that are all alike, is the worst case. 1.25 was chosen since it comes near
    the bytes of a real teacher (57 and 105): this guards the codec, and says nothing of a teacher.
    """
    spec = TargetSpec(kind="topk", num_classes=CLASSES, top_k=top_k)
    base = cache_manifest()
    manifest = replace(
        base, targets=spec, tokenizer=replace(base.tokenizer, num_ids=CLASSES),
        hidden=manifests.HiddenSpec(layers=(), widths=(), codec="bf16"),
    )  # fmt: skip
    learnt = np.concatenate(
        [block.target.ids.ravel() for block in teacher_like(5, top_k, 1, exponent)]
    )
    ranks = ClassRanks.from_counts(np.bincount(learnt, minlength=CLASSES))
    with ShardWriter(LocalStorage(tmp_path), manifest, manifest.cache_id, 0) as writer:
        for number, block in enumerate(teacher_like(20, top_k, 2, exponent)):
            writer.write(encode_block(block, number, manifest, ranks))
    commit = json.loads((tmp_path / "commits" / "00000.json").read_bytes())
    (shard,) = (tmp_path / "shards").iterdir()
    targets = sum(n for name, n in commit["column_bytes"].items() if name.startswith("target_"))
    positions = commit["positions"]
    assert targets / positions <= most_bytes
    assert (shard.stat().st_size - targets) / positions <= 7
