"""Crashes, several writers, restarts: whatever happened, a rerun makes the bytes of a calm run.

One child process imports everything once and stays free of threads; each run is a fork of it, so a
run costs a few tenths of a second and may die in any way. A kill at a random moment is a CPU-time
timer whose signal nobody handles: like SIGKILL the kernel ends the process there and then, and the
moment does not depend on how busy the machine is.
"""

import copy
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

import shared
import teacher_cache
from shared import open_cache
from shared.cache import committed_shards
from shared.format.commits import commit_name
from shared.storage import local
from shared.storage.local import LocalStorage, temporary_files
from teacher_cache.config import CleanConfig, VerifyConfig
from teacher_cache.tools.verify import clean, verify

CRASHED = 77  # as in the script below
KILLED = -signal.SIGPROF

CAPTURED = {  # three shards
    "limit_documents": 28,
    "shard_tokens": 700,
    "max_length": 64,
    "top_k": 8,
    "device": "cpu",
}

# Reads lists of runs, one JSON line each; forks every run of a list, and answers with the exit code
# (or minus the signal) and the CPU seconds of each.
FORK_SERVER = """
import json, multiprocessing, os, signal, sys
import datasets, torch
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast
from shared.storage import base
from shared.format import writer
from teacher_cache import cli
from teacher_cache.tools import inspect, verify
import teacher_cache.job.run as job
torch.set_num_threads(1)
try:  # a refused command, so that what commands import is imported here and not in each run
    sys.argv = ["cache-teacher", "run", "--corpus=c", "--out=o", "--teacher=t", "--worker=x"]
    cli.main()
except SystemExit:
    pass
context = multiprocessing.get_context("fork")

def at_point(run, barrier):
    seen = 0
    def crash_point(name):
        nonlocal seen
        seen += name == run["point"]
        if name != run["point"] or seen != run["occurrence"]:
            return
        if run["action"] == "exit":
            os._exit(77)
        elif run["action"] == "meet":
            barrier.wait(60)
        else:
            os.kill(os.getpid(), run["action"])
    return crash_point

def child(run, barrier):
    with open(run["log"], "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    replacement = at_point(run, barrier)
    original = base.crash_point
    for module in list(sys.modules.values()):
        if getattr(module, "crash_point", None) is original:
            module.crash_point = replacement
    sys.argv = ["cache-teacher", "run", *run["arguments"]]
    code = 1
    try:
        if run["cpu_s"]:
            signal.setitimer(signal.ITIMER_PROF, run["cpu_s"])
        cli.main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.stderr.flush()
        os._exit(code)

for line in sys.stdin:
    runs = json.loads(line)
    barrier = context.Barrier(len(runs))
    children = []
    for run in runs:
        process = os.fork()
        if process == 0:
            child(run, barrier)
        children.append(process)
    ends = []
    for process in children:
        _, status, usage = os.wait4(process, 0)
        ends.append([os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime])
    print(json.dumps(ends), flush=True)
"""


@dataclass(slots=True, kw_only=True)
class Run:
    """One run of `cache-teacher run`, and what happens to it."""

    out: Path
    point: str = ""
    occurrence: int = 1
    action: str | int = "exit"  # at the point: exit, meet the other runs, or a signal to itself
    cpu_s: float = 0.0  # dies after so much CPU time
    worker: str = "0/1"
    options: dict[str, str] = field(default_factory=dict)


