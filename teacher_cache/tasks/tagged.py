"""Tagged words to rows, for token classification.

Special tokens stand where the tokenizer puts them and have no target. Of a word that becomes
several tokens the first one has its tag; a word is never cut between two rows. Documents without
tags have their positions all the same.

T tokens of a row, P of them with a target.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.errors import CorpusError
from shared.format.schema import ROW_CHUNK_BITS
from shared.rows import Row
from teacher_cache.corpus.documents import Tagged
from teacher_cache.tasks.base import RowContext, TeacherTask, around
from teacher_cache.tasks.class_labels import class_number
from teacher_cache.tasks.rows import NO_LABEL, TrainingRow, special_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TaggedTask(TeacherTask):
    """The class of each word is predicted at its first token."""

    head = "token-labels"
    names_classes = True
    keeps_every_class = True

    def build_rows(
        self, documents: Iterable[tuple[int, Any]], context: RowContext, counters: Counter[str]
    ) -> Iterator[TrainingRow]:
        length, labels = context.preprocessing.max_length, context.labels
        known = context.labelled
        return build(documents, context.tokenizer, length, labels, counters, labelled=known)

    def labelled(self, roles: Collection[str]) -> bool:
        return "tags" in roles

    def shown_around(
        self, row: Row, position: int, tokenizer: "PreTrainedTokenizerBase"
    ) -> dict[str, str]:
        own = tokenizer.decode([int(row.input_ids[position])])
        return {"of": own, "around": around(row, position, tokenizer)}


def build(
    documents: Iterable[tuple[int, Tagged]],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    labels: Sequence[str],
    counters: Counter[str],
    *,
    labelled: bool = True,
) -> Iterator[TrainingRow]:
    """Rows of the given (index, document) pairs, in order; what is left out is counted.

    Without `labelled` every row has negative labels.
    """
    numbers = {name: number for number, name in enumerate(labels)} if labelled else None
    for index, document in documents:
        counters["documents"] += 1
        yield from _tagged_rows(index, document, tokenizer, max_length, numbers, counters)


def _tagged_rows(
    index: int,
    document: Tagged,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    numbers: Mapping[str, int] | None,
    counters: Counter[str],
) -> Iterator[TrainingRow]:
    """As many rows as the words need, cut between two words. Without `numbers` no tag is read."""
    where = f"document {index}"
    if len(document.tokens) != len(document.tags):
        raise CorpusError(
            f"{where}: {len(document.tokens)} tokens but {len(document.tags)} tags; expected one "
            "tag for each token"
        )
    before, after = special_ends(tokenizer)
    room = max_length - len(before) - len(after)
    words = _pieces(document.tokens, tokenizer)
    counters["words_without_tokens"] += len(document.tokens) - len(words)
    chunk = 0
    for some in _cut(words, room, counters):
        ids, supervised, labels = list(before), [], []
        for word, pieces in some:
            number: int | None = NO_LABEL
            if numbers is not None:
                number = class_number(document.tags[word], numbers, f"{where}, token {word}")
            if number is not None:
                supervised.append(len(ids))
                labels.append(number)
            ids += pieces
        ids += after
        if not labels:
            counters["rows_without_targets"] += 1
        else:
            yield TrainingRow(
                row_id=index << ROW_CHUNK_BITS | chunk,
                input_ids=np.array(ids, np.int32),
                segments=(len(ids),),
                supervised=np.array(supervised, np.int32),
                labels=np.array(labels, np.int32),
            )
        chunk += 1
    counters["cut_documents"] += chunk > 1


def _pieces(
    tokens: Sequence[str], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[int, list[int]]]:
    """Number and token ids of each word that has any."""
    if not tokens:
        return []
    encoded = tokenizer(
        list(tokens), is_split_into_words=True, add_special_tokens=False, verbose=False
    )
    pairs = zip(encoded.word_ids(), encoded["input_ids"], strict=True)
    return [(word, [piece for _, piece in some]) for word, some in groupby(pairs, lambda p: p[0])]


def _cut(
    words: Sequence[tuple[int, list[int]]], room: int, counters: Counter[str]
) -> Iterator[list[tuple[int, list[int]]]]:
    """Consecutive words, together at most `room` tokens; a longer word loses its last tokens."""
    some: list[tuple[int, list[int]]] = []
    used = 0
    for word, pieces in words:
        counters["cut_words"] += len(pieces) > room
        pieces = pieces[:room]
        if used + len(pieces) > room:
            yield some
            some, used = [], 0
        some.append((word, pieces))
        used += len(pieces)
    if some:
        yield some
