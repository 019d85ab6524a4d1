"""Label spaces in stage two: tagged tokens, and rows with one label, with several, or with numbers.

R rows, C labels or numbers of each.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from shared.cache import Cache
from shared.errors import ConfigError
from shared.format.manifest import Manifest
from shared.rows import Row
from shared.tasks import PROBLEM_TYPES, ProblemType, is_unnamed
from student_train.data.arrange import OUTPUTS
from student_train.loss.outputs import NUMBERS, OF_ROWS, YES_OR_NO
from student_train.metrics.confusion import Confusion, LabelCounts
from student_train.metrics.scores import Scores, multi_label_scores, number_scores
from student_train.tasks.base import Collector, HardLabels, NameOf, Scored, Served, StudentTask
from student_train.tasks.heads import HeadedTask
from student_train.tasks.label_answers import LabelAnswers, MultiLabelAnswers, NumberAnswers
from student_train.tasks.samples import Reading, Sample, sequences_of


class LabelTask(HeadedTask):
    """Each position has one of the labels that the cache names."""

    def shape_head(self, config: PretrainedConfig, cache: Cache, *, is_new: bool) -> None:
        labels = cache.manifest.labels
        if is_new or not is_unnamed(labels):
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: index for index, label in enumerate(labels)}

    def labels_of_head(self, config: PretrainedConfig) -> tuple[str, ...] | None:
        return tuple(config.id2label[index] for index in range(config.num_labels))

    def collector(self, cache: Cache, max_answer_tokens: int) -> Collector | None:
        return LabelAnswers(cache)

    def confusion(self, manifest: Manifest) -> Confusion | LabelCounts | None:
        return Confusion(manifest.labels)

    def shown_places(self, answers: Mapping[str, np.ndarray], row: Row) -> np.ndarray:
        return np.arange(len(answers["loss"]))

    def name_of(
        self, manifest: Manifest, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> NameOf:
        return lambda place, number: manifest.labels[number]


class TokenLabels(LabelTask):
    """One label for each word, at its first token."""

    def tokens_about(
        self, row: Row, place: int, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[int, int] | None:
        """A tagged word goes on with what follows its first token without a space or a tag."""
        special, first = set(tokenizer.all_special_ids), int(row.positions[place])
        after = int(row.positions[place + 1]) if place + 1 < len(row.positions) else len(texts)
        end = first + 1
        while (
            end < after and not texts[end][:1].isspace() and int(row.input_ids[end]) not in special
        ):
            end += 1
        return first, end


class RowLabels(LabelTask):
    """One label for each row; what its head is for is written into its config."""

    outputs = OF_ROWS
    has_token_positions = False
    one_answer_per_row = True
    problem_type: ProblemType = "single_label"

    def __init__(self, *, peft_type: str | None = None, served: Served | None = None) -> None:
        super().__init__(peft_type=peft_type, served=served)
        self._options: dict[str, Any] = {"peft_type": peft_type, "served": served}

    def of_problem(self, problem_type: ProblemType) -> StudentTask:
        return ROW_TASKS[problem_type](**self._options)

    def shape_config(
        self, config: PretrainedConfig, cache: Cache, *, from_scratch: bool, new_head: bool
    ) -> None:
        super().shape_config(config, cache, from_scratch=from_scratch, new_head=new_head)
        config.problem_type = PROBLEM_TYPES[self.problem_type]

    def tokens_about(
        self, row: Row, place: int, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> tuple[int, int] | None:
        return None


class _RowOutputs(RowLabels):
    """Each output of the head is a position of its own: every row has all C of them."""

    arrangement = OUTPUTS

    def mark_exported(self, config: PretrainedConfig) -> None:
        config.problem_type = PROBLEM_TYPES[self.problem_type]

    def samples(self, row: Row, number: int, reading: Reading) -> Iterator[Sample]:
        yield from sequences_of(row, number, row.segments, reading, of_whole_row=True)

    def confusion(self, manifest: Manifest) -> Confusion | LabelCounts | None:
        return LabelCounts(manifest.labels)

    def shown_places(self, answers: Mapping[str, np.ndarray], row: Row) -> np.ndarray:
        """The labels that corpus, student or teacher says yes to, and that of the highest loss."""
        said_C = row.labels.numpy() == 1
        for name in {"student", "teacher"} & answers.keys():
            said_C = said_C | (answers[name] == 1)
        said_C[answers["loss"].argmax()] = True
        return np.flatnonzero(said_C)

    def name_of(
        self, manifest: Manifest, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase
    ) -> NameOf:
        return lambda place, number: f"{manifest.labels[place]}: {'yes' if number else 'no'}"


class MultiLabel(_RowOutputs):
    """Several labels for each row, each of which is yes or no."""

    outputs = YES_OR_NO
    problem_type = "multi_label"

    def collector(self, cache: Cache, max_answer_tokens: int) -> Collector | None:
        return MultiLabelAnswers(cache)

    def choices(self, logits_NC: np.ndarray) -> np.ndarray:
        """Yes or no of each label [N, C]."""
        return logits_NC > 0

    def scores(self, answers: Sequence[Scored], labels: HardLabels | None) -> Scores:
        return multi_label_scores(*_of_rows(answers)) if answers else Scores()


class Regression(_RowOutputs):
    """Numbers for each row, learnt by their squared error."""

    outputs = NUMBERS
    chooses = False
    problem_type = "regression"

    def collector(self, cache: Cache, max_answer_tokens: int) -> Collector | None:
        return NumberAnswers(cache)

    def numbers(self, sums: Mapping[str, float], cache: Cache) -> dict[str, Any]:
        """The loss is a mean squared error."""
        positions = int(cache.row_positions.sum())
        numbers: dict[str, Any] = {"positions": positions, "loss": sums["hard"] / positions}
        if cache.has_targets:
            squares = sum(commit.statistics["sum_value_squared_error"] for commit in cache.commits)
            numbers["targets"] = cache.manifest.targets.text
            numbers["mse_to_teacher"] = sums["soft"] / positions
            numbers["teacher_loss"] = squares / positions
        return numbers

    def check_shown(self, cache: Cache) -> None:
        raise ConfigError(
            f"--html and --worst: {cache.path} is of a regression. They show how sure answers are "
            "and which are wrong, and numbers are neither sure nor wrong. Leave them out: evaluate "
            "prints the errors and correlations of student and teacher."
        )

    def scores(self, answers: Sequence[Scored], labels: HardLabels | None) -> Scores:
        return number_scores(*_of_rows(answers)) if answers else Scores()


ROW_TASKS: dict[ProblemType, type[RowLabels]] = {
    "single_label": RowLabels,
    "multi_label": MultiLabel,
    "regression": Regression,
}


def problem_type_of(config: PretrainedConfig) -> ProblemType:
    """What the outputs of a row are, as the config of a model has it."""
    own = config.problem_type
    return next((ours for ours, theirs in PROBLEM_TYPES.items() if theirs == own), "single_label")


def _of_rows(answers: Sequence[Scored]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and what was said, f64 [R, C] each."""
    labels_RC = np.stack([sample.labels for sample, _ in answers]).astype(np.float64)
    return labels_RC, np.concatenate([logits for _, logits in answers]).astype(np.float64)
