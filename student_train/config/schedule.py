"""Temperature and weights that go from one value to another over a run."""

from dataclasses import dataclass
from typing import Annotated

from shared.options import Option, group
from student_train.loss.schedule import ScheduleKind

_SCHEDULED: dict[str, tuple[ScheduleKind, ...]] = {"loss_schedule": ("linear", "cosine")}


@group("Losses that change over the run")
@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """Where temperature and weights end, and how they get there."""

    loss_schedule: Annotated[
        ScheduleKind,
        Option(help="How temperature and weights go to their --...-end values over the run."),
    ] = "constant"
    soft_weight_end: Annotated[
        float | None,
        Option(help="Weight of the soft loss at the last step.", min=0, read_when=_SCHEDULED),
    ] = None
    hard_weight_end: Annotated[
        float | None,
        Option(help="Weight of the hard loss at the last step.", min=0, read_when=_SCHEDULED),
    ] = None
    hidden_weight_end: Annotated[
        float | None,
        Option(help="Weight of the hidden loss at the last step.", min=0, read_when=_SCHEDULED),
    ] = None
    temperature_end: Annotated[
        float | None,
        Option(
            help="Temperature at the last step; needs a dense cache.",
            min=0.05,
            max=20,
            read_when=_SCHEDULED,
        ),
    ] = None
