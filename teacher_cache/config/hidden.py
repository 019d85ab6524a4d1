"""Which hidden states are kept, and how they are stored."""

from dataclasses import dataclass
from typing import Annotated, Literal

from shared.options import SET, Option, group
from shared.tasks import HiddenCodec, tasks_where
from teacher_cache.config.job import NOT_LIKE


@group("Hidden states")
@dataclass(frozen=True, kw_only=True)
class HiddenOptions:
    """Which hidden states are kept beside the targets, and how exactly."""

    hidden_layers: Annotated[
        tuple[int, ...],
        Option(
            help="Also keep this layer's states: -1 final, n the output of block n. Repeatable.",
            read_when=NOT_LIKE,
        ),
    ] = ()
    hidden_codec: Annotated[
        HiddenCodec,
        Option(
            help="How hidden states are stored: 2 bytes, 1 robust to outliers, 1 more exact.",
            read_when={"hidden_layers": (SET,)} | NOT_LIKE,
        ),
    ] = "bf16"
    hidden_every: Annotated[
        int,
        Option(
            help="Keep the states of every n-th position of a row only.",
            read_when={"hidden_layers": (SET,)} | NOT_LIKE,
            min=1,
        ),
    ] = 1
    pooling: Annotated[
        Literal["auto", "mean", "cls", "last", "none"],
        Option(
            help="What becomes of a text's states: their mean, special tokens included (auto), "
            "that of its first or last token, or all of them but those of special tokens.",
            read_when={"task": tasks_where(lambda task: task.keeps_states)} | NOT_LIKE,
        ),
    ] = "auto"
