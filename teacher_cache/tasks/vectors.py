"""Texts to rows whose hidden states are wanted, and no prediction.

With a pooled vector a text is one row, cut to the longest length, as models of sentence vectors cut
it; with the states of its tokens it is as many rows as it needs.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.format.manifest import Manifest
from shared.format.schema import ROW_CHUNK_BITS
from shared.tasks import Pooling
from teacher_cache.tasks.base import RowContext, TeacherTask
from teacher_cache.tasks.masked import chunks
from teacher_cache.tasks.rows import NO_LABEL, TrainingRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class VectorTask(TeacherTask):
    """What a model makes of a text is kept: its hidden states, or one vector of them."""

    head = "none"
    fills_rows = True
    predicts = False

    def build_rows(
        self, documents: Iterable[tuple[int, Any]], context: RowContext, counters: Counter[str]
    ) -> Iterator[TrainingRow]:
        length = context.preprocessing.max_length
        return build(documents, context.tokenizer, length, context.pooling, counters)

    def options_like(self, old: Manifest) -> dict[str, Any]:
        return {"pooling": old.hidden.pooling} if old.task == self.name else {}


def build(
    documents: Iterable[tuple[int, str]],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    pooling: Pooling,
    counters: Counter[str],
) -> Iterator[TrainingRow]:
    """Rows of the given (index, text) pairs, in order; what is left out is counted."""
    special = np.array(tokenizer.all_special_ids, np.int64)
    for index, chunk, ids_T in chunks(documents, tokenizer, max_length, counters):
        if pooling == "none":
            places_P = np.flatnonzero(~np.isin(ids_T, special))
        elif chunk:
            continue
        else:
            places_P = np.zeros(1, np.int64)
        if not len(places_P):
            counters["rows_without_targets"] += 1
            continue
        yield TrainingRow(
            row_id=index << ROW_CHUNK_BITS | chunk,
            input_ids=ids_T,
            segments=(len(ids_T),),
            supervised=places_P.astype(np.int32),
            labels=np.full(len(places_P), NO_LABEL, np.int32),
        )
