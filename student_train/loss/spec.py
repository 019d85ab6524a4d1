"""Which loss is asked for. Apart from the arithmetic, so that the options need no torch."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from shared.errors import ConfigError

SoftLoss = Literal["forward-kl", "reverse-kl", "jsd", "tvd", "mse"]
Tail = Literal["bucket", "label", "none", "renormalise"]
HiddenLoss = Literal["mse", "cosine", "contrastive"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSpec:
    """Which soft loss, what becomes of the tail, at which temperature; smoothing of the hard loss.

    `label_smoothing` E: the hard loss is the cross-entropy to 1 - E on the label and E / C on each
    of the C classes (Szegedy et al. 2016, section 7), as `F.cross_entropy` has it.
    """

    soft_loss: SoftLoss = "forward-kl"
    tail: Tail = "bucket"
    temperature: float = 1.0
    jsd_beta: float = 0.5
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _check_choice("soft-loss", self.soft_loss, get_args(SoftLoss))
        _check_choice("tail", self.tail, get_args(Tail))
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"--temperature {self.temperature}: expected a number above 0")
        if not 0 < self.jsd_beta < 1:
            raise ConfigError(f"--jsd-beta {self.jsd_beta}: expected a number between 0 and 1")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(
                f"--label-smoothing {self.label_smoothing}: expected a number from 0 to below 1"
            )
        if self.tail != "bucket" and self.soft_loss != "forward-kl":
            raise ConfigError(
                f"--tail {self.tail} is only defined for --soft-loss forward-kl, not for "
                f"{self.soft_loss}: use --tail bucket"
            )
        if self.soft_loss == "mse" and self.temperature != 1:
            raise ConfigError(
                f"--soft-loss mse compares log-probabilities at temperature 1, not "
                f"{self.temperature}: leave --temperature out"
            )


def _check_choice(option: str, found: str, choices: tuple[str, ...]) -> None:
    if found not in choices:
        raise ConfigError(f"--{option} {found}: expected one of {', '.join(choices)}")
