"""The options of the commands that look after a cache, or cut a student out of a teacher."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from shared.errors import ConfigError
from shared.options import Option, check_bounds


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectConfig:
    """`cache-teacher inspect`."""

    cache: Annotated[Path, Option(help="Folder of the cache.", argument=True)]
    rows: Annotated[int, Option(help="Decoded rows to show.", min=0, max=100)] = 3
    html: Annotated[Path | None, Option(help="Also draw it, as one file to open in a browser.")] = (
        None
    )
    json: Annotated[bool, Option(help="Print one JSON object.")] = False

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class VerifyConfig:
    """`cache-teacher verify`."""

    cache: Annotated[Path, Option(help="Folder of the cache.", argument=True)]
    drop_bad: Annotated[
        bool, Option(help="Remove the commits of bad shards, so that run redoes just those.")
    ] = False
    seal: Annotated[
        bool, Option(help="Write index.arrow, with a sha256 of every shard of a complete cache.")
    ] = False
    json: Annotated[bool, Option(help="Print one JSON object.")] = False

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckConfig:
    """`cache-teacher check`."""

    cache: Annotated[Path, Option(help="Folder of the cache.", argument=True)]
    teacher: Annotated[str, Option(help="Hub id or folder of the teacher.")]
    rows: Annotated[int, Option(help="Rows to run again.", min=1)] = 64
    revision: Annotated[str | None, Option(help="Revision of the teacher on the Hub.")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Option(help="Number type of the teacher.", show_default="as cached"),
    ] = "auto"
    device: Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    trust_remote_code: Annotated[
        bool, Option(help="Run model code that comes with the teacher.")
    ] = False
    json: Annotated[bool, Option(help="Print one JSON object.")] = False

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class RepackConfig:
    """`cache-teacher repack`."""

    cache: Annotated[Path, Option(help="Folder of the cache.", argument=True)]
    out: Annotated[Path, Option(help="Folder of the smaller cache.", argument=True)]
    top_k: Annotated[
        int, Option(help="Entries kept at each position.", min=0, show_default="as they are")
    ] = 0
    mean_entries: Annotated[
        float,
        Option(
            help="Entries kept at a position on average, of adaptive and sampled targets.",
            min=0,
            max=255,
            show_default="as they are",
        ),
    ] = 0.0
    value_bits: Annotated[
        Literal[0, 7, 8, 16],
        Option(help="Bits of a log-probability.", show_default="as they are"),
    ] = 0
    hidden_layers: Annotated[
        tuple[int, ...], Option(help="Hidden layers to keep. Repeatable.", show_default="all")
    ] = ()
    drop_hidden: Annotated[bool, Option(help="Keep no hidden layer.")] = False
    documents: Annotated[
        str, Option(help="Documents to keep, A:B, counted from 0.", show_default="all")
    ] = ":"

    def __post_init__(self) -> None:
        check_bounds(self)
        _ = self.document_range(0)

    def document_range(self, num_documents: int) -> range:
        """The documents asked for."""
        start, colon, stop = self.documents.partition(":")
        if not colon or not all(part.isdigit() or not part for part in (start, stop)):
            raise ConfigError(f"--documents {self.documents}: expected A:B, such as 0:1000 or 500:")
        return range(int(start or 0), int(stop or num_documents))


@dataclass(frozen=True, kw_only=True, slots=True)
class CleanConfig:
    """`cache-teacher clean`."""

    cache: Annotated[Path, Option(help="Folder of the cache.", argument=True)]
    dry_run: Annotated[bool, Option(help="Only list what would be removed.")] = False

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig:
    """`cache-teacher student`."""

    teacher: Annotated[str, Option(help="Hub id or folder of the teacher.")]
    layers: Annotated[
        str, Option(help="Blocks to keep, such as 0,3,5, counted from 0; of the encoder, if any.")
    ]
    out: Annotated[Path, Option(help="Folder of the smaller model.")]
    decoder_layers: Annotated[
        str | None,
        Option(help="Blocks of the decoder to keep.", show_default="as --layers"),
    ] = None
    revision: Annotated[str | None, Option(help="Revision of the teacher on the Hub.")] = None

    def __post_init__(self) -> None:
        check_bounds(self)
        _ = self.picked, self.decoder_picked

    @property
    def picked(self) -> tuple[int, ...]:
        return _block_numbers("--layers", self.layers)

    @property
    def decoder_picked(self) -> tuple[int, ...]:
        if self.decoder_layers is None:
            return self.picked
        return _block_numbers("--decoder-layers", self.decoder_layers)


def _block_numbers(option: str, text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    numbers = tuple(int(part) for part in parts if part.isascii() and part.isdecimal())
    if len(numbers) != len(parts) or sorted(set(numbers)) != list(numbers):
        raise ConfigError(
            f"{option} {text}: expected numbers of blocks, ascending and each once, such as 0,3,5"
        )
    return numbers
