"""Where a run computes, and with what numbers."""

from dataclasses import dataclass
from typing import Annotated, Literal

from shared.options import Option, group


@group("How it runs")
@dataclass(frozen=True, kw_only=True)
class ExecutionOptions:
    """Where a run computes, and with what numbers."""

    device: Annotated[Literal["auto", "cpu"], Option(help="cpu: even where there is a GPU.")] = (
        "auto"
    )
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Option(help="bfloat16: mixed precision over float32 weights."),
    ] = "auto"
    compile: Annotated[bool, Option(help="torch.compile the student.")] = False
    gradient_checkpointing: Annotated[bool, Option(help="Less memory, more compute.")] = False
    threads: Annotated[int, Option(help="Threads that decode the cache.", min=1, max=64)] = 2
    seed: Annotated[int, Option(help="Seed of initialisation, order and dropout.", min=0)] = 0
    settings: Annotated[
        tuple[str, ...],
        Option(help="Any other TrainingArguments field, key=value. Repeatable.", flag="--set"),
    ] = ()
