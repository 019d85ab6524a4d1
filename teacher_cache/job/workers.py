"""Who does which shard: rank and world, local processes, and the signals that stop a run.

There is no lock, no coordinator and no process group: a worker takes the shards of its share, then
whatever is still missing. Two workers on one shard cost time and nothing else.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from shared.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Share:
    """Process `rank` of `world`."""

    rank: int
    world: int

    def part(self, inner: "Share") -> "Share":
        """This share, shared once more."""
        return Share(self.rank * inner.world + inner.rank, self.world * inner.world)


WHOLE = Share(0, 1)


def share_of(worker: str, environment: Mapping[str, str]) -> Share:
    """--worker i/n, else torchrun's variables, else those of a SLURM array and step, else 0/1."""
    if worker != "auto":
        rank, _, world = worker.partition("/")
        if not (re.fullmatch(r"[0-9]+/[0-9]+", worker) and int(rank) < int(world)):
            raise ConfigError(f"--worker {worker}: expected i/n with i from 0 to n-1, such as 0/4")
        return Share(int(rank), int(world))
    if "RANK" in environment:
        if "WORLD_SIZE" not in environment:
            raise ConfigError(
                "RANK is set without WORLD_SIZE: say which share this process has with --worker i/n"
            )
        return _checked(environment["RANK"], environment["WORLD_SIZE"], "0", "RANK / WORLD_SIZE")
    share = WHOLE
    if "SLURM_ARRAY_TASK_ID" in environment:
        first = environment.get("SLURM_ARRAY_TASK_MIN", "0")
        count = environment.get("SLURM_ARRAY_TASK_COUNT")
        if count is None:
            raise ConfigError(
                "SLURM_ARRAY_TASK_ID is set without SLURM_ARRAY_TASK_COUNT: say which share this "
                "process has with --worker i/n"
            )
        step = environment.get("SLURM_ARRAY_TASK_STEP", "1")
        share = _checked(
            environment["SLURM_ARRAY_TASK_ID"], count, first, "SLURM_ARRAY_TASK_ID", step
        )
    if "SLURM_PROCID" in environment:
        tasks = environment.get("SLURM_NTASKS", "1")
        task = _checked(environment["SLURM_PROCID"], tasks, "0", "SLURM_PROCID / SLURM_NTASKS")
        share = share.part(task)
    return share


def _checked(rank: str, world: str, first: str, names: str, step: str = "1") -> Share:
    try:
        place, rest = divmod(int(rank) - int(first), int(step))
        share = Share(-1 if rest else place, int(world))
    except (ValueError, ZeroDivisionError):
        share = Share(-1, 0)
    if not 0 <= share.rank < share.world:
        raise ConfigError(
            f"{names}: rank {rank} (counted from {first}) of {world} processes makes no sense. "
            "Say which share this process has with --worker i/n"
        )
    return share


def my_shards(num_shards: int, share: Share, committed: Callable[[int], bool]) -> Iterator[int]:
    """Shards to do: the own share first, then missing ones from a start rotated by rank."""
    for shard in range(share.rank, num_shards, share.world):
        if not committed(shard):
            yield shard
    start = share.rank * num_shards // share.world
    for offset in range(num_shards):
        shard = (start + offset) % num_shards
        if not committed(shard):
            yield shard


class StopRequest:
    """Set by SIGTERM or SIGUSR1; the job looks at it between two batches."""

    def __init__(self) -> None:
        self.requested = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While open, SIGTERM and SIGUSR1 only set a flag."""
    request = StopRequest()
    before = {number: signal.signal(number, request) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_local_processes(
    config_file: Path, count: int, *, one_gpu_each: bool, share: Share = WHOLE
) -> int:
    """Runs `count` processes of `cache-teacher run` on parts of a share; returns the exit code.

    Each is a process of its own with its own log lines; a signal to this one is passed on. The
    worst exit code wins: a failure (1, 2) before a stop (75) before success.
    """
    command = [sys.executable, "-m", "teacher_cache.cli", "run", "--config", str(config_file)]
    processes = []
    for rank in range(count):
        environment = dict(os.environ)
        if one_gpu_each:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
            devices = visible.split(",") if visible else [str(index) for index in range(count)]
            environment["CUDA_VISIBLE_DEVICES"] = devices[rank]
        part = share.part(Share(rank, count))
        options = ["--worker", f"{part.rank}/{part.world}", "--processes", "1"]
        processes.append(subprocess.Popen([*command, *options], env=environment))

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        ends = [process.wait() for process in processes]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    # a signal that came before a process could catch it is a stop like any other
    codes = [75 if end in (-signal.SIGTERM, -signal.SIGUSR1) else end for end in ends]
    failed = [code for code in codes if code not in (0, 75)]
    return (1 if failed[0] < 0 else failed[0]) if failed else max(codes)
