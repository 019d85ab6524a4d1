"""Documents to rows of a causal language model: tokens with BOS and EOS, cut, packed if asked for.

Of a text every token but the first is predicted; of a conversation what the assistant says.

Rows are built inside a shard from the shard's own documents, so that a shard depends on nothing but
the manifest and its number. A chunk of a long document neither sees nor predicts the next chunk.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.errors import CorpusError
from shared.format.manifest import Preprocessing
from shared.format.schema import ROW_CHUNK_BITS
from teacher_cache.corpus.chat import (
    encode_conversation,
    encode_exchange,
    split_answer,
    written_prompt,
)
from teacher_cache.corpus.documents import Conversation, Exchange, Written
from teacher_cache.tasks.base import AskedSource, RowContext, TeacherTask
from teacher_cache.tasks.rows import TrainingRow, document_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Document = str | Conversation | Exchange | Written

_TOKENIZE_AT_ONCE = 256  # documents
_OPEN_ROWS = 32  # rows that packing may still add to; more fill little better and cost time


class CausalTask(TeacherTask):
    """Every next token of a text, or of what an assistant says, is predicted."""

    head = "next-token"

    def build_rows(
        self, documents: Iterable[tuple[int, Any]], context: RowContext, counters: Counter[str]
    ) -> Iterator[TrainingRow]:
        return build(documents, context.tokenizer, context.preprocessing, counters)

    def sources(
        self,
        documents: Sequence[tuple[int, Any]],
        tokenizer: "PreTrainedTokenizerBase",
        preprocessing: Preprocessing,
        counters: Counter[str],
    ) -> list[AskedSource]:
        return [_prompt(each, tokenizer, preprocessing, counters) for each in documents]


def build(
    documents: Iterable[tuple[int, Document]],
    tokenizer: "PreTrainedTokenizerBase",
    preprocessing: Preprocessing,
    counters: Counter[str],
) -> Iterator[TrainingRow]:
    """Rows of the given (index, document) pairs, in order; what is left out is counted."""
    chunks = _chunks(documents, tokenizer, preprocessing.max_length, counters)
    return _pack(chunks, preprocessing.max_length) if preprocessing.pack else chunks


def _chunks(
    documents: Iterable[tuple[int, Document]],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    counters: Counter[str],
) -> Iterator[TrainingRow]:
    for index, tokens in _tokenized(documents, tokenizer):
        counters["documents"] += 1
        ids, predicted = tokens.input_ids, tokens.predicted
        if not len(ids):
            counters["empty_documents"] += 1
            continue
        counters["cut_documents"] += len(ids) > max_length
        for chunk, start in enumerate(range(0, len(ids), max_length)):
            part = ids[start : start + max_length]
            if len(part) < 2:  # a lone token has nothing to predict
                counters["lone_tokens"] += 1
                continue
            supervised = None
            if predicted is not None:
                # A chunk does not predict its first token: what comes before is not seen.
                supervised = np.flatnonzero(predicted[start + 1 : start + max_length])
                if not len(supervised):
                    counters["rows_without_targets"] += 1
                    continue
                supervised = supervised.astype(np.int32)
            row_id, sizes = index << ROW_CHUNK_BITS | chunk, (len(part),)
            yield TrainingRow(row_id, part, sizes, supervised, reference=tokens.reference)


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A document's ids i32 [T], and which of them are predicted, bool [T]; None: all but one."""

    input_ids: np.ndarray
    predicted: np.ndarray | None = None
    reference: Any = None


def _tokenized(
    documents: Iterable[tuple[int, Document]], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[int, _Tokens]]:
    iterator = iter(documents)
    while some := list(islice(iterator, _TOKENIZE_AT_ONCE)):
        texts = [document for _, document in some if isinstance(document, str)]
        encoded = iter(_between_ends(texts, tokenizer))
        for index, document in some:
            if isinstance(document, str):
                yield index, _Tokens(next(encoded))
            elif isinstance(document, Written):
                yield index, _of_written(document)
            else:
                yield index, _spoken(document, tokenizer, f"document {index}")


def _of_written(document: Written) -> _Tokens:
    """Only what the teacher wrote itself is predicted, not what it read."""
    source, tokens = document.source_ids, document.tokens
    predicted = np.arange(len(source) + len(tokens)) >= len(source)
    ids = np.array([*source, *tokens], np.int32)
    return _Tokens(ids, predicted, list(document.references))


