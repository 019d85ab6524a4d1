"""metrics.jsonl: the terms of the loss apart for every step, evaluations, and speed.

Sums stay on the device until `flush`, so that a step never waits for a number. Lines of kind
`train` hold no time: on one CPU those of a resumed run equal an uninterrupted one's bit by bit.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_TERMS = (
    "soft",
    "soft_cross_entropy",
    "hard",
    "hidden",
    "agreement",
    "student_entropy",
    "teacher_entropy",
)


class MetricsLog:
    """Collects what each micro-batch returns and appends one line for each optimiser step."""

    def __init__(self, path: Path, *, writes: bool, seconds_before: float = 0.0) -> None:
        self.path, self.writes = path, writes
        self.seconds = seconds_before
        self._pending: dict[int, list[Tensor]] = {}
        self._counts: dict[int, Tensor] = {}  # positions, and those with a hard label
        self._scheduled: dict[int, Mapping[str, float]] = {}
        self._terms: tuple[str, ...] = ()
        self._since_log: list[dict[str, float]] = []
        self._last_flush_s = time.monotonic()
        self._waited_s = 0.0

    def add(
        self,
        step: int,
        output: Mapping[str, Tensor],
        inputs: Mapping[str, Tensor],
        scheduled: Mapping[str, float],
    ) -> None:
        """One micro-batch of `step`; nothing is copied to the host yet."""
        self._terms = tuple(name for name in _TERMS if name in output)
        values = [output["loss"].detach(), *(output[name].detach() for name in self._terms)]
        stacked = torch.stack([value.to(torch.float64) for value in values])
        self._pending.setdefault(step, []).append(stacked)
        self._counts[step] = torch.stack([inputs["num_positions"], inputs["num_labels"]])
        self._scheduled[step] = scheduled

    def flush(self, seconds_waited: float) -> dict[str, float]:
        """Writes the steps since the last flush; means since the last log for other trackers."""
        if self._pending:
            self._write_steps()
            self._write_speed(seconds_waited)
        return self._means()

    def write(self, kind: str, step: int, numbers: Mapping[str, Any]) -> None:
        """Appends one line."""
        if self.writes:
            with open(self.path, "a") as file:
                file.write(json.dumps({"kind": kind, "step": step, **numbers}) + "\n")

    def restart_clock(self) -> None:
        """What went by until now is no time of training."""
        self._last_flush_s = time.monotonic()

    def take_means(self) -> dict[str, float]:
        """Means since the last call."""
        means, self._since_log = self._means(), []
        return means

    def _write_steps(self) -> None:
        steps = sorted(self._pending)
        sums = torch.stack([torch.stack(self._pending[step]).sum(dim=0) for step in steps])
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        counts = torch.stack([self._counts[step] for step in steps]).tolist()
        for step, (count, labels), row in zip(steps, counts, sums.tolist(), strict=True):
            loss, *terms = row
            numbers = {
                name: term / max(1, labels if name == "hard" else count)
                for name, term in zip(self._terms, terms, strict=True)
            }
            numbers |= self._scheduled[step]
            line = {"loss": loss, "loss_hex": loss.hex(), **numbers, "positions": count}
            self._since_log.append({name: v for name, v in line.items() if isinstance(v, float)})
            self.write("train", step, line)
        self._last_step, self._positions = steps[-1], sum(count for count, _ in counts)
        self._pending.clear()
        self._counts.clear()
        self._scheduled.clear()

    def _write_speed(self, seconds_waited: float) -> None:
        now = time.monotonic()
        seconds = now - self._last_flush_s
        self.seconds += seconds
        numbers = {
            "seconds": round(seconds, 4),
            "positions_per_s": round(self._positions / max(seconds, 1e-9), 1),
            "data_wait_s": round(seconds_waited - self._waited_s, 4),
        }
        if torch.cuda.is_available():
            numbers["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3)
        self.write("speed", self._last_step, numbers)
        self._last_flush_s, self._waited_s = now, seconds_waited

    def _means(self) -> dict[str, float]:
        if not self._since_log:
            return {}
        names = self._since_log[-1].keys() - {"loss"}
        return {n: sum(line[n] for line in self._since_log) / len(self._since_log) for n in names}
