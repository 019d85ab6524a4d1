"""Targets that the teacher writes itself before they are cached."""

from dataclasses import dataclass
from typing import Annotated

from shared.options import SET, Option, group
from shared.tasks import tasks_where


@group("Texts that the teacher writes first")
@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """Whether the teacher writes the targets, and how it chooses tokens."""

    generate: Annotated[
        bool,
        Option(
            help="Let the teacher write the targets first: the last answer of a conversation, the "
            "completion, or the target of a pair.",
            read_when={"task": tasks_where(lambda task: task.is_written)},
        ),
    ] = False
    max_new_tokens: Annotated[
        int, Option(help="Tokens that are written at most.", min=1, read_when={"generate": (True,)})
    ] = 256
    num_beams: Annotated[
        int, Option(help="Beams of generation.", min=1, read_when={"generate": (True,)})
    ] = 1
    sample_temperature: Annotated[
        float,
        Option(
            help="Above 0: what is written is drawn at this temperature; 0: the likeliest.",
            min=0,
            max=20,
            read_when={"generate": (True,)},
        ),
    ] = 0.0
    top_p: Annotated[
        float,
        Option(
            help="Draw among the likeliest tokens that have this probability together.",
            min=0.01,
            max=1,
            read_when={"sample_temperature": (SET,)},
        ),
    ] = 1.0
