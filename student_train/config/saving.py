"""How often a run is saved and reported."""

from dataclasses import dataclass
from typing import Annotated, Literal

from shared.options import Option, group


@group("Checkpoints and logs")
@dataclass(frozen=True, kw_only=True)
class SavingOptions:
    """How often a run is saved and reported, and to whom."""

    save_every: Annotated[int, Option(help="Steps between checkpoints; 0: at the end.", min=0)] = 0
    keep_checkpoints: Annotated[int, Option(help="Checkpoints kept.", min=1)] = 2
    log_every: Annotated[int, Option(help="Steps between looks at the losses.", min=1)] = 10
    report_to: Annotated[
        Literal["none", "tensorboard", "wandb", "trackio"], Option(help="Experiment tracker.")
    ] = "none"
