"""What happens beside the steps: a progress line, and a stop on a signal with the state saved."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from shared.errors import Stopped
from shared.progress import Progress
from shared.signals import StopRequest
from student_train.processes import AnyAsked, any_process

log = logging.getLogger(__name__)


class ProgressLine(TrainerCallback):
    """Steps done, rate and ETA, with the losses of the last log."""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps
        self._done = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._done = state.global_step
        self.progress = Progress(
            "train-student", total=self.max_steps, done=self._done, unit="steps"
        ).__enter__()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.advance(state.global_step - self._done)
        self._done = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        terms = ("loss", "soft", "soft_cross_entropy", "hard", "hidden", "agreement")
        shown = (*terms, "eval_loss", "eval_kl")
        self.progress.advance(0, **{n: f"{v:.4f}" for n, v in (logs or {}).items() if n in shown})

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.progress.__exit__(None, None, None)


class BeforeTheFirstStep(TrainerCallback):
    """Does something once, before step 1, with the student as it is where it will be trained.

    A run that goes on from a checkpoint has been there. Random numbers drawn meanwhile are given
    back, so that the steps are those of a run that does it not.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            with torch.random.fork_rng(devices=[args.device] if args.device.type == "cuda" else []):
                self.action()


class StopOnSignal(TrainerCallback):
    """A signal to any process saves a checkpoint at the end of a step and ends the training of all.

    The signals reach the processes at different times, or one of them alone. Each would leave at a
    step of its own and wait for the others for ever, so they agree on the step.
    """

    def __init__(self, request: StopRequest) -> None:
        self.request = request
        self.stopped = False
        """Whether a signal ended the training, and not its last step or early stopping."""
        self._any_asked = AnyAsked()
        self._ends = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self._any_asked.at_step_end(self.request.requested, args.device):
            self._ends = control.should_save = True
        return control

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """After the evaluation of this step, by which a run may have stopped early: it is over."""
        if self._ends and not control.should_training_stop:
            self.stopped = control.should_training_stop = True
        return control


def train_or_stop(trainer: Trainer, stop: StopOnSignal, checkpoint: Path | None) -> None:
    """Trains to the end, or raises `Stopped` in every process, with the state of one step saved."""
    where = f"{trainer.args.output_dir}: stopped by a signal"
    again = "Run the same command again to go on."
    if any_process(stop.request.requested, trainer.args.device):
        done = "saved so far is nothing" if checkpoint is None else f"{checkpoint.name} is kept"
        raise Stopped(f"{where} before it trained a step; {done}. {again}")
    if checkpoint is not None:
        log.info("%s: going on from %s", trainer.args.output_dir, checkpoint.name)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if stop.stopped:
        # A launcher ends the others soon after the first one leaves; rank 0 may be saving still.
        trainer.accelerator.wait_for_everyone()
        step, max_steps = trainer.state.global_step, trainer.args.max_steps
        raise Stopped(f"{where} after step {step} of {max_steps}, state saved. {again}")
