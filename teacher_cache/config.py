"""The options of every `cache-teacher` command, each declared once."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from shared.errors import ConfigError
from shared.options import SET, Option, check_bounds
from shared.tasks import TASKS, Pooling, ProblemType, TaskName

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
    unlabelled: Annotated[
        bool,
        Option(
            help="Take no labels from the corpus: students learn from what the teacher says of its "
            "rows alone. So it is anyhow where no column of labels is found.",
            read_when={"task": ("token-classification", "sequence-classification")},
        ),
    ] = False
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
    stride: Annotated[
        int,
        Option(
            help="Tokens that two windows of a long text share.",
            min=0,
            read_when={"task": ("question-answering",)} | _NOT_LIKE,
        ),
    ] = 128
    max_target_length: Annotated[
        int,
        Option(
            help="Tokens of a target; longer ones are cut, and then have no end.",
            min=1,
            read_when=_NOT_LIKE | {"task": ("seq2seq-lm",), "generate": (False,)},
        ),
    ] = 128
    decoder_start: Annotated[
        int | Literal["auto"],
        Option(
            help="Token that a decoder starts from; auto: the teacher's, without one the "
            "tokenizer's padding, else its BOS, else its end.",
            min=0,
            read_when=_NOT_LIKE | {"task": ("seq2seq-lm",)},
        ),
    ] = "auto"
    generate: Annotated[
        bool,
        Option(
            help="Let the teacher write the targets first: the last answer of a conversation, the "
            "completion, or the target of a pair.",
            read_when={"task": ("causal-lm", "seq2seq-lm")},
        ),
    ] = False
    num_beams: Annotated[
        int, Option(help="Beams of generation.", min=1, read_when={"generate": (True,)})
    ] = 1
    max_new_tokens: Annotated[
        int, Option(help="Tokens that are written at most.", min=1, read_when={"generate": (True,)})
    ] = 256
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
    pack: Annotated[
        bool, Option(help="Put several short documents into one row.", read_when=_NOT_LIKE)
    ] = False
    mask_copies: Annotated[
        int,
        Option(
            help="Rows of each text, or chunk of one, that differ in what is masked.",
            min=1,
            max=1000,
            read_when={"task": ("masked-lm",)} | _NOT_LIKE,
        ),
    ] = 4
    mask_share: Annotated[
        float,
        Option(
            help="Share of a row's tokens that are masked: 80 % of these replaced by the mask "
            "token, 10 % by any token, 10 % kept.",
            min=0.001,
            max=1,
            read_when={"task": ("masked-lm",)} | _NOT_LIKE,
        ),
    ] = 0.15
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
    pooling: Annotated[
        Literal["auto", "mean", "cls", "last", "none"],
        Option(
            help="What becomes of a text's states: their mean, special tokens included (auto), "
            "that of its first or last token, or all of them but those of special tokens.",
            read_when={"task": ("feature-extraction",)} | _NOT_LIKE,
        ),
    ] = "auto"
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
        if self.task == "masked-lm" and self.pack:
            raise ConfigError(
                "--pack is not there for --task masked-lm: in a packed row the documents of a "
                "bidirectional model see each other. Rows of similar length are batched anyway."
            )
        if self.pack and TASKS[self.task].layout == "pair":
            raise ConfigError(f"--pack is not there for --task {self.task}")
        if TASKS[self.task].layout == "window":
            self._check_windows()
        if self.generate:
            self._check_generation()
        if TASKS[self.task].target_space == "states":
            self._check_states()
        elif self.targets == "none":
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
        if self.unlabelled and self.targets == "none":
            raise ConfigError(
                "--unlabelled with --targets none: nothing would be left to learn from. Give a "
                "--teacher, or leave one of the two out."
            )
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
        if self.pack:
            raise ConfigError(f"--pack is not there for --task {self.task}")
        if self.hidden_layers and TASKS[self.task].layout != "tokens":
            raise ConfigError(
                f"--hidden-layers is not there for --task {self.task}, whose targets are of a row "
                "as a whole: leave it out"
            )

    def _check_states(self) -> None:
        if self.targets not in ("auto", "none") or self.temperature or self.top_k is not None:
            raise ConfigError(
                f"--task {self.task} keeps hidden states and no distribution: leave --targets, "
                "--top-k and --temperature out"
            )
        if self.teacher is None:
            raise ConfigError(
                f"--teacher is missing: --task {self.task} keeps a teacher's hidden states, so "
                "name a Hub id or a folder"
            )
        if self.pack:
            raise ConfigError(f"--pack is not there for --task {self.task}: a row is one text")
        if self.pooling != "none" and self.hidden_every != 1:
            raise ConfigError(
                f"--hidden-every {self.hidden_every}: a pooled row has one state. Leave it out, or "
                "keep the states of all tokens with --pooling none"
            )

    @property
    def uses_teacher(self) -> bool:
        """Whether anything is asked of a teacher; else its tokenizer alone is read."""
        return self.targets != "none" or TASKS[self.task].target_space == "states"

    @property
    def layers(self) -> tuple[int, ...]:
        """The hidden layers to keep, ascending."""
        default = (-1,) if TASKS[self.task].target_space == "states" else ()
        return tuple(sorted(set(self.hidden_layers))) or default

    @property
    def pooled(self) -> Pooling:
        """How the states of a row become one."""
        if TASKS[self.task].target_space != "states":
            return "none"
        return "mean" if self.pooling == "auto" else self.pooling

    def _check_windows(self) -> None:
        if self.targets == "sample":
            raise ConfigError(
                f"--targets sample: --task {self.task} looks for the likeliest span, of which a "
                "sample says nothing. Use dense, the default, or topk or adaptive."
            )
        if self.pack or self.hidden_layers:
            raise ConfigError(f"--pack and --hidden-layers are not there for --task {self.task}")

    def _check_generation(self) -> None:
        if self.targets == "none":
            raise ConfigError("--generate keeps targets beside what is written: not --targets none")
        if self.pack:
            raise ConfigError("--pack is not there with --generate: every row has its reference")
        if self.num_beams > 1 and self.sample_temperature > 0:
            raise ConfigError(
                "--sample-temperature draws one token after the other: not with --num-beams above 1"
            )
        # With --like the length of a row is that of its cache.
        if self.task == "causal-lm" and not self.like and self.max_new_tokens >= self.max_length:
            raise ConfigError(
                f"--max-new-tokens {self.max_new_tokens}: leaves no room for a prompt in the "
                f"{self.max_length} tokens of --max-length"
            )

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
        if self.calibrate and TASKS[self.task].target_space == "states":
            raise ConfigError(
                f"--calibrate compares kinds of targets, of which --task {self.task} has none: "
                "leave it out"
            )
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
