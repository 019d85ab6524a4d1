"""How documents become rows of tokens, for each task that has a choice."""

from dataclasses import dataclass
from typing import Annotated, Literal

from shared.format.layouts import LAYOUTS
from shared.options import Option, group
from shared.tasks import tasks_where
from teacher_cache.config.job import NOT_LIKE

_WINDOWS = {"task": tasks_where(lambda task: LAYOUTS[task.layout].classes_are_tokens)}
_PAIRS = {"task": tasks_where(lambda task: LAYOUTS[task.layout].has_decoder)}
_MASKED = {"task": tasks_where(lambda task: task.masks)}


@group("Rows")
@dataclass(frozen=True, kw_only=True)
class RowOptions:
    """How documents become rows of tokens."""

    max_length: Annotated[
        int, Option(help="Tokens of a row; longer ones are cut.", min=2, read_when=NOT_LIKE)
    ] = 1024
    pack: Annotated[
        bool, Option(help="Put several short documents into one row.", read_when=NOT_LIKE)
    ] = False
    stride: Annotated[
        int,
        Option(
            help="Tokens that two windows of a long text share.",
            min=0,
            read_when=_WINDOWS | NOT_LIKE,
        ),
    ] = 128
    max_target_length: Annotated[
        int,
        Option(
            help="Tokens of a target; longer ones are cut, and then have no end.",
            min=1,
            read_when=NOT_LIKE | _PAIRS | {"generate": (False,)},
        ),
    ] = 128
    decoder_start: Annotated[
        int | Literal["auto"],
        Option(
            help="Token that a decoder starts from; auto: the teacher's, without one the "
            "tokenizer's padding, else its BOS, else its end.",
            min=0,
            read_when=NOT_LIKE | _PAIRS,
        ),
    ] = "auto"
    mask_copies: Annotated[
        int,
        Option(
            help="Rows of each text, or chunk of one, that differ in what is masked.",
            min=1,
            max=1000,
            read_when=_MASKED | NOT_LIKE,
        ),
    ] = 4
    mask_share: Annotated[
        float,
        Option(
            help="Share of a row's tokens that are masked: 80 % of these replaced by the mask "
            "token, 10 % by any token, 10 % kept.",
            min=0.001,
            max=1,
            read_when=_MASKED | NOT_LIKE,
        ),
    ] = 0.15
