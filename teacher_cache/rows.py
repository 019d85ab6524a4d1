"""Documents to rows: tokens with BOS and EOS, cut to --max-length, packed where asked for.

Rows are built inside a shard from the shard's own documents, so that a shard depends on nothing but
the manifest and its number. A chunk of a long document neither sees nor predicts the next chunk.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shared.errors import CorpusError
from shared.manifest import Preprocessing
from shared.schema import ROW_CHUNK_BITS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENIZE_AT_ONCE = 256  # documents
_OPEN_ROWS = 32  # rows that packing may still add to; more fill little better and cost time


@dataclass(frozen=True, slots=True)
class Row:
    """One training example: `input_ids` i32 [T]; `segments` are the lengths of its parts."""

    row_id: int
    input_ids: np.ndarray
    segments: tuple[int, ...]

    @property
    def num_positions(self) -> int:
        return len(self.input_ids) - len(self.segments)


@dataclass(frozen=True, slots=True)
class Ends:
    """The tokens a document is put between: BOS only where the tokenizer itself adds one."""

    bos: tuple[int, ...]
    eos: tuple[int, ...]


def document_ends(tokenizer: "PreTrainedTokenizerBase") -> Ends:
    """BOS and EOS of a tokenizer; one without any end-of-text token is refused."""
    eos = tokenizer.eos_token_id
    if eos is None:
        eos = tokenizer.sep_token_id
    if eos is None:
        raise CorpusError(
            f"{tokenizer.name_or_path}: this tokenizer has neither an EOS nor a SEP token, so no "
            "document can end. Set eos_token in its tokenizer_config.json."
        )
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return Ends((bos,) if adds_bos else (), (eos,))


def build(
    documents: Iterable[tuple[int, str]],
    tokenizer: "PreTrainedTokenizerBase",
    preprocessing: Preprocessing,
    counters: Counter[str],
) -> Iterator[Row]:
    """Rows of the given (index, text) documents, in order; what is left out is counted."""
    chunks = _chunks(documents, tokenizer, preprocessing.max_length, counters)
    return _pack(chunks, preprocessing.max_length) if preprocessing.pack else chunks


def _chunks(
    documents: Iterable[tuple[int, str]],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    counters: Counter[str],
) -> Iterator[Row]:
    ends = document_ends(tokenizer)
    for index, tokens in _tokenized(documents, tokenizer):
        counters["documents"] += 1
        if not tokens:
            counters["empty_documents"] += 1
            continue
        ids = np.array([*ends.bos, *tokens, *ends.eos], np.int32)
        counters["cut_documents"] += len(ids) > max_length
        for chunk, start in enumerate(range(0, len(ids), max_length)):
            part = ids[start : start + max_length]
            if len(part) < 2:  # a lone token has nothing to predict
                counters["lone_tokens"] += 1
                continue
            yield Row(index << ROW_CHUNK_BITS | chunk, part, (len(part),))


def _tokenized(
    documents: Iterable[tuple[int, str]], tokenizer: "PreTrainedTokenizerBase"
) -> Iterator[tuple[int, list[int]]]:
    waiting: list[tuple[int, str]] = []

    def flush() -> Iterator[tuple[int, list[int]]]:
        texts = [text for _, text in waiting]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        yield from zip([index for index, _ in waiting], encoded, strict=True)
        waiting.clear()

    for document in documents:
        waiting.append(document)
        if len(waiting) == _TOKENIZE_AT_ONCE:
            yield from flush()
    if waiting:
        yield from flush()


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
    return Row(
        parts[0].row_id,
        np.concatenate([part.input_ids for part in parts]),
        tuple(len(part.input_ids) for part in parts),
    )
