"""What a document of a corpus is, one type for each way in which it can be laid out.

A text is a `str`. The corpus makes these of its columns, and a task makes rows of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from shared.errors import CorpusError

Message = Mapping[str, Any]
Label = str | int | None  # by name or by number; None: no label
RowLabel = Label | float | tuple[Label | float, ...]  # of a text


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with a role and a content each."""

    messages: tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Exchange:
    """A prompt and its completion: one question and one answer."""

    prompt: str
    completion: str

    def conversation(self) -> Conversation:
        question = {"role": "user", "content": self.prompt}
        return Conversation((question, {"role": "assistant", "content": self.completion}))


@dataclass(frozen=True, slots=True)
class Written:
    """What the teacher read and what it then wrote, in tokens; and what the corpus has instead."""

    source_ids: tuple[int, ...]
    tokens: tuple[int, ...]
    references: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """A source and its targets: the first is what is learnt, all are what answers may be."""

    source: str
    targets: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tagged:
    """Words, and the tag of each."""

    tokens: tuple[str, ...]
    tags: tuple[Label, ...]


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text, or a pair of texts, of a class, of several, or with one or several numbers."""

    text: str
    text_pair: str | None
    label: RowLabel


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


def is_vector(label: RowLabel, count: int) -> bool:
    """Whether a list says 0 or 1 for each of `count` labels, and does not name some of them.

    Of two labels [0, 1] could be both: only floats and booleans, which name nothing, are one.
    """
    if not isinstance(label, tuple) or len(label) != count:
        return False
    named = count <= 2 and not any(isinstance(x, bool | float) for x in label)
    return not named and all(x in (0, 1) for x in label)