def _between_ends(texts: list[str], tokenizer: "PreTrainedTokenizerBase") -> Iterator[np.ndarray]:
    if not texts:
        return
    ends = document_ends(tokenizer)
    for tokens in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
        yield np.array([*ends.bos, *tokens, *ends.eos] if tokens else [], np.int32)


def _spoken(
    document: Conversation | Exchange, tokenizer: "PreTrainedTokenizerBase", where: str
) -> _Tokens:
    if isinstance(document, Exchange) and tokenizer.chat_template is None:
        ends = document_ends(tokenizer)
        spoken = encode_exchange(document, tokenizer, (ends.bos, ends.eos))
        return _Tokens(spoken.input_ids, spoken.by_assistant)
    if tokenizer.chat_template is None:
        raise _no_template(tokenizer)
    conversation = document.conversation() if isinstance(document, Exchange) else document
    if not conversation.messages:
        return _Tokens(np.zeros(0, np.int32))
    spoken = encode_conversation(conversation, tokenizer, where)
    return _Tokens(spoken.input_ids, spoken.by_assistant)


def _pack(chunks: Iterable[TrainingRow], max_length: int) -> Iterator[TrainingRow]:
    """Best fit: a chunk joins the fullest open row it fits in; full and oldest rows leave first."""
    open_rows: list[list[TrainingRow]] = []
    used: list[int] = []
    for chunk in chunks:
        size = len(chunk.input_ids)
        fitting = [i for i, tokens in enumerate(used) if tokens + size <= max_length]
        if fitting:
            best = max(fitting, key=lambda i: (used[i], -i))
            open_rows[best].append(chunk)
            used[best] += size
        else:
            open_rows.append([chunk])
            used.append(size)
        full = next((i for i, tokens in enumerate(used) if tokens > max_length - 2), None)
        if full is None and len(open_rows) > _OPEN_ROWS:
            full = 0
        if full is not None:
            used.pop(full)
            yield _joined(open_rows.pop(full))
    yield from map(_joined, open_rows)


def _joined(parts: list[TrainingRow]) -> TrainingRow:
    sizes = [len(part.input_ids) for part in parts]
    starts = np.cumsum([0, *sizes[:-1]])
    supervised = [
        part.supervised + start
        for part, start in zip(parts, starts, strict=True)
        if part.supervised is not None
    ]
    return TrainingRow(
        parts[0].row_id,
        np.concatenate([part.input_ids for part in parts]),
        tuple(sizes),
        np.concatenate(supervised).astype(np.int32) if supervised else None,
    )


def _prompt(
    numbered: tuple[int, Any],
    tokenizer: "PreTrainedTokenizerBase",
    preprocessing: Preprocessing,
    counters: Counter[str],
) -> AskedSource:
    """The prompt of a conversation or an exchange, cut in front, so that one row holds the answer.

    Together with --max-new-tokens it has at most --max-length tokens.
    """
    index, document = numbered
    where = f"document {index}"
    answer: tuple[str, ...]
    bos: tuple[int, ...] = ()
    if isinstance(document, Exchange):
        answer = (document.completion,) if document.completion else ()
        before = Conversation(({"role": "user", "content": document.prompt},))
        empty = not document.prompt.strip()
    else:
        before, answer = split_answer(document)
        empty = not before.messages
    if empty:
        return [], answer
    if tokenizer.chat_template is not None:
        text = written_prompt(before, tokenizer, where)
    elif isinstance(document, Exchange):
        prompt, bos = document.prompt, document_ends(tokenizer).bos
        text = prompt if prompt[-1:].isspace() else prompt + "\n"
    else:
        raise _no_template(tokenizer)
    ids = [*bos, *tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
    assert preprocessing.generation is not None  # nothing is written without
    room = preprocessing.max_length - preprocessing.generation.max_new_tokens
    counters["cut_sources"] += len(ids) > room
    return ids[-room:], answer


def _no_template(tokenizer: "PreTrainedTokenizerBase") -> CorpusError:
    return CorpusError(
        f"{tokenizer.name_or_path}: this tokenizer has no chat template, which a column of "
        "messages needs. Name another --tokenizer, or put a chat_template.jinja beside it."
    )
