"""Shares from options and launchers' variables, the order of shards, signals, local processes."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import teacher_cache.job.run as job
from shared.errors import ConfigError, Stopped, TeacherCacheError
from shared.signals import StopRequest, stop_on_signals
from teacher_cache.config import CaptureConfig
from teacher_cache.job import workers
from teacher_cache.job.workers import Share, my_shards, run_local_processes, share_of

TORCHRUN = {"RANK": "2", "LOCAL_RANK": "0", "WORLD_SIZE": "4"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_MIN": "3"}
STEP = {"SLURM_PROCID": "1", "SLURM_NTASKS": "3"}


@pytest.mark.parametrize(
    ("worker", "environment", "expected"),
    [
        ("auto", {}, Share(0, 1)),
        ("0/1", {}, Share(0, 1)),
        ("2/7", TORCHRUN | ARRAY, Share(2, 7)),  # typed by the user: beats every variable
        ("auto", TORCHRUN, Share(2, 4)),
        ("auto", TORCHRUN | STEP, Share(2, 4)),  # torchrun in a SLURM step counts all processes
        ("auto", ARRAY, Share(2, 4)),
        ("auto", STEP, Share(1, 3)),
        ("auto", ARRAY | STEP, Share(7, 12)),  # 3 processes in each task of the array
        ("auto", {"SLURM_PROCID": "0"}, Share(0, 1)),
        ("auto", {"SLURM_JOB_ID": "9"}, Share(0, 1)),
        (
            "auto",  # --array=10-40:10
            {
                "SLURM_ARRAY_TASK_ID": "30",
                "SLURM_ARRAY_TASK_MIN": "10",
                "SLURM_ARRAY_TASK_STEP": "10",
                "SLURM_ARRAY_TASK_COUNT": "4",
            },
            Share(2, 4),
        ),
    ],
    ids=lambda value: ",".join(value) if isinstance(value, dict) else None,
)
def test_the_share_of_a_process(worker, environment, expected):
    assert share_of(worker, environment) == expected


@pytest.mark.parametrize(
    "worker", ["", "1", "1/", "/4", "4/4", "-1/4", "0/0", "1/2/3", "a/b", "²/3"]
)
def test_a_share_that_cannot_be_is_refused(worker):
    with pytest.raises(ConfigError) as caught:
        share_of(worker, {})
    assert str(caught.value) == (
        f"--worker {worker}: expected i/n with i from 0 to n-1, such as 0/4"
    )


@pytest.mark.parametrize(
    ("environment", "name"),
    [
        (TORCHRUN | {"RANK": "4"}, "RANK / WORLD_SIZE"),
        (TORCHRUN | {"RANK": "x"}, "RANK / WORLD_SIZE"),
        (TORCHRUN | {"WORLD_SIZE": "0"}, "RANK / WORLD_SIZE"),
        (ARRAY | {"SLURM_ARRAY_TASK_ID": "2"}, "SLURM_ARRAY_TASK_ID"),  # below the smallest
        (STEP | {"SLURM_PROCID": "3"}, "SLURM_PROCID / SLURM_NTASKS"),
        ({"SLURM_ARRAY_TASK_ID": "0"}, "SLURM_ARRAY_TASK_COUNT"),
        ({"RANK": "1"}, "WORLD_SIZE"),
    ],
)
def test_variables_that_contradict_each_other_are_an_error(environment, name):
    with pytest.raises(ConfigError) as caught:
        share_of("auto", environment)
    assert name in str(caught.value)
    assert "--worker i/n" in str(caught.value)


# The order of shards


def simulated(num_shards: int, world: int) -> dict[int, list[int]]:
    """Shards done by each worker, where all take turns, one shard each."""
    done: set[int] = set()
    taken: dict[int, list[int]] = {rank: [] for rank in range(world)}
    waiting = {
        rank: my_shards(num_shards, Share(rank, world), done.__contains__) for rank in range(world)
    }
    while waiting:
        for rank, shards in list(waiting.items()):
            shard = next(shards, None)
            if shard is None:
                del waiting[rank]
                continue
            done.add(shard)
            taken[rank].append(shard)
    return taken


@pytest.mark.parametrize("num_shards", [0, 1, 5, 12])
@pytest.mark.parametrize("world", [1, 2, 5, 20])
def test_every_shard_once_where_workers_keep_pace(num_shards, world):
    taken = simulated(num_shards, world)
    assert sorted(s for shards in taken.values() for s in shards) == list(range(num_shards))
    for rank, shards in taken.items():
        own = list(range(rank, num_shards, world))
        assert shards[: len(own)] == own


@pytest.mark.parametrize("rank", range(3))
def test_one_worker_alone_does_the_shares_of_those_that_never_come(rank):
    done: set[int] = set()
    for shard in my_shards(10, Share(rank, 3), done.__contains__):
        assert shard not in done
        done.add(shard)
    assert done == set(range(10))


def test_workers_that_help_out_start_at_different_places():
    first = []
    for rank in range(3):
        own = set(range(rank, 12, 3))
        first.append(next(my_shards(12, Share(rank, 3), own.__contains__)))
    assert first == [1, 5, 9]  # starts at 0, 4 and 8, which are their own and done here


def test_committed_shards_are_looked_up_only_when_their_turn_comes():
    asked: list[int] = []

    def committed(shard: int) -> bool:
        asked.append(shard)
        return False

    next(my_shards(100, Share(7, 10), committed))
    assert asked == [7]


# Local processes: each one here is a small script that notes how it was called


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every process ends with `ends[rank]`: an exit code, or minus a signal it dies of."""
    script = tmp_path / "stub"
    script.write_text(
        f"#!{sys.executable} -S\n"
        "import json, os, pathlib, signal, sys\n"
        "folder = pathlib.Path(__file__).parent\n"
        "rank = int(sys.argv[sys.argv.index('--worker') + 1].partition('/')[0])\n"
        "(folder / f'called-{rank}').write_text(json.dumps([sys.argv[1:], dict(os.environ)]))\n"
        "end = json.loads((folder / 'ends').read_text()).get(str(rank), 0)\n"
        "signal.pause() if end == 'wait' else None\n"
        "os.kill(os.getpid(), -end) if end < 0 else sys.exit(end)\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(workers.sys, "executable", str(script))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ends").write_text("{}")
    return tmp_path


