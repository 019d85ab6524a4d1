"""Rows of question answering: a question and windows of the text that may hold its answer.

Question and context are tokenized together, once, as the tokenizer joins two texts. A context that
is too long is cut into windows that share `stride` tokens, each with the whole question; that is
what `truncation="only_second"` gives in `transformers`. A window that does not hold the whole
answer has none: both of its labels are token 0.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.errors import CorpusError
from shared.format.layouts import NO_ANSWER, PLACES
from shared.format.schema import ROW_CHUNK_BITS
from shared.windows import WindowReference
from teacher_cache.tasks.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Answer:
    """A part of the context, and where it begins, in characters."""

    text: str
    start: int


@dataclass(frozen=True, slots=True)
class Asked:
    """A question on a text; without answers it cannot be answered from it."""

    question: str
    context: str
    answers: tuple[Answer, ...]


def answers_of(value: Any, where: str) -> tuple[Answer, ...]:
    """As SQuAD has them, {text: [...], answer_start: [...]}, or a list of {text, answer_start}."""
    expected = "{text: [...], answer_start: [...]} or a list of {text, answer_start}"
    if value is None:
        return ()
    pairs: list[tuple[Any, Any]]
    if isinstance(value, Mapping):
        texts, starts = value.get("text") or [], value.get("answer_start") or []
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise CorpusError(f"{where}: found {str(value)[:80]!r}, expected {expected}")
        pairs = list(zip(texts, starts, strict=True))
    elif isinstance(value, list) and all(isinstance(each, Mapping) for each in value):
        pairs = [(each.get("text"), each.get("answer_start")) for each in value]
    else:
        raise CorpusError(f"{where}: found {str(value)[:80]!r}, expected {expected}")
    for text, start in pairs:
        if not isinstance(text, str) or not isinstance(start, int):
            raise CorpusError(
                f"{where}: found the answer {text!r} at {start!r}, expected {expected}"
            )
    return tuple(Answer(text, start) for text, start in pairs)


@dataclass(frozen=True, slots=True)
class _Joined:
    """Question and context as tokens: ids and types before the context, of it, and behind it."""

    before: np.ndarray  # i32 [2, tokens]: ids, types
    context: np.ndarray
    behind: np.ndarray
    offsets: np.ndarray  # i64 [context tokens, 2], characters of the context


def build(
    documents: Iterable[tuple[int, Asked]],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    stride: int,
    counters: Counter[str],
) -> Iterator[Row]:
    """Rows of the given (index, document) pairs, in order; what is left out is counted."""
    if not tokenizer.is_fast:
        raise CorpusError(
            f"{tokenizer.name_or_path}: this tokenizer does not say which characters a token is "
            "of. Name one with a tokenizer.json."
        )
    for index, document in documents:
        counters["documents"] += 1
        joined = _join(document, tokenizer)
        if not len(joined.before.T) or not len(joined.offsets):
            counters["empty_documents"] += 1
            continue
        room = max_length - len(joined.before.T) - len(joined.behind.T)
        if room < 1:
            counters["questions_without_room"] += 1
            continue
        answer = _place(document, joined.offsets, counters)
        if answer is None:
            continue
        texts = tuple(answer.text for answer in document.answers)
        counters["unanswerable_documents"] += not texts
        counters["cut_documents"] += len(joined.offsets) > room
        for chunk, window in enumerate(windows(len(joined.offsets), room, stride)):
            before, part = len(joined.before.T), joined.offsets[window]
            ids, types = np.concatenate(
                (joined.before, joined.context[:, window], joined.behind), axis=1
            )
            sizes = (before, len(part), len(joined.behind.T))
            yield Row(
                row_id=index << ROW_CHUNK_BITS | chunk,
                input_ids=ids,
                segments=tuple(size for size in sizes if size),
                supervised=np.array(PLACES, np.int32),
                labels=_labels(answer, window, before),
                token_type_ids=types,
                reference=WindowReference.of(document.context, part, texts).to_json(),
            )


def windows(num_tokens: int, room: int, stride: int) -> Iterator[slice]:
    """Windows of `room` tokens, the last one of what is left; each shares `stride` with the next.

    Where a question leaves so little room that this would hardly move on, half of it is shared.
    """
    step = room - min(stride, room // 2)
    for start in range(0, num_tokens, step):
        yield slice(start, min(start + room, num_tokens))
        if start + room >= num_tokens:
            return


def _join(document: Asked, tokenizer: "PreTrainedTokenizerBase") -> _Joined:
    encoded = tokenizer(
        document.question, document.context, return_offsets_mapping=True, verbose=False
    )
    ids = encoded["input_ids"]
    types = encoded.get("token_type_ids") or [0] * len(ids)
    part = np.array([-1 if text is None else text for text in encoded.sequence_ids()])
    of_context = np.flatnonzero(part == 1)
    first, behind = (of_context[0], of_context[-1] + 1) if len(of_context) else (len(ids),) * 2
    cls_token = tokenizer.cls_token_id
    if (part[first:] == 0).any() or (cls_token in ids and ids[0] != cls_token):
        raise CorpusError(
            f"{tokenizer.name_or_path}: this tokenizer puts the context before the question, or "
            "its CLS token behind them. A row needs the question first, and what says that there "
            "is no answer as its token 0."
        )
    both = np.array([ids, types], np.int32)
    offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)[first:behind]
    return _Joined(both[:, :first], both[:, first:behind], both[:, behind:], offsets)


def _place(document: Asked, offsets: np.ndarray, counters: Counter[str]) -> range | None:
    """The tokens of the first answer, counted in the context; empty: there is no answer.

    None where the answer cannot be found. One that is not where it is said to be is looked for: its
    nearest occurrence counts.
    """
    if not document.answers:
        return range(0)
    text, start = document.answers[0].text, document.answers[0].start
    if not text.strip() or text not in document.context:
        counters["answers_not_in_context"] += 1
        return None
    if start < 0 or not document.context.startswith(text, start):
        counters["moved_answers"] += 1
        start = _nearest(text, document.context, start)
    first = int(np.searchsorted(offsets[:, 1], start, side="right"))
    behind = int(np.searchsorted(offsets[:, 0], start + len(text), side="left"))
    if first >= behind:
        counters["answers_without_tokens"] += 1
        return None
    return range(first, behind)


def _nearest(text: str, context: str, start: int) -> int:
    before, after = (
        context.rfind(text, 0, max(start, 0) + len(text)),
        context.find(text, max(start, 0)),
    )
    found = [place for place in (before, after) if place >= 0]
    return min(found, key=lambda place: abs(place - start))


def _labels(answer: range, window: slice, before: int) -> np.ndarray:
    """First and last token of the answer in the row; token 0 where the window lacks any of it."""
    if not answer or answer.start < window.start or answer.stop > window.stop:
        return np.full(len(PLACES), NO_ANSWER, np.int32)
    places = np.array([answer.start, answer.stop - 1], np.int32)
    return (places - window.start + before).astype(np.int32)
