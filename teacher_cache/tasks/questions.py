"""Rows of question answering: a question and windows of the text that may hold its answer.

Question and context are tokenized together, once, as the tokenizer joins two texts. A context that
is too long is cut into windows that share `stride` tokens, each with the whole question; that is
what `truncation="only_second"` gives in `transformers`. A window that does not hold the whole
answer has none: both of its labels are token 0.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shared.errors import CorpusError
from shared.format.manifest import Manifest
from shared.format.schema import ROW_CHUNK_BITS
from shared.rows import Row
from shared.tasks import MAX_ANSWER_TOKENS
from shared.windows import NO_ANSWER, PLACES, WindowReference, best_spans, reference_of
from teacher_cache.corpus.documents import Asked
from teacher_cache.tasks.base import RowContext, TeacherTask, Vocabulary
from teacher_cache.tasks.rows import TrainingRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from teacher_cache.config import CaptureConfig

_SHOWN_CHARACTERS = 120  # of a context, from either end


@dataclass(frozen=True, slots=True)
class _Joined:
    """Question and context as tokens: ids and types before the context, of it, and behind it."""

    before: np.ndarray  # i32 [2, tokens]: ids, types
    context: np.ndarray
    behind: np.ndarray
    offsets: np.ndarray  # i64 [context tokens, 2], characters of the context


class QuestionTask(TeacherTask):
    """Start and end of an answer are predicted among the tokens of the text that may hold it."""

    head = "span"
    keeps_every_class = True
    rows_have_parts = True
    rows_have_references = True
    always_has_token_types = True
    shows_positions = False

    def build_rows(
        self, documents: Iterable[tuple[int, Any]], context: RowContext, counters: Counter[str]
    ) -> Iterator[TrainingRow]:
        options = context.preprocessing
        length, stride = options.max_length, options.stride
        return build(documents, context.tokenizer, length, stride, counters)

    def num_classes(self, config: "CaptureConfig", num_labels: int, vocabulary: Vocabulary) -> int:
        return config.max_length  # the tokens of the longest row

    def possible_classes(self, rows: Sequence[TrainingRow], num_classes: int) -> float:
        return sum(row.segments[1] + 1 for row in rows) / len(rows)  # the context, and token 0

    def shown(
        self, row: Row, manifest: Manifest, tokenizer: "PreTrainedTokenizerBase"
    ) -> dict[str, Any]:
        window = _shown_window(row, manifest.targets.num_classes, tokenizer)
        return {**super().shown(row, manifest, tokenizer), "window": window}


def build(
    documents: Iterable[tuple[int, Asked]],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    stride: int,
    counters: Counter[str],
) -> Iterator[TrainingRow]:
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
            yield TrainingRow(
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


def _shown_window(
    row: Row, num_classes: int, tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Any]:
    """Question, the ends of the context, all answers, the labels' span, the teacher's likeliest."""
    before, context = row.segments[:2]
    reference = reference_of(row.reference, context, f"reference of row {row.row_id}")
    start, end = row.labels.tolist()
    lengthy = len(reference.text) > 2 * _SHOWN_CHARACTERS
    ends = reference.text[:_SHOWN_CHARACTERS], reference.text[-_SHOWN_CHARACTERS:]
    found: dict[str, Any] = {
        "question": tokenizer.decode(row.input_ids[:before], skip_special_tokens=True),
        "context": " ... ".join(ends) if lengthy else reference.text,
        "answers": list(reference.answers),
        "here": None if start == NO_ANSWER else reference.between(start - before, end - before),
    }
    if row.targets is None:
        return found
    logp_2C = torch.full((len(PLACES), num_classes), -torch.inf)
    for place in PLACES:
        ids, logprobs = row.targets.entries(place)
        logp_2C[place, ids] = logprobs
    bounds = torch.tensor([[before, before + context]])
    spans = best_spans(logp_2C[None], bounds, MAX_ANSWER_TOKENS)
    score = float(spans.score_B)
    text = ""
    if score > -torch.inf:
        text = reference.between(int(spans.first_B), int(spans.last_B))
    found["teacher"] = text
    found["teacher_p"] = round(float(spans.score_B.exp()), 4)
    found["teacher_p_none"] = round(float(spans.null_B.exp()), 4)
    return found