class ForkServer:
    """Runs of one small job, as many at once as asked for."""

    def __init__(self, defaults: dict[str, str], folder: Path) -> None:
        self.defaults, self.log = defaults, folder / "log.txt"
        environment = os.environ | {"HF_HOME": str(folder / "hub"), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", FORK_SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.cpu_s: list[float] = []

    def run(self, *runs: Run) -> list[int]:
        """Exit codes, or minus the signal, of runs that are started at once."""
        self.log.write_text("")
        asked = [
            {
                "point": run.point,
                "occurrence": run.occurrence,
                "action": run.action,
                "cpu_s": run.cpu_s,
                "log": str(self.log),
                "arguments": self._arguments(run),
            }
            for run in runs
        ]
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        ends = json.loads(self.process.stdout.readline())
        self.cpu_s = [cpu_s for _, cpu_s in ends]
        return [code for code, _ in ends]

    def _arguments(self, run: Run) -> list[str]:
        options = self.defaults | run.options | {"out": str(run.out), "worker": run.worker}
        return [part for name, value in options.items() for part in (f"--{name}", value)]

    def log_text(self) -> str:
        """What the last runs said, on one line: messages are wrapped."""
        return " ".join(self.log.read_text().split())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def server(
    teacher_dir: Path, corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ForkServer]:
    options = CAPTURED | {"teacher": teacher_dir, "corpus": corpus_file}
    defaults = {name.replace("_", "-"): str(value) for name, value in options.items()}
    server = ForkServer(defaults, tmp_path_factory.mktemp("server"))
    yield server
    server.close()


@dataclass(slots=True)
class Calm:
    """An undisturbed run: its files, and what it took."""

    path: Path
    tree: dict[str, str]
    num_shards: int
    cpu_s: float


@pytest.fixture(scope="module")
def calm(server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Calm:
    return run_calmly(server, tmp_path_factory.mktemp("calm") / "cache")


def run_calmly(server: ForkServer, out: Path) -> Calm:
    assert server.run(Run(out=out)) == [0], server.log_text()
    return Calm(out, tree(out), open_cache(out).manifest.plan.num_shards, server.cpu_s[0])


def tree(folder: Path) -> dict[str, str]:
    """sha256 of every file but those of `runs/` and temporary ones."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "runs" and not path.name.startswith(".tmp.")
    }


def identities(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every commit and of the shard files that they name."""
    shards = {path.name.partition("-")[0]: path for path in (folder / "shards").glob("*.arrow")}
    found = {}
    for commit in (folder / "commits").glob("*.json"):
        for path in (commit, shards[commit.stem]):
            found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def check_complete(server: ForkServer, calm: Calm, *folders: Path) -> None:
    """A rerun succeeds, redoes nothing that was committed, and leaves the calm run's bytes."""
    before = [identities(out) for out in folders]
    assert server.run(*(Run(out=out) for out in folders)) == [0] * len(folders), server.log_text()
    for out, kept in zip(folders, before, strict=True):
        assert tree(out) == calm.tree
        assert kept.items() <= identities(out).items()
        clean(CleanConfig(cache=out))
        assert list(temporary_files(out)) == []
        assert tree(out) == calm.tree


def crash_points() -> list[str]:
    """Every named point of the code that a capture runs through."""
    sources = [
        path
        for package in (shared, teacher_cache)
        for path in sorted(Path(package.__file__).parent.rglob("*.py"))
    ]
    found = [re.findall(r"crash_point\(\s*\"([^\"]+)\"", path.read_text()) for path in sources]
    return sorted({name for names in found for name in names})


def test_the_points_of_writing_and_publishing_are_there():
    """Before, in the middle of and after a write; before and after publishing; the commit."""
    assert len(crash_points()) >= 9


@pytest.mark.parametrize("point", crash_points())
def test_a_crash_at_a_named_point_does_no_harm(point, server, calm, tmp_path):
    """In a first start (side files, or the first shard), and where only the last shard is left."""
    first, last = tmp_path / "first", tmp_path / "last"
    copy_but_last_shard(calm, last)
    crashes = [Run(out=out, point=point) for out in (first, last)]
    assert server.run(*crashes) == [CRASHED] * 2, f"{point} is not reached: {server.log_text()}"
    check_complete(server, calm, first, last)


def copy_but_last_shard(calm: Calm, out: Path) -> None:
    last = f"{calm.num_shards - 1:05d}"
    for name in calm.tree:
        if last not in name:
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes((calm.path / name).read_bytes())


def test_a_crash_before_and_after_the_manifest_does_no_harm(server, calm, tmp_path):
    """It is the first file after the side files; its hash comes after it."""
    count = len(open_cache(calm.path).manifest.side_files) + 1
    before, after = tmp_path / "before", tmp_path / "after"
    crashes = [
        Run(out=before, point="before-link", occurrence=count),
        Run(out=after, point="after-link", occurrence=count),
    ]
    assert server.run(*crashes) == [CRASHED] * 2, server.log_text()
    names = [{path.name for path in out.iterdir() if path.is_file()} for out in (before, after)]
    assert [("manifest.json" in n, "manifest.sha256" in n) for n in names] == [
        (False, False),
        (True, False),
    ]
    check_complete(server, calm, before, after)


def kill_until_done(
    server: ForkServer, out: Path, calm: Calm, seed: int, world: int, most_kills: int
) -> None:
    """Restarts `world` workers, each of which dies at a random moment, until none dies."""
    chance = random.Random(seed)
    for _ in range(most_kills):
        before = identities(out) if out.exists() else {}
        runs = [
            Run(out=out, worker=f"{rank}/{world}", cpu_s=chance.uniform(0.01, 0.9 * calm.cpu_s))
            for rank in range(world)
        ]
        ends = server.run(*runs)
        assert set(ends) <= {KILLED, 0}, server.log_text()
        after = identities(out) if (out / "commits").exists() else {}
        assert before.items() <= after.items()  # what is committed is never redone
        if KILLED not in ends:
            return


@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(seed, server, calm, tmp_path):
    kill_until_done(server, tmp_path / "cache", calm, seed, world=1, most_kills=3)
    check_complete(server, calm, tmp_path / "cache")


@pytest.mark.parametrize("kind", ["adaptive", "sample", "dense"])
def test_every_kind_of_target_survives(kind, server, tmp_path):
    """Killed at random, crashed with the first shard written, two workers: the calm run's bytes."""
    entries = {} if kind == "dense" else {"mean-entries": "6"}
    of_kind = copy.copy(server)
    of_kind.defaults = {name: value for name, value in server.defaults.items() if name != "top-k"}
    of_kind.defaults |= {"targets": kind, **entries}
    calm = run_calmly(of_kind, tmp_path / "calm")
    assert calm.num_shards > 1
    assert open_cache(calm.path).manifest.targets.kind == kind
    killed, crashed, shared_out = (tmp_path / name for name in ("killed", "crashed", "shared"))
    kill_until_done(of_kind, killed, calm, seed=0, world=1, most_kills=2)
    assert of_kind.run(Run(out=crashed, point="after-publish", occurrence=2)) == [CRASHED]
    check_complete(of_kind, calm, killed, crashed)
    workers = [Run(out=shared_out, worker=f"{rank}/2") for rank in range(2)]
    assert of_kind.run(*workers) == [0, 0], of_kind.log_text()
    assert tree(shared_out) == calm.tree


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3])
@pytest.mark.parametrize("seed", range(100, 130))
def test_killed_at_many_random_moments(seed, world, server, calm, tmp_path):
    kill_until_done(server, tmp_path / "cache", calm, seed, world, most_kills=8)
    check_complete(server, calm, tmp_path / "cache")


