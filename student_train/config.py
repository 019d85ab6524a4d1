"""The options of every `train-student` command, each declared once."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from shared.errors import ConfigError
from shared.options import SET, Option, check_bounds
from shared.tasks import MAX_ANSWER_TOKENS
from student_train.loss.schedule import ScheduleKind
from student_train.loss.spec import HiddenLoss, LossSpec, SoftLoss, Tail
from student_train.recipes import Recipe

Scheduler = Literal["linear", "cosine", "constant", "constant_with_warmup", "polynomial"]
EvalMetric = Literal["loss", "kl", "metric"]

Adapter = Literal["lora", "dora", "rslora"]
WorstBy = Literal["loss", "kl"]

_SCHEDULED: dict[str, tuple[ScheduleKind, ...]] = {"loss_schedule": ("linear", "cosine")}
_ADAPTED = {"lora_rank": (SET,)}
_BY_TASK = "auto: by the task, and whether weights are pretrained, fresh, or adapters"


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


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """`train-student run`: which student, which cache, how to train."""

    student: Annotated[
        str, Option(help="Hub id or folder; a folder with only config.json: from scratch.")
    ]
    cache: Annotated[
        tuple[Path, ...],
        Option(
            help="Folder of the cache to train from. Repeatable: joined, or mixed by tokens where "
            "one is given as DIR=WEIGHT (a plain DIR then has weight 1)."
        ),
    ]
    out: Annotated[Path, Option(help="Folder of this run.")]
    validation_cache: Annotated[
        Path | None, Option(help="Held-out cache, for evaluation and early stopping.")
    ] = None
    ensemble: Annotated[
        bool,
        Option(help="The caches are teachers on the same rows: learn from their weighted mixture."),
    ] = False
    allow_partial: Annotated[
        bool, Option(help="Train on the shards that are there if some are missing.")
    ] = False
    soft_loss: Annotated[SoftLoss, Option(help="Loss against the teacher's targets.")] = (
        "forward-kl"
    )
    tail: Annotated[
        Tail, Option(help="What becomes of the probability of classes that were not kept.")
    ] = "bucket"
    jsd_beta: Annotated[
        float,
        Option(help="Weight of the teacher in the mixture.", read_when={"soft_loss": ("jsd",)}),
    ] = 0.5
    temperature: Annotated[
        float,
        Option(help="Temperature of the soft loss; 1 or one the cache stores.", min=0.05, max=20),
    ] = 1.0
    soft_weight: Annotated[
        float, Option(help="Weight of the soft loss (papers: alpha).", min=0)
    ] = 1.0
    hard_weight: Annotated[float, Option(help="Weight of the hard loss (papers: beta).", min=0)] = (
        0.5
    )
    label_smoothing: Annotated[
        float,
        Option(
            help="Share of the hard label that is spread over all classes, in training only; below "
            "1.",
            min=0,
            max=1,
        ),
    ] = 0.0
    hidden_weight: Annotated[float, Option(help="Weight of the hidden-state loss.", min=0)] = 0.0
    loss_schedule: Annotated[
        ScheduleKind,
        Option(help="How temperature and weights go to their --...-end values over the run."),
    ] = "constant"
    temperature_end: Annotated[
        float | None,
        Option(
            help="Temperature at the last step; needs a dense cache.",
            min=0.05,
            max=20,
            read_when=_SCHEDULED,
        ),
    ] = None
    soft_weight_end: Annotated[
        float | None,
        Option(help="Weight of the soft loss at the last step.", min=0, read_when=_SCHEDULED),
    ] = None
    hard_weight_end: Annotated[
        float | None,
        Option(help="Weight of the hard loss at the last step.", min=0, read_when=_SCHEDULED),
    ] = None
    hidden_weight_end: Annotated[
        float | None,
        Option(help="Weight of the hidden loss at the last step.", min=0, read_when=_SCHEDULED),
    ] = None
    hidden_loss: Annotated[
        HiddenLoss,
        Option(help="Distance of hidden states; contrastive: of the mean states of whole rows."),
    ] = "mse"
    contrastive_temperature: Annotated[
        float,
        Option(
            help="Divides the cosines of rows. They are compared within a micro-batch.",
            read_when={"hidden_loss": ("contrastive",)},
            min=0.001,
        ),
    ] = 0.05
    hidden_map: Annotated[
        tuple[str, ...],
        Option(
            help="Teacher layer T to student layer S, as T:S, repeatable; last: the deepest cached "
            "one to -1; uniform: all cached ones, spread over the student.",
            show_default="-1:-1",
        ),
    ] = ()
    learning_rate: Annotated[
        float | Literal["auto"], Option(help="Peak learning rate.", min=0, show_default=_BY_TASK)
    ] = "auto"
    scheduler: Annotated[Scheduler, Option(help="Learning rate over the run.")] = "cosine"
    warmup_ratio: Annotated[
        float | Literal["auto"],
        Option(help="Share of the steps that warm up.", min=0, max=1, show_default=_BY_TASK),
    ] = "auto"
    weight_decay: Annotated[
        float | Literal["auto"], Option(help="AdamW weight decay.", min=0, show_default=_BY_TASK)
    ] = "auto"
    max_grad_norm: Annotated[
        float, Option(help="Gradients are clipped to it; 0: never.", min=0)
    ] = 1.0
    batch_tokens: Annotated[
        int | Literal["auto"],
        Option(
            help="Tokens of an optimiser step, over all processes.", min=1, show_default=_BY_TASK
        ),
    ] = "auto"
    micro_batch_tokens: Annotated[
        int | Literal["auto"], Option(help="Tokens of one forward of one process.", min=1)
    ] = "auto"
    max_steps: Annotated[int, Option(help="Optimiser steps; 0: by --epochs.", min=0)] = 0
    epochs: Annotated[
        int | Literal["auto"],
        Option(help="Passes over the cache.", min=1, show_default=_BY_TASK),
    ] = "auto"
    eval_every: Annotated[
        int, Option(help="Steps between evaluations; 0: only at the end.", min=0)
    ] = 0
    save_every: Annotated[int, Option(help="Steps between checkpoints; 0: at the end.", min=0)] = 0
    log_every: Annotated[int, Option(help="Steps between looks at the losses.", min=1)] = 10
    keep_checkpoints: Annotated[int, Option(help="Checkpoints kept.", min=1)] = 2
    early_stopping_patience: Annotated[
        int,
        Option(
            help="Evaluations without a better metric before the end, and the model of the best "
            "one is what is saved; 0: never, and the last model is saved.",
            min=0,
        ),
    ] = 0
    early_stopping_metric: Annotated[
        EvalMetric,
        Option(
            help="What early stopping and the best checkpoint look at; metric: the main one of the "
            "task, such as accuracy or entity F1."
        ),
    ] = "loss"
    generate_rows: Annotated[
        int,
        Option(
            help="Held-out rows that the student writes a text for at the end, scored against "
            "their references (seq2seq-lm); 0: none.",
            min=0,
        ),
    ] = 0
    num_beams: Annotated[
        int, Option(help="Beams of generation.", min=1, read_when={"generate_rows": (SET,)})
    ] = 1
    max_new_tokens: Annotated[
        int, Option(help="Tokens of a written text.", min=1, read_when={"generate_rows": (SET,)})
    ] = 128
    seed: Annotated[int, Option(help="Seed of initialisation, order and dropout.", min=0)] = 0
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        Option(help="bfloat16: mixed precision over float32 weights."),
    ] = "auto"
    device: Annotated[Literal["auto", "cpu"], Option(help="cpu: even where there is a GPU.")] = (
        "auto"
    )
    compile: Annotated[bool, Option(help="torch.compile the student.")] = False
    gradient_checkpointing: Annotated[bool, Option(help="Less memory, more compute.")] = False
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
    dropout: Annotated[
        float | None,
        Option(
            help="Dropout of the student: every number in its config whose name ends in dropout, "
            "dropout_prob, dropout_rate or pdrop.",
            min=0,
            max=0.95,
            show_default="the student's own",
        ),
    ] = None
    threads: Annotated[int, Option(help="Threads that decode the cache.", min=1, max=64)] = 2
    report_to: Annotated[
        Literal["none", "tensorboard", "wandb", "trackio"], Option(help="Experiment tracker.")
    ] = "none"
    settings: Annotated[
        tuple[str, ...],
        Option(help="Any other TrainingArguments field, key=value. Repeatable.", flag="--set"),
    ] = ()

    def __post_init__(self) -> None:
        check_bounds(self)
        if not self.cache:
            raise ConfigError("--cache is missing: name the folder of a cache")
        _ = self.cache_weights  # refuses what is no weight
        _ = self.loss_spec  # refuses combinations that have no loss
        self._check_schedule()
        if not (self.uses_soft_loss or self.uses_hard_loss or self.uses_hidden_loss):
            raise ConfigError(
                "--soft-weight, --hard-weight and --hidden-weight are all 0: nothing to learn from"
            )
        if self.label_smoothing and not self.uses_hard_loss:
            raise ConfigError(
                "--label-smoothing is only read with a hard loss, but --hard-weight is 0: give it "
                "a weight or leave this one out"
            )
        if self.early_stopping_patience and not (self.validation_cache and self.eval_every):
            raise ConfigError("--early-stopping-patience needs --validation-cache and --eval-every")
        if self.generate_rows and self.validation_cache is None:
            raise ConfigError("--generate-rows needs --validation-cache")
        if len(self.hidden_map) > 1 and {"last", "uniform"} & set(self.hidden_map):
            raise ConfigError(
                f"--hidden-map {' '.join(self.hidden_map)}: last and uniform each stand alone"
            )
        for pair in self.hidden_map:
            if pair not in ("last", "uniform"):
                self._layer_pair(pair)

    @property
    def cache_paths(self) -> tuple[Path, ...]:
        """The folders that --cache names, without weights."""
        return tuple(_path_and_weight(given)[0] for given in self.cache)

    @property
    def cache_weights(self) -> tuple[float, ...]:
        """A weight for each cache, 1 where none is given; empty where there is nothing to weigh."""
        weights = [_path_and_weight(given)[1] for given in self.cache]
        if len(weights) == 1 or all(weight is None for weight in weights):
            return ()
        return tuple(1.0 if weight is None else weight for weight in weights)

    @property
    def loss_spec(self) -> LossSpec:
        """The soft loss these options ask for."""
        return LossSpec(
            soft_loss=self.soft_loss,
            tail=self.tail,
            temperature=self.temperature,
            jsd_beta=self.jsd_beta,
            label_smoothing=self.label_smoothing,
        )

    def with_recipe(self, usual: Recipe) -> "TrainConfig":
        """The same with a usual number wherever it said auto in place of one of `Recipe`."""
        rate, epochs, decay = self.learning_rate, self.epochs, self.weight_decay
        tokens, warmup = self.batch_tokens, self.warmup_ratio
        return replace(
            self,
            learning_rate=usual.learning_rate if rate == "auto" else rate,
            epochs=usual.epochs if epochs == "auto" else epochs,
            batch_tokens=usual.batch_tokens if tokens == "auto" else tokens,
            weight_decay=usual.weight_decay if decay == "auto" else decay,
            warmup_ratio=usual.warmup_ratio if warmup == "auto" else warmup,
        )

    @property
    def recipe(self) -> Recipe:
        """The numbers to train by; `with_recipe` has left none open."""
        assert self.learning_rate != "auto"
        assert self.epochs != "auto"
        assert self.batch_tokens != "auto"
        assert self.weight_decay != "auto"
        assert self.warmup_ratio != "auto"
        return Recipe(
            learning_rate=self.learning_rate,
            epochs=self.epochs,
            batch_tokens=self.batch_tokens,
            weight_decay=self.weight_decay,
            warmup_ratio=self.warmup_ratio,
        )

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

    @property
    def scheduled(self) -> dict[str, tuple[float, float]]:
        """First and last value of everything that has an end value; empty: all is constant."""
        ends = {
            "temperature": (self.temperature, self.temperature_end),
            "soft_weight": (self.soft_weight, self.soft_weight_end),
            "hard_weight": (self.hard_weight, self.hard_weight_end),
            "hidden_weight": (self.hidden_weight, self.hidden_weight_end),
        }
        return {name: (start, end) for name, (start, end) in ends.items() if end is not None}

    @property
    def uses_soft_loss(self) -> bool:
        """Whether it has a weight at any step."""
        return max(self.soft_weight, self.soft_weight_end or 0) > 0

    @property
    def uses_hard_loss(self) -> bool:
        """Whether it has a weight at any step."""
        return max(self.hard_weight, self.hard_weight_end or 0) > 0

    @property
    def uses_hidden_loss(self) -> bool:
        """Whether it has a weight at any step."""
        return max(self.hidden_weight, self.hidden_weight_end or 0) > 0

    def layer_pairs(self, cached: tuple[int, ...], blocks: int) -> tuple[tuple[int, int], ...]:
        """(teacher layer, student layer) for the hidden loss; empty where it has no weight.

        `cached` are the layers of the cache, `blocks` the number of the student's. With `uniform`
        the i-th of L cached layers, from 1 and by depth, goes to the student's block
        ceil(i blocks / L) - 1, counted from 0; the final state goes to the final state.
        """
        if not self.uses_hidden_loss:
            return ()
        by_depth = sorted(cached or (-1,), key=lambda layer: (layer == -1, layer))
        if self.hidden_map == ("last",):
            return ((by_depth[-1], -1),)
        if self.hidden_map == ("uniform",):
            return self._uniform(by_depth, blocks)
        pairs = tuple(self._layer_pair(pair) for pair in self.hidden_map or ("-1:-1",))
        for teacher, student in pairs:
            if not -1 <= student < blocks:
                raise ConfigError(
                    f"--hidden-map {teacher}:{student}: the student has blocks 0 to {blocks - 1} "
                    "(-1: its final state)"
                )
        return pairs

    def _uniform(self, by_depth: list[int], blocks: int) -> tuple[tuple[int, int], ...]:
        count = len(by_depth)
        if count > blocks + (by_depth[-1] == -1):
            raise ConfigError(
                f"--hidden-map uniform: {count} cached layers are more than the student's {blocks} "
                "blocks: name pairs, such as 11:5"
            )
        places = [-(-i * blocks // count) - 1 for i in range(1, count + 1)]
        pairs = zip(by_depth, places, strict=True)
        return tuple((layer, -1 if layer == -1 else place) for layer, place in pairs)

    def _check_schedule(self) -> None:
        if self.loss_schedule != "constant" and not self.scheduled:
            raise ConfigError(
                f"--loss-schedule {self.loss_schedule}: nothing changes over the run. Give an end "
                "value with --soft-weight-end, --hard-weight-end, --hidden-weight-end or "
                "--temperature-end."
            )
        if self.temperature_end is None:
            return
        _ = replace(self.loss_spec, temperature=self.temperature_end)  # refuses mse at T != 1
        if self.ensemble:
            raise ConfigError(
                "--temperature-end with --ensemble: teachers are tempered and mixed while blocks "
                "are read, long before their step is known. Use one --temperature for the run."
            )

    def _layer_pair(self, pair: str) -> tuple[int, int]:
        teacher, _, student = pair.partition(":")
        try:
            return int(teacher), int(student)
        except ValueError:
            raise ConfigError(
                f"--hidden-map {pair}: expected T:S, such as -1:-1 or 11:5, or last, or uniform"
            ) from None


_LIGHTEST, _HEAVIEST = 1e-6, 1e6  # of weights: more would make an epoch of any cache endless


def _path_and_weight(given: Path) -> tuple[Path, float | None]:
    """DIR or DIR=WEIGHT: a number behind the last `=` is a weight, anything else part of the name.

    A folder whose own name ends so is named with a weight behind it: `runs/lr=2=1`.
    """
    path, equals, number = str(given).rpartition("=")
    try:
        weight = float(number) if equals else None
    except ValueError:
        weight = None
    if weight is None:
        return given, None
    if not path or math.isnan(weight) or not _LIGHTEST <= weight <= _HEAVIEST:
        raise ConfigError(
            f"--cache {given}: expected DIR or DIR=WEIGHT with a weight from {_LIGHTEST:g} to "
            f"{_HEAVIEST:,.0f}. A folder whose own name ends in =NUMBER needs a weight behind it: "
            f"{given}=1"
        )
    return Path(path), weight


_WORST_ON_A_PAGE = 20


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
class StatusConfig:
    """`train-student status`."""

    run: Annotated[Path, Option(help="Folder of a run (its --out).", argument=True)]
    json: Annotated[bool, Option(help="Print one JSON object.")] = False

    def __post_init__(self) -> None:
        check_bounds(self)


ExportFormat = Literal["safetensors", "int8", "onnx"]


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
