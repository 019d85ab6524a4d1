"""Runs of `train-student run` in forks, one or two ranks each, that get signals at known places.

python -m tests.student_train.run.signalled PLAN        runs one after another; writes how they end
torchrun ... -m tests.student_train.run.signalled PLAN  one run: this rank of it, whose end it notes

A rank that is to be signalled waits at its place until the file `sent-RANK` says that it was.
"""

import atexit
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from student_train import cli
from student_train.run import assemble, callbacks, trainer
from student_train.run import run as run_module  # and so all that a run imports
from student_train.run.folder import RunFolder


def wait_for(path: Path) -> None:
    for _ in range(12_000):
        if path.exists():
            return
        time.sleep(0.01)
    raise AssertionError(f"{path} never came")


def hold(folder: Path, rank: int) -> None:
    """Says which process is where it is to be signalled, and goes on when it has been."""
    temporary = folder / f".held-{rank}"
    temporary.write_text(str(os.getpid()))
    temporary.replace(folder / f"held-{rank}")
    wait_for(folder / f"sent-{rank}")


def send(folder: Path, rank: int) -> None:
    wait_for(folder / f"held-{rank}")
    os.kill(int((folder / f"held-{rank}").read_text()), signal.SIGTERM)
    (folder / f"sent-{rank}").touch()


def before(owner: Any, name: str, action: Any) -> None:
    """Does something before a function or method, the first time it is called."""
    original, done = getattr(owner, name), []

    def replacement(*args: Any, **kwargs: Any) -> Any:
        if not done:
            done.append(action())
        return original(*args, **kwargs)

    setattr(owner, name, replacement)


def to_itself() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def arm(run: dict[str, Any], rank: int) -> None:
    """`hold`: rank -> step to be signalled at, 0: before the first; `own`: places that signal."""
    folder, step = Path(run["folder"]), run["hold"].get(str(rank))
    if step == 0:
        before(assemble, "build_student", lambda: hold(folder, rank))
    elif step is not None:
        on_step_end = callbacks.StopOnSignal.on_step_end

        def end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            if state.global_step == step:
                hold(folder, rank)
            return on_step_end(self, args, state, control, **kwargs)

        callbacks.StopOnSignal.on_step_end = end  # type: ignore[method-assign]
    places = {
        "save": (trainer.DistillTrainer, "_save_optimizer_and_scheduler"),
        "train-end": (trainer.DistillTrainer, "_finalize_training"),
        "finish": (run_module, "finish"),
        "result": (RunFolder, "save_result"),
    }
    for name in run["own"]:
        if name == "exit":
            atexit.register(to_itself)  # after what the command registers: the last one first
        else:
            before(*places[name], to_itself)


def command(run: dict[str, Any], rank: int) -> None:
    """Ends the process as the command does."""
    with open(Path(run["folder"]) / f"log-{rank}", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    arm(run, rank)
    sys.argv = ["train-student", "run", *run["arguments"]]
    cli.main()


def start_all(run: dict[str, Any]) -> list[int]:
    """Forks every rank, signals those that hold, and returns how all ended."""
    folder, world = Path(run["folder"]), run["world"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        process = os.fork()
        if process == 0:
            if world > 1:
                ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
                address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
                os.environ |= {name: str(value) for name, value in (ranks | address).items()}
            command(run, rank)
        processes.append(process)
    for number, rank in enumerate(run["signals"]):
        if number:
            time.sleep(0.3)
            os.kill(processes[rank], signal.SIGTERM)
        else:
            send(folder, rank)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def one_rank(run: dict[str, Any], rank: int) -> None:
    """Ends as its fork does, and hands on what a launcher sends to it."""
    process = os.fork()
    if process == 0:
        command(run, rank)

    def pass_on(number: int, frame: FrameType | None) -> None:
        os.kill(process, number)

    signal.signal(signal.SIGTERM, pass_on)
    end = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    (Path(run["folder"]) / f"end-{rank}").write_text(str(end))
    sys.exit(end)


if __name__ == "__main__":
    plan = json.loads(Path(sys.argv[1]).read_text())
    if "RANK" in os.environ:
        one_rank(plan[0], int(os.environ["RANK"]))
    sys.stdout.write(json.dumps([start_all(run) for run in plan]))
