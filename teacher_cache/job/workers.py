"""Who does which shard: rank and world, and local processes with the signals passed on to them.

There is no lock, no coordinator and no process group: a worker takes the shards of its share, then
whatever is still missing. Two workers on one shard cost time and nothing else.
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from shared.errors import ConfigError
from shared.signals import STOP_SIGNALS, StopRequest


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


def run_local_processes(
    config_file: Path, count: int, *, one_gpu_each: bool, stop: StopRequest, share: Share = WHOLE
) -> int:
    """Runs `count` processes of `cache-teacher run` on parts of a share; returns the exit code.

    Each is a process of its own with its own log lines; a signal to this one is passed on. The
    worst exit code wins: a failure (1, 2) before a stop (75) before success.
    """
    processes: list[subprocess.Popen[bytes]] = []
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in processes:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        for rank in range(count):
            if stop.requested or received:
                break
            processes.append(_local_process(config_file, rank, count, one_gpu_each, share))
            if received:  # it came while this one began, and was passed on to the others only
                processes[-1].send_signal(received[-1])
        ends = [process.wait() for process in processes]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    # a signal that came before a process could catch it is a stop like any other
    codes = [75 if end in (-signal.SIGTERM, -signal.SIGUSR1) else end for end in ends]
    codes += [75] * (count - len(ends))
    failed = [code for code in codes if code not in (0, 75)]
    return (1 if failed[0] < 0 else failed[0]) if failed else max(codes)


def _local_process(
    config_file: Path, rank: int, count: int, one_gpu_each: bool, share: Share
) -> subprocess.Popen[bytes]:
    # Without -P, -m would look into the current folder first, where another `shared` may stand.
    home = Path(__file__).resolve().parents[2]
    safe = [] if Path.cwd().resolve() == home else ["-P"]
    command = [sys.executable, *safe, "-m", "teacher_cache.cli", "run", "--config"]
    command.append(str(config_file))
    environment = dict(os.environ)
    if one_gpu_each:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = visible.split(",") if visible else [str(index) for index in range(count)]
        environment["CUDA_VISIBLE_DEVICES"] = devices[rank]
    part = share.part(Share(rank, count))
    options = ["--worker", f"{part.rank}/{part.world}", "--processes", "1"]
    return subprocess.Popen([*command, *options], env=environment)
