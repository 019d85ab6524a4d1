"""The options of `cache-teacher run` and `plan` as a whole, and which of them go together."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from shared.errors import ConfigError
from shared.format.layouts import LAYOUTS, RowLayout
from shared.options import Option, check_bounds, group
from shared.tasks import TASKS, Pooling, Task
from teacher_cache.config.corpus import CorpusOptions
from teacher_cache.config.execution import ExecutionOptions
from teacher_cache.config.generation import GenerationOptions
from teacher_cache.config.hidden import HiddenOptions
from teacher_cache.config.job import JobOptions
from teacher_cache.config.labels import LabelOptions
from teacher_cache.config.rows import RowOptions
from teacher_cache.config.targets import TargetOptions
from teacher_cache.config.teacher import TeacherOptions


@dataclass(frozen=True, kw_only=True)
class CaptureConfig(
    JobOptions,
    TargetOptions,
    CorpusOptions,
    RowOptions,
    LabelOptions,
    HiddenOptions,
    GenerationOptions,
    TeacherOptions,
    ExecutionOptions,
):
    """`cache-teacher run` and `plan`: which teacher, which corpus, what to keep."""

    def __post_init__(self) -> None:
        check_bounds(self)
        if self._task.named_classes:
            self._check_label_space()
        if self._task.masks and self.pack:
            raise ConfigError(
                f"--pack is not there for --task {self.task}: in a packed row the documents of a "
                "bidirectional model see each other. Rows of similar length are batched anyway."
            )
        if self.pack and self._layout.has_decoder:
            raise ConfigError(f"--pack is not there for --task {self.task}")
        if self._layout.classes_are_tokens:
            self._check_windows()
        if self.generate:
            self._check_generation()
        if self._task.keeps_states:
            self._check_states()
        elif self.label_only:
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
        if self.unlabelled and self.label_only:
            raise ConfigError(
                "--unlabelled with --targets none: nothing would be left to learn from. Give a "
                "--teacher, or leave one of the two out."
            )
        kind = self.asked_kind
        if kind is not None and kind.has_targets and not kind.every_temperature:
            raise ConfigError(
                f"--targets {self.targets}: --task {self.task} keeps every class, which is dense, "
                "or hard labels only, which is none"
            )
        asked = self.asked_problem
        if asked is not None and asked.numbers and (self.asks_for_every_class or self.temperature):
            raise ConfigError(
                "--targets dense and --temperature are of probabilities: --problem-type regression "
                "keeps the teacher's numbers. Leave them out"
            )
        if self.pack:
            raise ConfigError(f"--pack is not there for --task {self.task}")
        if self.hidden_layers and self._layout.of_rows:
            raise ConfigError(
                f"--hidden-layers is not there for --task {self.task}, whose targets are of a row "
                "as a whole: leave it out"
            )

    def _check_states(self) -> None:
        asks = self.asked_kind is not None and self.asked_kind.has_targets
        if asks or self.temperature or self.top_k is not None:
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

    def _check_windows(self) -> None:
        if self.asked_kind is not None and self.asked_kind.sampled:
            raise ConfigError(
                f"--targets sample: --task {self.task} looks for the likeliest span, of which a "
                "sample says nothing. Use dense, the default, or topk or adaptive."
            )
        if self.pack or self.hidden_layers:
            raise ConfigError(f"--pack and --hidden-layers are not there for --task {self.task}")

    def _check_generation(self) -> None:
        if self.label_only:
            raise ConfigError("--generate keeps targets beside what is written: not --targets none")
        if self.pack:
            raise ConfigError("--pack is not there with --generate: every row has its reference")
        if self.num_beams > 1 and self.sample_temperature > 0:
            raise ConfigError(
                "--sample-temperature draws one token after the other: not with --num-beams above 1"
            )
        # With --like the length of a row is that of its cache; a pair has a length of its own.
        in_one_row = self._task.is_written and not self._layout.has_decoder
        if in_one_row and not self.like and self.max_new_tokens >= self.max_length:
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
    def _task(self) -> Task:
        return TASKS[self.task]

    @property
    def _layout(self) -> RowLayout:
        return LAYOUTS[self._task.layout]

    @property
    def uses_teacher(self) -> bool:
        """Whether anything is asked of a teacher; else its tokenizer alone is read."""
        return not self.label_only or self._task.keeps_states

    @property
    def layers(self) -> tuple[int, ...]:
        """The hidden layers to keep, ascending."""
        default = (-1,) if self._task.keeps_states else ()
        return tuple(sorted(set(self.hidden_layers))) or default

    @property
    def pooled(self) -> Pooling:
        """How the states of a row become one."""
        if not self._task.keeps_states:
            return "none"
        return "mean" if self.pooling == "auto" else self.pooling


@group("What plan says")
@dataclass(frozen=True, kw_only=True)
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
        if self.calibrate and self._task.keeps_states:
            raise ConfigError(
                f"--calibrate compares kinds of targets, of which --task {self.task} has none: "
                "leave it out"
            )
        if self.html is not None and not self.calibrate:
            raise ConfigError("--html draws what --calibrate measures: give both")
