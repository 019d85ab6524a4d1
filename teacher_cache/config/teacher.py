"""How the teacher and its tokenizer are loaded and run."""

from dataclasses import dataclass
from typing import Annotated, Literal

from shared.options import Option, group


@group("The teacher")
@dataclass(frozen=True, kw_only=True)
class TeacherOptions:
    """How the teacher and its tokenizer are loaded and run."""

    tokenizer: Annotated[str | None, Option(help="Tokenizer, where it is not the teacher's.")] = (
        None
    )
    revision: Annotated[str, Option(help="Revision of the teacher on the Hub.")] = "main"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Option(help="Number type of the teacher."),
    ] = "auto"
    attn_implementation: Annotated[
        Literal["auto", "sdpa", "eager", "flash_attention_2"], Option(help="Attention kernel.")
    ] = "auto"
    trust_remote_code: Annotated[
        bool, Option(help="Run model code that comes with the teacher.")
    ] = False
    nonfinite: Annotated[
        Literal["stop", "drop"], Option(help="On NaN or infinity from the teacher.")
    ] = "stop"
