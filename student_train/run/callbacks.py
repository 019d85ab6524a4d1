"""What happens beside the steps: a progress line, and a stop on a signal with the state saved."""

import signal
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from shared.progress import Progress


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
    """SIGTERM and SIGUSR1 save a checkpoint at the end of the step and end the training."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        numbers = (signal.SIGTERM, signal.SIGUSR1)
        self._before = {number: signal.signal(number, self._request) for number in numbers}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.requested:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
