"""Low-rank adapters: what is trained where the weights stay as they are."""

from dataclasses import dataclass
from typing import Annotated, Literal

from shared.options import SET, Option, group

Adapter = Literal["lora", "dora", "rslora"]

_ADAPTED = {"lora_rank": (SET,)}


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterSpec:
    """Low-rank adapters: what is added to a frozen weight, scaled by `alpha` / rank.

    `lora`: the product of two thin matrices (Hu et al. 2021). `dora`: a length for each output
    beside it (Liu et al. 2024). `rslora`: scaled by alpha / sqrt(rank) (Kalajdzievski 2023).
    """

    rank: int
    kind: Adapter = "lora"
    alpha: float | None = None  # None: twice the rank
    dropout: float = 0.0  # of what goes into the adapters
    targets: tuple[str, ...] = ()  # names of modules, or ends of names; none: every linear layer


@group("Adapters")
@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """Whether low-rank adapters are trained in place of all weights."""

    lora_rank: Annotated[
        int, Option(help="Train low-rank adapters of this rank; 0: all weights.", min=0)
    ] = 0
    adapter: Annotated[
        Adapter,
        Option(
            help="Kind of the adapters; dora also learns lengths, rslora divides by the root of "
            "the rank.",
            read_when=_ADAPTED,
        ),
    ] = "lora"
    lora_alpha: Annotated[
        float | None,
        Option(
            help="Adapters are multiplied by it and divided by their rank.",
            min=0.001,
            show_default="2 * --lora-rank",
            read_when=_ADAPTED,
        ),
    ] = None
    lora_dropout: Annotated[
        float,
        Option(help="Dropout in front of the adapters.", min=0, max=0.95, read_when=_ADAPTED),
    ] = 0.0
    lora_targets: Annotated[
        tuple[str, ...],
        Option(
            help="Name, or end of the name, of the layers that get adapters: q_proj. Repeatable.",
            show_default="every linear layer but the head",
            read_when=_ADAPTED,
        ),
    ] = ()

    @property
    def adapters(self) -> AdapterSpec | None:
        """The adapters to train; None: all weights."""
        if not self.lora_rank:
            return None
        return AdapterSpec(
            rank=self.lora_rank,
            kind=self.adapter,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            targets=self.lora_targets,
        )
