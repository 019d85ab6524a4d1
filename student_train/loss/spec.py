"""Which loss is asked for. Apart from the arithmetic, so that the options need no torch."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from shared.errors import ConfigError

SoftLoss: TypeAlias = str  # a name in SOFT_LOSSES
Tail = Literal["bucket", "label", "none", "renormalise"]
HiddenLoss = Literal["mse", "cosine", "contrastive"]


@dataclass(frozen=True, slots=True)
class SoftLossTraits:
    """What options ask of a soft loss; its arithmetic is a line of `rows.ROW_LOSSES`.

    `temperature_power`: the power of the temperature that value and gradient are multiplied by.
    `every_tail`: it is defined whatever becomes of the tail, and not as a bucket alone.
    `every_temperature`: it is defined at others than 1.
    """

    temperature_power: int
    every_tail: bool = False
    every_temperature: bool = True


SOFT_LOSSES: dict[SoftLoss, SoftLossTraits] = {
    "forward-kl": SoftLossTraits(2, every_tail=True),
    "reverse-kl": SoftLossTraits(2),
    "jsd": SoftLossTraits(2),
    "tvd": SoftLossTraits(1),
    "mse": SoftLossTraits(0, every_temperature=False),
}


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
        _check_choice("soft-loss", self.soft_loss, SOFT_LOSSES)
        _check_choice("tail", self.tail, get_args(Tail))
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ConfigError(f"--temperature {self.temperature}: expected a number above 0")
        if not 0 < self.jsd_beta < 1:
            raise ConfigError(f"--jsd-beta {self.jsd_beta}: expected a number between 0 and 1")
        if not 0 <= self.label_smoothing < 1:
            raise ConfigError(
                f"--label-smoothing {self.label_smoothing}: expected a number from 0 to below 1"
            )
        traits = SOFT_LOSSES[self.soft_loss]
        if self.tail != "bucket" and not traits.every_tail:
            defined = ", ".join(name for name, each in SOFT_LOSSES.items() if each.every_tail)
            raise ConfigError(
                f"--tail {self.tail} is only defined for --soft-loss {defined}, not for "
                f"{self.soft_loss}: use --tail bucket"
            )
        if self.temperature != 1 and not traits.every_temperature:
            raise ConfigError(
                f"--soft-loss {self.soft_loss} compares log-probabilities at temperature 1, not "
                f"{self.temperature}: leave --temperature out"
            )


def _check_choice(option: str, found: str, choices: Collection[str]) -> None:
    if found not in choices:
        raise ConfigError(f"--{option} {found}: expected one of {', '.join(choices)}")
