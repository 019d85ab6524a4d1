"""A task in stage two: one object that answers all that training, evaluation and export ask.

A task of its own overrides what is different about it, and gets one line in `table.py`. What stands
here is what holds for most.

P positions of a row, T its tokens, C classes; N positions of several rows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from shared.cache import Cache
from shared.errors import CacheMismatch
from shared.format.manifest import Manifest
from shared.rows import Row
from shared.tasks import ProblemType
from student_train.data.arrange import SEQUENCES, Arrangement
from student_train.data.collate import MicroBatch
from student_train.loss.outputs import OF_TOKENS, Outputs
from student_train.metrics.confusion import Confusion, LabelCounts
from student_train.metrics.scores import Scores, class_scores
from student_train.recipes import ENCODERS, Recipe, Start
from student_train.tasks.samples import Reading, Sample, sequences_of

MOST_MARKED = 12  # positions of a row that are shown where all would be too many

NameOf = Callable[[int, int], str]  # of the class with this number, at this position of a row
Scored = tuple[Sample, np.ndarray]  # a sample with hard labels, and the logits there [P, C]


class Collector(Protocol):
    """Keeps what the metrics of a task are computed from, over one evaluation.

    Sums of losses are not enough for an F1: what student and teacher answered at every position is
    kept batch by batch, gathered over all processes at the end, and handed to the metrics.
    """

    def add(self, output: Mapping[str, Tensor], batch: MicroBatch) -> None:
        """Keeps what is needed of a batch and of what an attached student returned for it."""

    def numbers(self, device: torch.device) -> dict[str, Any]:
        """The metrics, the same in every process; `device` is where they talk to each other."""


@dataclass(frozen=True, slots=True)
class Served:
    """How an exported model is found and called by others.

    `tag`: what it is for, in the words of the Hub. `class_endings`: the ends of the names of its
    classes in `transformers`. `example`: what `pipeline` is called with in the model card, as
    Python; None where transformers has no such pipeline (any more).
    """

    tag: str
    class_endings: tuple[str, ...]
    example: str | None = None
    encoder_decoder: bool = False
    writes: bool = False

    def fits(self, class_name: str, *, encoder_decoder: bool) -> bool:
        """Whether a model of this class is served so."""
        possible = encoder_decoder or not self.encoder_decoder
        return possible and class_name.endswith(self.class_endings)


@dataclass(frozen=True, slots=True)
class HardLabels:
    """What the hard labels of a cache mean for logits; `names` only on a label space."""

    one_per_row: bool
    names: tuple[str, ...]


class StudentTask:
    """A task over the tokens of a row, whose student answers as a model of `transformers` does."""

    arrangement: Arrangement = SEQUENCES  # how rows become the sequences of a micro-batch
    outputs: Outputs = OF_TOKENS  # how the student's logits become those at the positions
    recipes: Mapping[Start, Recipe] = ENCODERS  # the numbers to train by, where options say auto
    brings_head: bool = False  # a student without a head for it gets a new one, trained as it is
    has_metric: bool = True  # besides loss and KL, that a run may stop early by
    writes_text: bool = False  # the student writes texts that can be scored
    has_token_positions: bool = True  # else they are of a row as a whole
    one_answer_per_row: bool = False  # the hard label, or the labels, are of the row as a whole
    chooses: bool = True  # between classes, so that two models can agree; else it says numbers
    place_of_label: int = 0  # tokens from a position to the one its label is about

    def __init__(self, *, peft_type: str | None = None, served: Served | None = None) -> None:
        """`peft_type`: what adapters say they are for; None: they wrap the model as it is."""
        self.peft_type, self.served = peft_type, served

    def of_problem(self, problem_type: ProblemType) -> "StudentTask":
        """The task, where what the labels of a row are (one, several, numbers) makes another."""
        return self

    # ---- Does a student fit (student/fit.py)

    def labels_of_head(self, config: PretrainedConfig) -> tuple[str, ...] | None:
        """The classes of a student whose head is kept; None where it does not name them."""
        return None

    def decoder_start(self, name: str) -> int | None:
        """The token that the decoder of a pretrained student starts from; None: it has none."""
        return None

    def check_lengths(self, name: str, places: int, cache: Cache) -> None:
        """Refuses a student that takes fewer positions than a row of the cache has tokens."""
        longest = int(cache.row_tokens.max(initial=0))
        if longest > places:
            raise CacheMismatch(
                f"{name}: takes {places:,} positions, but the longest row of {cache.path} has "
                f"{longest:,} tokens. Cache again with --max-length {places}, or use another "
                "student."
            )

    # ---- Building a student (student/build.py)

    def shape_config(
        self, config: PretrainedConfig, cache: Cache, *, from_scratch: bool, new_head: bool
    ) -> None:
        """Sets what the student's config must say of its head and its tokens before it is built."""

    def finish(self, student: Any, *, from_scratch: bool) -> Any:
        """The student as it is trained, after it was built."""
        return student

    def mark_exported(self, config: PretrainedConfig) -> None:
        """Says in an exported config what a checkpoint of adapters does not: it has its base's."""

    # ---- Beside the model (evaluate, run)

    def save_beside(self, folder: Path, student: Any, cache: Cache) -> None:
        """Saves what the student needs in use besides its weights."""

    def parameters_beside(self, student: Any, cache: Cache) -> int:
        """How many numbers `save_beside` saves as weights."""
        return 0

    def load_beside(self, name: str, student: Any, cache: Cache) -> None:
        """Gives a loaded student what `save_beside` saved."""

    # ---- Evaluation (evaluate/)

    def layer_pairs(self, cache: Cache) -> tuple[tuple[int, int], ...]:
        """(teacher layer, student layer) whose states an evaluation compares."""
        return ()

    def collector(self, cache: Cache, max_answer_tokens: int) -> Collector | None:
        """What collects answers for the metrics; None where sums of losses say all there is."""
        return None

    def numbers(self, sums: Mapping[str, float], cache: Cache) -> dict[str, Any]:
        """What an evaluation says from sums over all positions, at T = 1."""
        positions = int(cache.row_positions.sum())
        numbers: dict[str, Any] = {
            "positions": positions,
            "loss": sums["hard"] / positions,
            "student_entropy": sums["student_entropy"] / positions,
        }
        numbers |= self.numbers_of_loss(numbers["loss"])
        targets = cache.manifest.targets
        if cache.has_targets:
            statistics = [commit.statistics for commit in cache.commits]
            whole = targets.complete or targets.sampled
            numbers["kl" if whole else "kl_bucketed"] = sums["soft"] / positions
            numbers["targets"] = targets.text
            numbers["agreement"] = sums["agreement"] / positions
            numbers["teacher_loss"] = -sum(s["sum_label_logprob"] for s in statistics) / positions
            numbers["teacher_entropy"] = sum(s["sum_entropy"] for s in statistics) / positions
        return numbers

    def numbers_of_loss(self, loss: float) -> dict[str, float]:
        """Other names of a mean cross-entropy in nats."""
        return {}

    # ---- Pages and worst rows (evaluate/details.py)

    def check_shown(self, cache: Cache) -> None:
        """Refuses --html and --worst where no answer is right or wrong."""

    def confusion(self, manifest: Manifest) -> Confusion | LabelCounts | None:
        """What counts which class is taken for which; None where classes have no names."""
        return None

    def shown_places(self, answers: Mapping[str, np.ndarray], row: Row) -> np.ndarray:
        """The positions of a row that are listed: those of the highest loss."""
        highest = np.argsort(-answers["loss"], kind="stable")[:MOST_MARKED]
        return np.sort(highest)

    def name_of(
        self, manifest: Manifest, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> NameOf:
        """How a class is called; over a vocabulary as it is written. `texts` are of the row [T]."""
        return lambda place, number: str(tokenizer.decode([number]))

    def tokens_about(
        self, row: Row, place: int, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[int, int] | None:
        """First token that a position is about, and the one behind the last; None: the row."""
        first = int(row.positions[place]) + self.place_of_label
        return first, first + 1

    # ---- Export (export/)

    def samples(self, row: Row, number: int, reading: Reading) -> Iterator[Sample]:
        """The sequences of a row for the checks of an export; packed documents apart."""
        yield from sequences_of(row, number, row.segments, reading)

    def hard_labels(self, manifest: Manifest, config: PretrainedConfig) -> HardLabels | None:
        """None where labels say nothing about the logits one token, or one row, at a time."""
        if not manifest.labelled or config.is_encoder_decoder:
            return None
        return HardLabels(self.one_answer_per_row, manifest.labels)

    def choices(self, logits_NC: np.ndarray) -> np.ndarray:
        """What a model chooses: the most probable class [N]."""
        best_N: np.ndarray = logits_NC.argmax(-1)
        return best_N

    def scores(self, answers: Sequence[Scored], labels: HardLabels | None) -> Scores:
        """The loss and the main metric of a model, from its logits at labelled positions."""
        if labels is None or not answers:
            return Scores()
        return class_scores(
            np.concatenate([np.full(len(sample.labels), sample.row) for sample, _ in answers]),
            np.concatenate([sample.labels for sample, _ in answers]),
            np.concatenate([logits_PC for _, logits_PC in answers]),
            labels.names,
        )
