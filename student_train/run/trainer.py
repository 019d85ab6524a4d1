"""The few methods of `transformers.Trainer` that a run overrides.

To the Trainer a run is one epoch of exactly `max_steps` steps. The order of the data is a function
of (snapshot, seed, step), so `global_step` is the whole state of the data.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback

from shared.cache import Cache
from student_train.data.stream import BatchStream
from student_train.evaluate.evaluate import evaluate
from student_train.loss.schedule import ScheduledLoss
from student_train.run.metrics_log import MetricsLog
from student_train.run_files import kl_of

EVAL_TOKENS = 8192  # of a batch of an evaluation


class DistillTrainer(Trainer):
    """A Trainer whose batches come from a `BatchStream` and whose model returns its own loss.

    Each term of a micro-batch is already divided by its own count in the whole step over all
    processes; DDP and FSDP average gradients, hence the multiplication by the number of processes.
    """

    loss_is_scaled_for_ga = True  # transformers >= 5.23; 5.17 looks at compute_loss_func instead

    def __init__(
        self,
        *args: Any,
        stream: BatchStream,
        validation: Cache | None = None,
        metrics: MetricsLog | None = None,
        scheduled: ScheduledLoss | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, compute_loss_func=_never_called, eval_dataset=[], **kwargs)
        self.remove_callback(PrinterCallback)
        self.stream, self.validation, self.metrics = stream, validation, metrics
        self.scheduled = scheduled

    def get_train_dataloader(self) -> BatchStream:
        """The stream itself: it shards, orders and resumes on its own."""
        self.stream.start_step = lambda: self.state.global_step
        return self.stream

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        return None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss that the model's hooks return."""
        step = self.state.global_step
        values = {} if self.scheduled is None else self.scheduled.set_step(step)
        output = model(**inputs)
        if self.metrics is not None:
            self.metrics.add(step + 1, output, inputs, values)
        loss = output["loss"] * self.accelerator.num_processes
        return (loss, output) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The student's numbers on the held-out cache, with the prefix the callbacks expect."""
        assert self.validation is not None  # eval_strategy is "no" without one
        numbers = evaluate(self.model, self.validation, batch_tokens=EVAL_TOKENS)
        logged = {f"eval_{k}": float(v) for k, v in numbers.items() if not isinstance(v, str)}
        if (kl := kl_of(numbers)) is not None:
            logged["eval_kl"] = kl
        if "metric" in numbers:
            logged["eval_metric"] = float(numbers[numbers["metric"]])
        self.log(dict(logged))
        if self.metrics is not None:
            self.metrics.write("eval", self.state.global_step, numbers)
        handler, control = self.callback_handler, self.control
        self.control: Any = handler.on_evaluate(self.args, self.state, control, logged)
        return logged

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs what the Trainer does, together with each term of the loss."""
        if self.metrics is not None and "loss" in logs:
            self.metrics.flush(self.stream.seconds_waited)
            logs |= self.metrics.take_means()
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Weights and config only: no pickled arguments, which nothing here would ever load."""
        if self.args.should_save:
            target = output_dir or self.args.output_dir
            self.model.save_pretrained(target, state_dict=state_dict)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes the steps up to here into metrics.jsonl first, then the checkpoint."""
        if self.metrics is not None:
            self.metrics.flush(self.stream.seconds_waited)
        super()._save_checkpoint(model, trial)


def _never_called(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("DistillTrainer.compute_loss uses no loss function")
