"""Documents to rows: tokens with BOS and EOS, cut to --max-length, packed where asked for.

Of a text every token but the first is predicted; of a conversation what the assistant says.

Rows are built inside a shard from the shard's own documents, so that a shard depends on nothing but
the manifest and its number. A chunk of a long document neither sees nor predicts the next chunk.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.errors import CorpusError
from shared.format.manifest import Preprocessing
from shared.format.schema import ROW_CHUNK_BITS
from shared.models.tokenizer import end_of_text
from teacher_cache.corpus.chat import Conversation, Exchange, encode_conversation, encode_exchange

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Written:
    """What the teacher read and what it then wrote, in tokens; and what the corpus has instead."""

    source_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    references: tuple[str, ...]


Document = str | Conversation | Exchange | Written

_TOKENIZE_AT_ONCE = 256  # documents
_OPEN_ROWS = 32  # rows that packing may still add to; more fill little better and cost time


@dataclass(frozen=True, slots=True)
class Row:
    """One training example: `input_ids` i32 [T]; `segments` are the lengths of its parts.

    `supervised` i32 [P] are the positions with a target, where they are not all but the last of
    each segment; `labels` i32 [P] their classes, where these are not the next tokens. `reference`
    is what an answer is compared with, where a task has more to compare than labels: any JSON.
    With `of_outputs` position p is output p of the row as a whole, and no token; labels may be
    numbers, f32 [P].
    """

    row_id: int
    input_ids: np.ndarray
    segments: tuple[int, ...]
    supervised: np.ndarray | None = None
    labels: np.ndarray | None = None
    token_type_ids: np.ndarray | None = None
    reference: Any = None
    of_outputs: bool = False

    @property
    def num_positions(self) -> int:
        if self.supervised is not None:
            return len(self.supervised)
        return len(self.input_ids) - len(self.segments)

    def positions(self) -> np.ndarray:
        """Every position with a target, as an index of the row."""
        if self.supervised is not None:
            return self.supervised
        return np.delete(np.arange(len(self.input_ids)), np.cumsum(self.segments) - 1)


@dataclass(frozen=True, slots=True)
class Ends:
    """The tokens a document is put between: BOS only where the tokenizer itself adds one."""

    bos: tuple[int, ...]
    eos: tuple[int, ...]


def document_ends(tokenizer: "PreTrainedTokenizerBase") -> Ends:
    """BOS and EOS of a tokenizer; one without any end-of-text token is refused."""
    eos = end_of_text(tokenizer)
    if eos is None:
        raise CorpusError(
            f"{tokenizer.name_or_path}: this tokenizer has neither an EOS nor a SEP token, so no "
            "document can end. Set eos_token in its tokenizer_config.json."
        )
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return Ends((bos,) if adds_bos else (), (eos,))


def build(
    documents: Iterable[tuple[int, Document]],
    tokenizer: "PreTrainedTokenizerBase",
    preprocessing: Preprocessing,
    counters: Counter[str],
) -> Iterator[Row]:
    """Rows of the given (index, document) pairs, in order; what is left out is counted."""
    chunks = _chunks(documents, tokenizer, preprocessing.max_length, counters)
    return _pack(chunks, preprocessing.max_length) if preprocessing.pack else chunks


def _chunks(
    documents: Iterable[tuple[int, Document]],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    counters: Counter[str],
) -> Iterator[Row]:
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
            yield Row(row_id, part, sizes, supervised, reference=tokens.reference)


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
    """Of a conversation only what the teacher wrote itself is predicted."""
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
        raise CorpusError(
            f"{tokenizer.name_or_path}: this tokenizer has no chat template, which a column of "
            "messages needs. Name another --tokenizer, or put a chat_template.jinja beside it."
        )
    conversation = document.conversation() if isinstance(document, Exchange) else document
    if not conversation.messages:
        return _Tokens(np.zeros(0, np.int32))
    spoken = encode_conversation(conversation, tokenizer, where)
    return _Tokens(spoken.input_ids, spoken.by_assistant)


def _pack(chunks: Iterable[Row], max_length: int) -> Iterator[Row]:
    """Best fit: a chunk joins the fullest open row it fits in; full and oldest rows leave first."""
    open_rows: list[list[Row]] = []
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


def _joined(parts: list[Row]) -> Row:
    sizes = [len(part.input_ids) for part in parts]
    starts = np.cumsum([0, *sizes[:-1]])
    supervised = [
        part.supervised + start
        for part, start in zip(parts, starts, strict=True)
        if part.supervised is not None
    ]
    return Row(
        parts[0].row_id,
        np.concatenate([part.input_ids for part in parts]),
        tuple(sizes),
        np.concatenate(supervised).astype(np.int32) if supervised else None,
    )
