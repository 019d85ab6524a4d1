"""Texts, or pairs of them, with their labels to rows, for sequence classification.

A row has one position for the text as a whole, or one for each output of the head, where each label
is or is not, or is a number. Texts without labels have their positions all the same.

P positions of a row.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.format.manifest import Manifest
from shared.format.schema import ROW_CHUNK_BITS
from shared.rows import Row
from shared.tasks import ProblemType, TaskName
from teacher_cache.corpus.documents import Labelled
from teacher_cache.tasks.base import RowContext, TeacherTask, Vocabulary
from teacher_cache.tasks.class_labels import PROBLEMS
from teacher_cache.tasks.rows import TrainingRow
from teacher_cache.tasks.said import SAID

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from teacher_cache.config import CaptureConfig


class LabelledTask(TeacherTask):
    """Labels of a text as a whole are predicted; `problem_type` says what they are to it."""

    head = "row-labels"
    names_classes = True
    keeps_every_class = True
    has_problem_types = True
    shows_positions = False

    def __init__(self, name: TaskName, problem_type: ProblemType = "single_label") -> None:
        super().__init__(name)
        self.problem_type = problem_type
        self.problem = PROBLEMS[problem_type]
        self.numbers = self.problem.numbers
        self.positions_are_outputs = self.problem.position_per_output
        self.fewest_labels = self.problem.fewest_labels

    def of_problem(self, problem_type: ProblemType) -> TeacherTask:
        return LabelledTask(self.name, problem_type)

    def build_rows(
        self, documents: Iterable[tuple[int, Any]], context: RowContext, counters: Counter[str]
    ) -> Iterator[TrainingRow]:
        return build(
            documents,
            context.tokenizer,
            context.preprocessing.max_length,
            context.labels,
            counters,
            self.problem_type,
            labelled=context.labelled,
        )

    def labelled(self, roles: Collection[str]) -> bool:
        return "label" in roles

    def options_like(self, old: Manifest) -> dict[str, Any]:
        return {"problem_type": old.problem_type}

    def num_classes(self, config: "CaptureConfig", num_labels: int, vocabulary: Vocabulary) -> int:
        return self.problem.classes(num_labels)

    def stores_positions(self, roles: Collection[str]) -> bool:
        return not self.positions_are_outputs

    def shown(
        self, row: Row, manifest: Manifest, tokenizer: "PreTrainedTokenizerBase"
    ) -> dict[str, Any]:
        said = SAID[self.problem_type](row, manifest)
        return {**super().shown(row, manifest, tokenizer), "said": said}


def build(
    documents: Iterable[tuple[int, Labelled | str]],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    labels: Sequence[str],
    counters: Counter[str],
    problem_type: ProblemType = "single_label",
    *,
    labelled: bool = True,
) -> Iterator[TrainingRow]:
    """Rows of the given (index, document) pairs, in order; what is left out is counted.

    Without `labelled` every row has negative labels, or NaN where they would be numbers.
    """
    problem, numbers = PROBLEMS[problem_type], {name: number for number, name in enumerate(labels)}
    unknown = problem.unknown(len(labels))
    for index, document in documents:
        counters["documents"] += 1
        if isinstance(document, str):
            document = Labelled(document, None, None)
        answer: np.ndarray | None = unknown
        if labelled:
            answer = problem.answer(document.label, numbers, f"document {index}")
        if answer is None:
            counters["unlabelled_documents"] += 1
        else:
            yield _labelled_row(
                index,
                document,
                answer,
                tokenizer,
                max_length,
                counters,
                of_outputs=problem.position_per_output,
            )


def _labelled_row(
    index: int,
    document: Labelled,
    answer: np.ndarray,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    counters: Counter[str],
    *,
    of_outputs: bool,
) -> TrainingRow:
    texts = [document.text] if document.text_pair is None else [document.text, document.text_pair]
    encoded = tokenizer(*texts, truncation=False, verbose=False)
    if len(encoded["input_ids"]) > max_length:
        counters["cut_documents"] += 1
        encoded = tokenizer(*texts, truncation=True, max_length=max_length, verbose=False)
    ids = np.array(encoded["input_ids"], np.int32)
    types = encoded.get("token_type_ids") if document.text_pair is not None else None
    return TrainingRow(
        row_id=index << ROW_CHUNK_BITS,
        input_ids=ids,
        segments=(len(ids),),
        supervised=np.arange(len(answer), dtype=np.int32),
        labels=answer,
        token_type_ids=None if types is None else np.array(types, np.int32),
        of_outputs=of_outputs,
    )
