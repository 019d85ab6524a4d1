"""A signal at any moment, to one rank or to all: the state is saved, every rank ends with 75."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from shared.options import main
from student_train.cli import app
from tests.student_train.run.signalled import send, wait_for
from tests.student_train.run.test_trainer import SignalAt, losses, weights

MODULE = "tests.student_train.run.signalled"


@pytest.fixture(scope="module")
def plan(cache_dir, student_config_dir, tmp_path_factory):
    """Makes one run of a plan for `signalled`, with a folder of its own for what it notes."""

    def make(out: Path, *, world: int = 2, **more: Any) -> dict[str, Any]:
        options = {
            "student": student_config_dir,
            "cache": cache_dir,
            "out": out,
            "max-steps": 9,
            "batch-tokens": 1000,
            "learning-rate": 3e-3,
            "log-every": 2,
            "device": "cpu",
        }
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        folder = str(tmp_path_factory.mktemp("notes"))
        nothing: dict[str, Any] = {"hold": {}, "signals": [], "own": []}
        return nothing | {"folder": folder, "world": world, "arguments": flags} | more

    return make


def ends_of(plans: list[dict[str, Any]]) -> list[list[int]]:
    """How every rank of every run ended: an exit code, or minus the signal it died of."""
    file = Path(plans[0]["folder"]) / "plan.json"
    file.write_text(json.dumps(plans))
    done = subprocess.run(
        [sys.executable, "-m", MODULE, str(file)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def logs(run: dict[str, Any]) -> str:
    return "".join(path.read_text() for path in sorted(Path(run["folder"]).glob("log-*")))


def checkpoints(run: Path) -> list[str]:
    return sorted(path.name for path in run.glob("checkpoint-*"))


def assert_equal_runs(run: Path, calm: Path) -> None:
    assert losses(run) == losses(calm)
    assert [step for step, _ in losses(run)] == list(range(1, 10))
    for name, tensor in weights(calm).items():
        assert tensor.equal(weights(run)[name]), name
    assert others(run) == others(calm)


def others(run: Path) -> set[str]:
    """The names of all files of a run but its checkpoints."""
    return {path.name for path in run.iterdir() if not path.name.startswith("checkpoint-")}


@pytest.fixture
def status(capsys):
    """What the command prints, and the code it ends with."""

    def ask(*arguments: object) -> tuple[str, int]:
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main(app, ["status", *map(str, arguments)])
        return capsys.readouterr().out, int(end.value.code or 0)

    return ask


@pytest.fixture(scope="module")
def calm(plan, tmp_path_factory):
    """Two ranks that nobody disturbs."""
    out = tmp_path_factory.mktemp("calm") / "run"
    run = plan(out)
    assert ends_of([run]) == [[0, 0]], logs(run)
    return out


def test_ranks_signalled_apart_stop_at_the_same_step_and_go_on_to_the_same_weights(
    plan, calm, tmp_path, status
):
    """One alone; one 0.3 s before the other, which is saving or leaving by then; before step 1."""
    alone, both, early = (tmp_path / name for name in ("alone", "both", "early"))
    signalled = [
        plan(alone, hold={"1": 3}, signals=[1]),
        plan(both, hold={"0": 3}, signals=[0, 1]),
        plan(early, hold={"1": 0}, signals=[1]),
    ]
    assert ends_of(signalled) == [[75, 75]] * 3, "".join(map(logs, signalled))
    for out, run in ((alone, signalled[0]), (both, signalled[1])):
        # asked at the end of step 3, heard by all at the end of the next one
        assert checkpoints(out) == ["checkpoint-4"]
        assert logs(run).count("stopped by a signal after step 4 of 9, state saved") == 2
        said = f"{out}: stopped by a signal after step 4 of 9, state saved. Run the same command"
        assert status(out) == (f"stopped, run again\n{said} again to go on.\n", 75)
    assert checkpoints(early) == []
    assert logs(signalled[2]).count("stopped by a signal before it trained a step") == 2
    assert status(early)[1] == 75
    outs = (alone, both, early)
    assert ends_of([plan(out) for out in outs]) == [[0, 0]] * 3
    for out in outs:
        assert_equal_runs(out, calm)


@pytest.mark.slow
@pytest.mark.parametrize("who", ["one rank", "torchrun"])
def test_under_torchrun_every_rank_ends_with_75_and_the_folder_says_so(
    who, plan, calm, tmp_path, status
):
    """It ends the other rank as soon as the first one has left, and answers 1 for both."""
    out = tmp_path / "run"
    run = plan(out, hold={"1": 3})
    folder = Path(run["folder"])
    (folder / "plan.json").write_text(json.dumps([run]))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun = subprocess.Popen(
        [*launcher, "--nproc-per-node=2", "-m", MODULE, str(folder / "plan.json")],
        stderr=subprocess.PIPE,
        text=True,
    )
    if who == "torchrun":
        wait_for(folder / "held-1")
        torchrun.send_signal(signal.SIGTERM)
        (folder / "sent-1").touch()
    else:
        send(folder, 1)
    _, said = torchrun.communicate(timeout=300)
    assert torchrun.returncode == 1
    ends = [(folder / f"end-{rank}").read_text() for rank in range(2)]
    assert ends == ["75", "75"], said + logs(run)
    (saved,) = checkpoints(out)
    assert status(out)[1] == 75
    again = plan(out)
    assert ends_of([again]) == [[0, 0]], logs(again)
    assert f"going on from {saved}" in logs(again)
    assert status(out)[1] == 0
    assert_equal_runs(out, calm)


def test_a_late_signal_changes_nothing(plan, tmp_path):
    """While the state is saved, while the finished student is saved, and while the process ends."""
    stopped, finished = tmp_path / "stopped", tmp_path / "finished"
    late = [
        plan(stopped, world=1, hold={"0": 3}, signals=[0], own=["save", "train-end", "exit"]),
        plan(finished, world=1, own=["train-end", "finish", "result", "exit"]),
        plan(stopped, world=1),
    ]
    assert ends_of(late) == [[75], [0], [0]], "".join(map(logs, late))
    assert "stopped by a signal after step 3 of 9, state saved" in logs(late[0])
    assert "going on from checkpoint-3" in logs(late[2])
    assert_equal_runs(stopped, finished)


def test_a_signal_at_the_last_step_lets_the_run_finish(train, tmp_path, monkeypatch):
    whole = train(out=tmp_path / "whole", max_steps=3)
    SignalAt(monkeypatch, [3])
    assert train(max_steps=3)["steps"] == whole["steps"] == 3
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_signal_at_the_step_that_stops_early_lets_the_run_finish(
    train, cache_dir, tmp_path, monkeypatch
):
    """Gone on with from there, it would train further than it does undisturbed."""
    options = {
        "max_steps": 40,
        "learning_rate": 1.0,  # diverges after the first steps
        "scheduler": "constant",
        "warmup_ratio": 0.0,
        "eval_every": 1,
        "early_stopping_patience": 2,
        "validation_cache": cache_dir,
    }
    whole = train(out=tmp_path / "whole", **options)
    assert whole["steps"] < 40
    SignalAt(monkeypatch, [whole["steps"]])
    assert train(**options)["validation"] == whole["validation"]
