"""Which module builds the rows of which task, from documents as the corpus reads them."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shared.format.manifest import Preprocessing
from shared.tasks import Pooling, ProblemType, TaskName
from teacher_cache.tasks import (
    label_rows,
    masked_rows,
    rows,
    seq2seq_rows,
    vector_rows,
    window_rows,
)
from teacher_cache.tasks.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class RowContext:
    """What rows depend on besides their documents; all of it is in the manifest."""

    task: TaskName
    tokenizer: "PreTrainedTokenizerBase"
    preprocessing: Preprocessing
    labels: tuple[str, ...]  # names of the classes of a label space
    seed: int
    problem_type: ProblemType = "single_label"
    pooling: Pooling = "none"
    labelled: bool = True


def build_rows(
    documents: Iterable[tuple[int, Any]], context: RowContext, counters: Counter[str]
) -> Iterator[Row]:
    """Rows of (index, document) pairs, in order; what is left out is counted."""
    tokenizer, preprocessing = context.tokenizer, context.preprocessing
    match context.task:
        case "causal-lm":
            return rows.build(documents, tokenizer, preprocessing, counters)
        case "masked-lm":
            return masked_rows.build(documents, tokenizer, preprocessing, counters)
        case "feature-extraction":
            length, pooling = preprocessing.max_length, context.pooling
            return vector_rows.build(documents, tokenizer, length, pooling, counters)
        case "seq2seq-lm":
            return seq2seq_rows.build(documents, tokenizer, preprocessing, counters)
        case "token-classification" | "sequence-classification":
            length, problem_type = preprocessing.max_length, context.problem_type
            return label_rows.build(
                documents,
                tokenizer,
                length,
                context.labels,
                counters,
                problem_type,
                labelled=context.labelled,
            )
        case "question-answering":
            length, stride = preprocessing.max_length, preprocessing.stride
            return window_rows.build(documents, tokenizer, length, stride, counters)
    raise ValueError(f"{context.task}: no rows are built for this task")
