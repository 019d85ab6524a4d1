"""The options of the commands that look at trained students, or hand them on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from shared.errors import ConfigError
from shared.options import Option, check_bounds
from shared.tasks import MAX_ANSWER_TOKENS

WorstBy = Literal["loss", "kl"]
ExportFormat = Literal["safetensors", "int8", "onnx"]

_WORST_ON_A_PAGE = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class StatusConfig:
    """`train-student status`."""

    run: Annotated[Path, Option(help="Folder of a run (its --out).", argument=True)]
    json: Annotated[bool, Option(help="Print one JSON object.")] = False

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """`train-student evaluate`."""

    student: Annotated[str, Option(help="Folder of a run, of a checkpoint, or of any model.")]
    cache: Annotated[Path, Option(help="Held-out cache.")]
    allow_partial: Annotated[bool, Option(help="Evaluate on the shards that are there.")] = False
    batch_tokens: Annotated[int, Option(help="Tokens of one forward.", min=1)] = 8192
    max_answer_tokens: Annotated[
        int, Option(help="Tokens of the longest answer to a question that is looked for.", min=1)
    ] = MAX_ANSWER_TOKENS
    generate: Annotated[
        bool,
        Option(
            help="Also let the student write a text for the sources of held-out rows (seq2seq-lm), "
            "scored against their references by chrF, BLEU and ROUGE."
        ),
    ] = False
    generate_rows: Annotated[
        int, Option(help="Rows to write for.", min=1, read_when={"generate": (True,)})
    ] = 200
    num_beams: Annotated[
        int, Option(help="Beams of generation.", min=1, read_when={"generate": (True,)})
    ] = 1
    max_new_tokens: Annotated[
        int, Option(help="Tokens of a written text.", min=1, read_when={"generate": (True,)})
    ] = 128
    device: Annotated[Literal["auto", "cpu"], Option(help="cpu: even where there is a GPU.")] = (
        "auto"
    )
    html: Annotated[Path | None, Option(help="Also draw it into this file.")] = None
    worst: Annotated[
        int | Literal["auto"],
        Option(help="Rows to list, the worst first; auto: 20 with --html, else none.", min=0),
    ] = "auto"
    worst_by: Annotated[
        WorstBy, Option(help="What the worst rows have most of, in the mean of their positions.")
    ] = "loss"
    json: Annotated[bool, Option(help="Print one JSON object.")] = False

    def __post_init__(self) -> None:
        check_bounds(self)

    @property
    def num_worst(self) -> int:
        """How many of the worst rows are listed."""
        if self.worst == "auto":
            return 0 if self.html is None else _WORST_ON_A_PAGE
        return self.worst

    @property
    def asks_for_worst(self) -> bool:
        """Whether they are wanted beside the numbers, and not only on the page."""
        return self.worst != "auto" and self.worst > 0


@dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig:
    """`train-student compare`."""

    runs: Annotated[tuple[Path, ...], Option(help="Folders of finished runs.", argument=True)]
    html: Annotated[Path | None, Option(help="Also draw it into this file.")] = None
    json: Annotated[bool, Option(help="Print one JSON object.")] = False

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportConfig:
    """`train-student export`."""

    student: Annotated[
        Path, Option(help="Folder of a run, of a checkpoint, or of any student.", argument=True)
    ]
    out: Annotated[Path, Option(help="Folder of the exported model.")]
    cache: Annotated[
        Path | None,
        Option(
            help="Held-out cache whose rows the export is checked on.",
            show_default="one that the run names",
        ),
    ] = None
    format: Annotated[
        tuple[ExportFormat, ...],
        Option(
            help="safetensors: for transformers and servers; onnx: float32, any runtime; int8: for "
            "CPUs, an ONNX file. Repeatable."
        ),
    ] = ("safetensors",)
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"],
        Option(help="Number type of the safetensors."),
    ] = "float32"
    rows: Annotated[int, Option(help="Rows the export is checked on.", min=1)] = 64
    json: Annotated[bool, Option(help="Print one JSON object.")] = False

    def __post_init__(self) -> None:
        check_bounds(self)
        if self.dtype != "float32" and "safetensors" not in self.format:
            raise ConfigError(
                f"--dtype {self.dtype}: it is the number type of --format safetensors, which is "
                "not asked for"
            )