@pytest.mark.slow
@pytest.mark.parametrize("point", crash_points())
def test_a_crash_every_time_a_point_is_reached(point, server, calm, tmp_path):
    """The n-th restart dies at the n-th time: no restart finds what the one before it left."""
    for occurrence in range(1, 100):
        out = tmp_path / f"cache-{occurrence}"
        end = server.run(Run(out=out, point=point, occurrence=occurrence))
        if end == [0]:
            break
        assert end == [CRASHED]
        check_complete(server, calm, out)
    assert end == [0]


# Several writers


def test_two_first_starts_at_once_make_one_cache(server, calm, tmp_path):
    """Both have calibrated, and neither has published, when they meet."""
    out = tmp_path / "cache"
    runs = [Run(out=out, point="before-link", action="meet", worker=f"{r}/2") for r in range(2)]
    assert server.run(*runs) == [0, 0], server.log_text()
    assert tree(out) == calm.tree


@pytest.mark.parametrize(("point", "occurrence"), [("before-publish", 1), ("before-link", 1)])
def test_two_writers_of_one_shard_make_one_commit(point, occurrence, server, calm, tmp_path):
    """Both have written the last shard when they meet, before its name or before its commit."""
    copy_but_last_shard(calm, tmp_path)
    run = Run(out=tmp_path, point=point, occurrence=occurrence, action="meet")
    assert server.run(run, run) == [0, 0], server.log_text()
    assert tree(tmp_path) == calm.tree


@pytest.mark.parametrize("same_bytes", [True, False])
def test_the_first_commit_stays(same_bytes, calm, capture, tmp_path, monkeypatch):
    """Another writer commits the last shard just before this one; on a GPU with other bytes."""
    copy_but_last_shard(calm, tmp_path)
    last = calm.num_shards - 1
    mine = open_cache(calm.path).commits[last]
    theirs = mine if same_bytes else replace(mine, file=f"shards/{last:05d}-{0:016x}.arrow")
    commit = tmp_path / commit_name(last)
    identity = []

    def another_is_first(point: str) -> None:
        if point == "after-publish":  # this shard has its name, and next comes its commit
            (tmp_path / theirs.file).write_bytes((calm.path / mine.file).read_bytes())
            commit.write_bytes(theirs.to_json())
            identity.append(commit.stat().st_ino)

    monkeypatch.setattr(local, "crash_point", another_is_first)
    capture(**CAPTURED, out=tmp_path)
    assert [commit.stat().st_ino] == identity
    assert commit.read_bytes() == theirs.to_json()
    assert [path.name for path in (tmp_path / "shards").glob(f"{last:05d}-*")] == [
        Path(theirs.file).name
    ]


