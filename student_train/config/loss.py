"""The losses against the teacher's targets and against the labels."""

from dataclasses import dataclass
from typing import Annotated

from shared.options import Option, group
from student_train.loss.spec import SOFT_LOSSES, LossSpec, SoftLoss, Tail


@group("What it learns from")
@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """Which losses are added up, and with which weights."""

    soft_weight: Annotated[
        float, Option(help="Weight of the soft loss (papers: alpha).", min=0)
    ] = 1.0
    hard_weight: Annotated[float, Option(help="Weight of the hard loss (papers: beta).", min=0)] = (
        0.5
    )
    temperature: Annotated[
        float,
        Option(help="Temperature of the soft loss; 1 or one the cache stores.", min=0.05, max=20),
    ] = 1.0
    soft_loss: Annotated[
        SoftLoss, Option(help="Loss against the teacher's targets.", choices=SOFT_LOSSES)
    ] = "forward-kl"
    tail: Annotated[
        Tail, Option(help="What becomes of the probability of classes that were not kept.")
    ] = "bucket"
    jsd_beta: Annotated[
        float,
        Option(help="Weight of the teacher in the mixture.", read_when={"soft_loss": ("jsd",)}),
    ] = 0.5
    label_smoothing: Annotated[
        float,
        Option(
            help="Share of the hard label that is spread over all classes, in training only; below "
            "1.",
            min=0,
            max=1,
        ),
    ] = 0.0

    @property
    def loss_spec(self) -> LossSpec:
        """The soft loss these options ask for."""
        return LossSpec(
            soft_loss=self.soft_loss,
            tail=self.tail,
            temperature=self.temperature,
            jsd_beta=self.jsd_beta,
            label_smoothing=self.label_smoothing,
        )
