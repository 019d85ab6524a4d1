"""The options of every `cache-teacher` command, each declared once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from shared.errors import ConfigError
from shared.options import SET, Option, check_bounds
from shared.tasks import TASKS, ProblemType, TaskName

Targets = Literal["auto", "topk", "adaptive", "sample", "dense", "none"]
_NOT_LIKE = {"like": (None,)}  # with --like these come from that cache


@dataclass(frozen=True, kw_only=True, slots=True)
class CaptureConfig:
    """`cache-teacher run` and `plan`: which teacher, which corpus, what to keep."""

    out: Annotated[Path, Option(help="Folder of the cache.")]
    corpus: Annotated[
        str,
        Option(
            help="A .txt, .jsonl, .parquet or .arrow file, of tagged words also a column file "
            "(.conll, .bio, .iob2, .tsv, ...), a folder, a glob, or a Hub name."
        ),
    ]
    teacher: Annotated[
        str | None, Option(help="Hub id or folder of the teacher; none with --targets none.")
    ] = None
    tokenizer: Annotated[str | None, Option(help="Tokenizer, where it is not the teacher's.")] = (
        None
    )
    like: Annotated[
        Path | None,
        Option(help="A cache to match: its targets, rows and learnt tables, on new documents."),
    ] = None
    task: Annotated[TaskName, Option(help="What is distilled.")] = "causal-lm"
    split: Annotated[str, Option(help="Which documents: train, train[:98%], train[100:200].")] = (
        "train"
    )
    columns: Annotated[
        tuple[str, ...],
        Option(
            help="Column of the corpus for a role: text=body; of a column file by its number, from "
            "0 or negative from the end: tags=3. Repeatable."
        ),
    ] = ()
    sample_by: Annotated[
        Literal["line", "paragraph", "document"],
        Option(help="What a document is in a .txt file: a line, a paragraph, or the whole file."),
    ] = "line"
    encoding_errors: Annotated[
        Literal["strict", "replace", "ignore"], Option(help="What to do with bytes not UTF-8.")
    ] = "strict"
    labels: Annotated[
        Path | None,
        Option(
            help="JSON list of the classes' names, in order.",
            show_default="the teacher's, or those in the corpus",
            read_when={"task": ("token-classification", "sequence-classification")},
        ),
    ] = None
    problem_type: Annotated[
        ProblemType | Literal["auto"],
        Option(
            help="What labels are to a text: one of them is right, each is or is not, or each "
            "names a number. auto: by the teacher, else by the column: a list is multi_label, a "
            "number with a point regression. A list names or numbers the labels of its text; of "
            "0 and 1 alone, one for each label, it is no or yes for each (of two labels only if "
            "written 0.0 and 1.0).",
            read_when={"task": ("sequence-classification",)},
        ),
    ] = "auto"
    limit_documents: Annotated[int, Option(help="At most this many documents; 0: all.", min=0)] = 0
    max_length: Annotated[
        int, Option(help="Tokens of a row; longer ones are cut.", min=2, read_when=_NOT_LIKE)
    ] = 1024
    pack: Annotated[
        bool, Option(help="Put several short documents into one row.", read_when=_NOT_LIKE)
    ] = False
    targets: Annotated[
        Targets,
        Option(
            help="What to keep of each distribution: the k largest classes, all above a threshold, "
            "an unbiased sample, or every class; none: hard labels only; auto: every class where "
            "they are few, topk where --top-k or --temperature ask for it, else sample.",
            read_when=_NOT_LIKE,
        ),
    ] = "auto"
    top_k: Annotated[
        int | None,
        Option(
            help="Entries kept at each position.",
            min=1,
            max=255,
            show_default="32",
            read_when=_NOT_LIKE | {"targets": ("auto", "topk")},
        ),
    ] = None
    mean_entries: Annotated[
        float,
        Option(
            help="Entries kept at a position on average.",
            min=1,
            max=255,
            read_when=_NOT_LIKE | {"targets": ("auto", "adaptive", "sample")},
        ),
    ] = 16.0
    value_bits: Annotated[
        Literal[7, 8, 16],
        Option(
            help="Bits of a log-probability; 16 is fp16.",
            read_when=_NOT_LIKE | {"targets": ("auto", "topk", "adaptive", "sample")},
        ),
    ] = 7
    temperature: Annotated[
        tuple[float, ...],
        Option(
            help="Also make this temperature exact at training time. Repeatable.",
            read_when=_NOT_LIKE,
            min=0.05,
            max=20,
        ),
    ] = ()
    hidden_layers: Annotated[
        tuple[int, ...],
        Option(
            help="Also keep this layer's states: -1 final, n the output of block n. Repeatable.",
            read_when=_NOT_LIKE,
        ),
    ] = ()
    hidden_codec: Annotated[
        Literal["bf16", "fp8", "int8"],
        Option(
            help="How hidden states are stored: 2 bytes, 1 robust to outliers, 1 more exact.",
            read_when={"hidden_layers": (SET,)} | _NOT_LIKE,
        ),
    ] = "bf16"
    hidden_every: Annotated[
        int,
        Option(
            help="Keep the states of every n-th position of a row only.",
            read_when={"hidden_layers": (SET,)} | _NOT_LIKE,
            min=1,
        ),
    ] = 1
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Option(help="Number type of the teacher."),
    ] = "auto"
    device: Annotated[str, Option(help="auto, cpu, cuda or cuda:N.")] = "auto"
    revision: Annotated[str, Option(help="Revision of the teacher on the Hub.")] = "main"
    attn_implementation: Annotated[
        Literal["auto", "sdpa", "eager", "flash_attention_2"], Option(help="Attention kernel.")
    ] = "auto"
    trust_remote_code: Annotated[
        bool, Option(help="Run model code that comes with the teacher.")
    ] = False
    forward_tokens: Annotated[
        int | Literal["auto"], Option(help="Tokens of one forward, padding included.", min=1)
    ] = "auto"
    shard_tokens: Annotated[int, Option(help="Aim for the tokens of a shard.", min=1)] = 2_000_000
    nonfinite: Annotated[
        Literal["stop", "drop"], Option(help="On NaN or infinity from the teacher.")
    ] = "stop"
    seed: Annotated[int, Option(help="Seed of everything random.", min=0)] = 0
    processes: Annotated[
        int | Literal["auto"],
        Option(help="Local processes; auto: one for each visible GPU.", min=1, max=64),
    ] = "auto"
    worker: Annotated[
        str, Option(help="This process's share, i/n; auto: from torchrun or SLURM variables.")
    ] = "auto"

    def __post_init__(self) -> None:
        check_bounds(self)
        if TASKS[self.task].target_space == "labels":
            self._check_label_space()
        if self.targets == "none":
            self._check_label_only()
        elif self.teacher is None:
            raise ConfigError(
                "--teacher is missing: name a Hub id or a folder, or ask for hard labels only "
                "with --targets none --tokenizer DIR"
            )
        for pair in self.columns:
            if "=" not in pair:
                raise ConfigError(f"--columns {pair}: expected ROLE=COLUMN, such as text=body")

    def _check_label_space(self) -> None:
        if self.targets not in ("auto", "dense", "none"):
            raise ConfigError(
                f"--targets {self.targets}: --task {self.task} keeps every class, which is dense, "
                "or hard labels only, which is none"
            )
        if self.problem_type == "regression" and (self.targets == "dense" or self.temperature):
            raise ConfigError(
                "--targets dense and --temperature are of probabilities: --problem-type regression "
                "keeps the teacher's numbers. Leave them out"
            )
        if self.pack or self.hidden_layers:
            raise ConfigError(f"--pack and --hidden-layers are not there for --task {self.task}")

    def _check_label_only(self) -> None:
        if self.teacher is None and self.tokenizer is None:
            raise ConfigError("--targets none needs --tokenizer (or --teacher, for its tokenizer)")
        if self.temperature or self.hidden_layers:
            raise ConfigError(
                "--temperature and --hidden-layers need a teacher: not with --targets none"
            )

    @property
    def column_of(self) -> dict[str, str]:
        """Column of the corpus by role."""
        pairs = (pair.partition("=") for pair in self.columns)
        return {role: column for role, _, column in pairs}


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanConfig(CaptureConfig):
    """`cache-teacher plan`: a `run` that is only counted."""

    calibrate: Annotated[
        bool,
        Option(
            help="Also run the teacher on a sample: bytes, kept mass and gradient error of every "
            "kind and size, hours, disk speed."
        ),
    ] = False
    html: Annotated[
        Path | None, Option(help="Also draw what was measured, as one file to open in a browser.")
    ] = None
    json: Annotated[bool, Option(help="Print one JSON object.")] = False

    def __post_init__(self) -> None:
        CaptureConfig.__post_init__(self)
        if self.html is not None and not self.calibrate:
            raise ConfigError("--html draws what --calibrate measures: give both")


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