def test_two_first_starts_of_different_jobs(server, calm, tmp_path):
    """The loser is refused field by field, and its leftovers can be cleaned away."""
    out = tmp_path / "cache"
    runs = [
        Run(out=out, point="before-link", action="meet", options={"top-k": k}) for k in ("8", "4")
    ]
    assert sorted(server.run(*runs)) == [0, 2], server.log_text()
    assert "targets.top_k: the cache has" in server.log_text()
    assert verify(VerifyConfig(cache=out)).sound
    clean(CleanConfig(cache=out))
    manifest = open_cache(out).manifest
    named = {"manifest.json", "manifest.sha256", *manifest.side_files}
    assert {name for name in tree(out) if "/" not in name or "tokenizer/" in name} == named
    if manifest.targets.top_k == 8:
        assert tree(out) == calm.tree


def test_a_crashed_start_of_another_job_leaves_nothing_behind(server, calm, tmp_path):
    """Its learnt classes are other ones; then the right options are given."""
    out = tmp_path / "cache"
    crash = Run(out=out, point="before-link", occurrence=4, options={"top-k": "4"})
    assert server.run(crash) == [CRASHED]
    assert not (out / "manifest.json").exists()
    assert server.run(Run(out=out)) == [0], server.log_text()
    clean(CleanConfig(cache=out))
    assert tree(out) == calm.tree


@pytest.mark.parametrize("world", [2, 5])
def test_any_number_of_workers_at_once(world, server, calm, tmp_path):
    runs = [Run(out=tmp_path / "cache", worker=f"{rank}/{world}") for rank in range(world)]
    assert server.run(*runs) == [0] * world, server.log_text()
    assert tree(tmp_path / "cache") == calm.tree


def test_the_last_worker_first_and_one_that_never_comes(server, calm, tmp_path):
    out = tmp_path / "cache"
    for rank in (2, 1):
        assert server.run(Run(out=out, worker=f"{rank}/3")) == [0]
        assert tree(out) == calm.tree


# Stopped and mended


@pytest.mark.parametrize(
    ("number", "point"),
    [
        (signal.SIGTERM, "before-link"),  # of the first side file
        (signal.SIGUSR1, "before-record-batch"),
        (signal.SIGTERM, "after-publish"),
    ],
)
def test_a_signal_exits_75_and_the_rerun_completes(number, point, server, calm, tmp_path):
    out = tmp_path / "cache"
    stopped = Run(out=out, point=point, action=int(number))
    assert server.run(stopped) == [75], server.log_text()
    assert "stopped by a signal. Finished shards are kept; run the same" in server.log_text()
    assert len(committed_shards(LocalStorage(out))) == (0 if point == "before-link" else 1)
    assert list(temporary_files(out)) == []
    check_complete(server, calm, out)


def test_a_removed_commit_in_the_middle_is_redone_alone(server, calm, tmp_path):
    out = tmp_path / "cache"
    copy_but_last_shard(calm, out)
    server.run(Run(out=out))
    middle = f"{calm.num_shards // 2:05d}"
    (out / "commits" / f"{middle}.json").unlink()
    kept = identities(out)
    assert not any(middle in name for name in kept)
    assert server.run(Run(out=out)) == [0]
    assert tree(out) == calm.tree
    after = identities(out)
    assert {name for name in after if name not in kept} == {
        name for name in after if name.startswith(middle)
    }
    assert kept.items() <= after.items()


def test_clean_spares_a_writer_that_is_at_work(calm, tmp_path):
    copy_but_last_shard(calm, tmp_path)
    mine = tmp_path / "shards" / f".tmp.{os.uname().nodename}.{os.getpid()}.0"
    mine.write_bytes(b"half a shard")
    orphan = tmp_path / "shards" / f"{calm.num_shards - 1:05d}-0123456789abcdef.arrow"
    orphan.write_bytes(b"its commit may be a moment away")
    assert clean(CleanConfig(cache=tmp_path)) == []
    day = time.time() - 2 * 86400
    os.utime(orphan, (day, day))
    listed = clean(CleanConfig(cache=tmp_path, dry_run=True))
    assert listed == [f"shards/{orphan.name}"]
    assert orphan.exists()
    assert clean(CleanConfig(cache=tmp_path)) == listed
    assert not orphan.exists()
    assert mine.exists()
