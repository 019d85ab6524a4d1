"""kill -9 of a training: the same command, run again, writes the loss log of a calm run."""

import json
import signal
import subprocess
import sys

from tests.student_train.run.test_trainer import losses, weights

# Imports the command once, then runs it in a fork for every place in the list, where it kills
# itself as `kill -9` does; None: nowhere. Prints how each ended.
_KILLED = """
import json, os, signal, sys
from student_train import cli
from student_train.run import callbacks, trainer
from student_train.run import run  # and so all that it imports

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

def arm(place, step):
    if place == "step":  # its weights are updated, nothing is written
        on_step_end = callbacks.StopOnSignal.on_step_end
        def end(self, args, state, control, **kwargs):
            return die() if state.global_step == step else on_step_end(
                self, args, state, control, **kwargs)
        callbacks.StopOnSignal.on_step_end = end
    else:  # in the middle of a checkpoint: before a file of it
        save = getattr(trainer.DistillTrainer, place)
        def before(self, *args, **kwargs):
            return die() if self.state.global_step == step else save(self, *args, **kwargs)
        setattr(trainer.DistillTrainer, place, before)

ends = []
for place in json.loads(sys.argv.pop(1)):
    process = os.fork()
    if process == 0:
        if place:
            arm(*place)
        try:
            cli.main()
        except SystemExit as end:
            os._exit(end.code or 0)
        finally:
            sys.stderr.flush()
            os._exit(1)
    ends.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
print(json.dumps(ends))
"""


def test_killed_and_run_again_equals_uninterrupted(train, tmp_path, cache_dir, student_config_dir):
    """Between two checkpoints, in the middle of one before and after its weights, and at once."""
    train(out=tmp_path / "whole", max_steps=9, save_every=3)
    options = {
        "student": student_config_dir,
        "cache": cache_dir,
        "out": tmp_path / "run",
        "max-steps": 9,
        "save-every": 3,
        "batch-tokens": 1000,
        "learning-rate": 3e-3,
        "log-every": 2,
        "device": "cpu",
    }
    places = [
        ("step", 1),
        ("step", 5),
        ("_save", 6),
        ("_save_optimizer_and_scheduler", 6),
        ("_save_rng_state", 6),
        ("step", 8),
        None,
    ]
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-c", _KILLED, json.dumps(places), "run", *flags],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [-signal.SIGKILL] * 6 + [0], done.stderr
    assert "checkpoint-6: incomplete or damaged, going back to the one before" in done.stderr
    assert "going on from checkpoint-3" in done.stderr
    assert "going on from checkpoint-6" in done.stderr
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 10))
    for name, tensor in weights(tmp_path / "whole").items():
        assert tensor.equal(weights(tmp_path / "run")[name]), name
