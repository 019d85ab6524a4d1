"""Weights and temperature of the loss over a run: pure functions of the step and of max_steps."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from student_train.loss.attachment import Attachment

ScheduleKind = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, slots=True)
class LossSchedule:
    """From the start value of each name at the first step to its end value at the last.

    linear  start + (end - start) x, with x = step / (max_steps - 1) and steps from 0
    cosine  end + (start - end) (1 + cos(pi x)) / 2: slow at both ends (Loshchilov and Hutter 2017,
            equation 5)
    """

    kind: ScheduleKind
    max_steps: int
    ends: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # name -> (start, end)

    def at(self, step: int) -> dict[str, float]:
        """The value of each name at a step."""
        x = min(1.0, step / max(1, self.max_steps - 1))
        share = {"constant": 0.0, "linear": x, "cosine": (1 - math.cos(math.pi * x)) / 2}[self.kind]
        # Both products: at the last step the end value comes out to the last bit.
        return {name: start * (1 - share) + end * share for name, (start, end) in self.ends.items()}


class ScheduledLoss:
    """Moves the objective of a student along a schedule."""

    def __init__(self, attachment: "Attachment", schedule: LossSchedule) -> None:
        self._attachment, self._objective = attachment, attachment.objective
        self.schedule = schedule

    def set_step(self, step: int) -> dict[str, float]:
        """The student's loss is that of `step` from now on; returns what is scheduled."""
        values = self.schedule.at(step)
        self._attachment.objective = self._objective.with_values(values)
        return values
