"""Documents with a source and a target to rows for encoder-decoders.

A row is two segments: what the encoder reads, then what the decoder reads, which is its start token
and the target with its end. Of a conversation the target is what the assistant says last, and the
source all that was said before.

S tokens of the source, D of the decoder's part, D - 1 positions with a target.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.errors import CorpusError
from shared.format.manifest import Manifest, Preprocessing
from shared.format.schema import ROW_CHUNK_BITS
from shared.rows import Row
from teacher_cache.corpus.chat import split_answer, written_prompt
from teacher_cache.corpus.documents import Conversation, Pair, Written
from teacher_cache.tasks.base import SHOWN_TOKENS, AskedSource, RowContext, TeacherTask
from teacher_cache.tasks.inputs import PAIRS
from teacher_cache.tasks.rows import TrainingRow, document_ends, special_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from teacher_cache.config import CaptureConfig


@dataclass(frozen=True, slots=True)
class _Source:
    """A text, whether it has its special tokens already, and which end of it matters less."""

    text: str
    written: bool = False
    cut_front: bool = False


class PairTask(TeacherTask):
    """A decoder predicts the tokens of a target, after an encoder has read the source."""

    head = "next-of-pair"
    inputs = PAIRS
    rows_have_parts = True
    rows_have_references = True

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
        encoder, found = PairEncoder(tokenizer, preprocessing), []
        for index, document in documents:
            source, targets = source_before_answer(document, tokenizer, f"document {index}")
            found.append((encoder.source(source, counters), targets))
        return found

    def preprocessing(self, config: "CaptureConfig") -> dict[str, Any]:
        return {"max_target_length": config.max_new_tokens} if config.generate else {}

    def shown(
        self, row: Row, manifest: Manifest, tokenizer: "PreTrainedTokenizerBase"
    ) -> dict[str, Any]:
        begin = row.segments[0]  # of the target
        return {
            "text": tokenizer.decode(row.input_ids[: min(begin, SHOWN_TOKENS)]),
            "target": tokenizer.decode(row.input_ids[begin:][:SHOWN_TOKENS]),
            "reference": row.reference,
        }

    def shown_around(
        self, row: Row, position: int, tokenizer: "PreTrainedTokenizerBase"
    ) -> dict[str, str]:
        begin = row.segments[0]
        return {"after": tokenizer.decode(row.input_ids[begin : position + 1][-8:])}


def build(
    documents: Iterable[tuple[int, Pair | Conversation | Written]],
    tokenizer: "PreTrainedTokenizerBase",
    preprocessing: Preprocessing,
    counters: Counter[str],
) -> Iterator[TrainingRow]:
    """Rows of the given (index, document) pairs, in order; what is left out is counted."""
    encoder, start = PairEncoder(tokenizer, preprocessing), preprocessing.decoder_start
    for index, document in documents:
        counters["documents"] += 1
        if isinstance(document, Written):
            source_ids, targets = list(document.source_ids), document.references
            target_ids = list(document.tokens)
        else:
            source, targets = _parts(document, tokenizer, f"document {index}")
            source_ids = encoder.source(source, counters)
            target_ids = encoder.target(targets)
        if not source_ids:
            counters["empty_documents"] += 1
        elif not target_ids:
            counters["documents_without_target"] += 1
        else:
            target_ids = _cut(target_ids, preprocessing.max_target_length, counters)
            yield _row(index, source_ids, target_ids, start, targets)


def _cut(target_ids: list[int], max_length: int, counters: Counter[str]) -> list[int]:
    """The beginning of a target that is too long, without an end that is not there."""
    counters["cut_targets"] += len(target_ids) > max_length
    return target_ids[:max_length]


def _row(
    index: int, source_ids: list[int], target_ids: list[int], start: int, targets: tuple[str, ...]
) -> TrainingRow:
    S, count = len(source_ids), len(target_ids)
    return TrainingRow(
        row_id=index << ROW_CHUNK_BITS,
        input_ids=np.array([*source_ids, start, *target_ids], np.int32),
        segments=(S, 1 + count),
        supervised=np.arange(S, S + count, dtype=np.int32),
        reference=list(targets),
    )


def _parts(
    document: Pair | Conversation, tokenizer: "PreTrainedTokenizerBase", where: str
) -> tuple[_Source, tuple[str, ...]]:
    if isinstance(document, Pair):
        return _Source(document.source), document.targets
    messages = document.messages
    spoken = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not spoken:
        return source_of(document, tokenizer, where), ()
    last = spoken[-1]
    before = Conversation(messages[:last])
    return source_of(before, tokenizer, where), (_content(document, last, where),)


def source_before_answer(
    document: Pair | Conversation, tokenizer: "PreTrainedTokenizerBase", where: str
) -> tuple[_Source, tuple[str, ...]]:
    """The source that an answer is to be written for, and what the corpus has as its target."""
    if isinstance(document, Pair):
        return _Source(document.source), document.targets
    before, answer = split_answer(document)
    return source_of(before, tokenizer, where), answer


def source_of(
    conversation: Conversation, tokenizer: "PreTrainedTokenizerBase", where: str
) -> _Source:
    """What was said, in the tokenizer's template, else as lines of `role: content`.

    Its end matters most, so it is the beginning that is cut.
    """
    messages = [dict(message) for message in conversation.messages]
    if not messages:
        return _Source("")
    if tokenizer.chat_template is None:
        lines = [
            f"{message['role']}: {_content(conversation, number, where)}"
            for number, message in enumerate(messages)
        ]
        return _Source("\n".join(lines), cut_front=True)
    text = written_prompt(conversation, tokenizer, where)
    return _Source(text, written=True, cut_front=True)


def _content(conversation: Conversation, number: int, where: str) -> str:
    content = conversation.messages[number].get("content", "")
    if not isinstance(content, str):
        raise CorpusError(
            f"{where}, message {number}: found a content of type {type(content).__name__}, "
            "expected a text"
        )
    return content


class PairEncoder:
    """A tokenizer, and what it puts around a source and behind a target."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", preprocessing: Preprocessing) -> None:
        self._tokenizer, self._max_length = tokenizer, preprocessing.max_length
        self._around = special_ends(tokenizer)
        self._end = document_ends(tokenizer).eos[0]

    def source(self, source: _Source, counters: Counter[str]) -> list[int]:
        """At most --max-length tokens, special ones included; none of an empty text."""
        if not source.text.strip():
            return []
        before, after = ([], []) if source.written else self._around
        ids = self._tokenizer(source.text, add_special_tokens=False, verbose=False)["input_ids"]
        room = self._max_length - len(before) - len(after)
        if len(ids) > room:
            counters["cut_sources"] += 1
            ids = ids[len(ids) - room :] if source.cut_front else ids[:room]
        return [*before, *ids, *after]

    def target(self, texts: tuple[str, ...]) -> list[int]:
        """The first with the tokenizer's special tokens for targets and an end; none if empty."""
        if not texts or not texts[0].strip():
            return []
        ids = list(self._tokenizer(text_target=texts[0], verbose=False)["input_ids"])
        # Some put a language behind the end.
        return ids if self._end in ids[-2:] else [*ids, self._end]