def run_processes(count: int, *, one_gpu_each: bool = False) -> int:
    return run_local_processes(
        Path("job.yaml"), count, one_gpu_each=one_gpu_each, stop=StopRequest()
    )


def calls(stub: Path) -> list[tuple[list[str], dict[str, str]]]:
    return [json.loads(path.read_text()) for path in sorted(stub.glob("called-*"))]


def test_local_processes_share_the_work(stub):
    assert run_processes(3) == 0
    for rank, (arguments, _) in enumerate(calls(stub)):
        expected = "-P -m teacher_cache.cli run --config job.yaml --worker {}/3 --processes 1"
        assert " ".join(arguments) == expected.format(rank)


def test_a_folder_with_a_shared_of_its_own_stops_no_local_process(tmp_path, monkeypatch):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "__init__.py").touch()
    (tmp_path / "job.yaml").write_text("corpus: none.txt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(workers.__file__).parents[1]))
    # 2: the command was there, and has read that the job names no cache
    assert run_local_processes(Path("job.yaml"), 1, one_gpu_each=False) == 2


@pytest.mark.parametrize(("visible", "expected"), [("", "01"), ("5,7,8", "57")])
def test_each_process_sees_one_gpu(stub, monkeypatch, visible, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    run_processes(2, one_gpu_each=True)
    assert [environment["CUDA_VISIBLE_DEVICES"] for _, environment in calls(stub)] == [*expected]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ([0, 0, 0], 0),
        ([0, 75, 0], 75),
        ([75, 1, 0], 1),
        ([0, 2, 75], 2),
        ([0, -signal.SIGKILL, 0], 1),
        ([75, -signal.SIGTERM, 0], 75),  # the signal came before the process could catch it
        ([-signal.SIGUSR1, 0, 0], 75),
    ],
)
def test_the_worst_end_of_a_local_process_is_the_end_of_all(stub, ends, expected):
    (stub / "ends").write_text(json.dumps(dict(enumerate(ends))))
    assert run_processes(3) == expected


def test_a_signal_while_local_processes_begin_reaches_those_that_have_begun(stub, monkeypatch):
    """It starts no further one, and leaves none behind."""
    (stub / "ends").write_text(json.dumps({"0": "wait"}))
    popen = workers.subprocess.Popen

    def begin(*arguments: Any, **options: Any) -> Any:
        process = popen(*arguments, **options)
        while not (stub / "called-0").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(workers.subprocess, "Popen", begin)
    with stop_on_signals():  # what came before it is the caller's
        assert run_processes(3) == 75
    assert len(calls(stub)) == 1


def test_no_local_process_begins_after_a_signal(stub):
    stop = StopRequest()
    stop(signal.SIGTERM, None)
    assert run_local_processes(Path("job.yaml"), 2, one_gpu_each=False, stop=stop) == 75
    assert calls(stub) == []


@pytest.mark.parametrize(
    ("end", "kind", "words"),
    [
        (75, Stopped, "stopped by a signal. Run the same command again to go on."),
        (1, TeacherCacheError, "one of 2 processes failed (see its message above)"),
    ],
)
def test_what_the_parent_of_local_processes_says(stub, end, kind, words):
    (stub / "ends").write_text(json.dumps({"1": end}))
    out = stub / "cache"
    config = CaptureConfig(out=out, corpus="c.txt", teacher="t", processes=2)
    with pytest.raises(kind) as caught:
        job.run(config)
    assert type(caught.value) is kind
    assert str(caught.value).startswith(f"{out}: ")
    assert words in str(caught.value)


def test_local_processes_of_a_worker_share_that_workers_share(stub):
    """Two machines of two processes each are four workers, not twice the same two."""
    config = CaptureConfig(
        out=stub / "cache", corpus="c.txt", teacher="t", processes=2, worker="1/2"
    )
    job.run(config)
    shares = [arguments[arguments.index("--worker") + 1] for arguments, _ in calls(stub)]
    assert shares == ["2/4", "3/4"]
