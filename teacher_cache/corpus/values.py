"""A value of the corpus as documents hold it, by the role of its column; what is none is refused.

`DOCUMENTS` says what the values of one document make together, by the roles that there are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shared.errors import CorpusError
from teacher_cache.corpus.documents import (
    Answer,
    Asked,
    Conversation,
    Exchange,
    Label,
    Labelled,
    Pair,
    RowLabel,
    Tagged,
    answers_of,
)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a corpus, and what the numbers in it stand for, where the data set says so."""

    source: str
    name: str
    class_names: tuple[str, ...] = ()


def text(value: Any, index: int, column: Column) -> str:
    """A null is an empty text."""
    if value is not None and not isinstance(value, str):
        raise CorpusError(
            f"{column.source}: document {index} has a {type(value).__name__} in column "
            f"{column.name!r} where a text is expected. Name another one with --columns."
        )
    return value or ""


def targets(value: Any, index: int, column: Column) -> tuple[str, ...]:
    """One target, or a list of several."""
    texts = value if isinstance(value, list) else [value]
    return tuple(text(each, index, column) for each in texts if each is not None)


def conversation(value: Any, index: int, column: Column) -> Conversation:
    """A list of messages with their roles."""
    messages = value or []
    for number, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise CorpusError(
                f"{column.source}: document {index}, message {number} of column "
                f"{column.name!r}: found {str(message)[:80]!r}, expected an "
                "object with role and content."
            )
    # `datasets` gives every message every key of any: null ones were not there.
    return Conversation(
        tuple({k: v for k, v in message.items() if v is not None} for message in messages)
    )


def words(value: Any, index: int, column: Column) -> tuple[str, ...]:
    """A text that is cut into words already."""
    found = value or ()
    if isinstance(found, str) or not all(isinstance(word, str) for word in found):
        raise CorpusError(
            f"{column.source}: document {index} has {str(value)[:80]!r} in column "
            f"{column.name!r} where a list of words is expected. Cut texts into "
            "words first, or name another column with --columns."
        )
    return tuple(found)


def tags(value: Any, index: int, column: Column) -> tuple[Label, ...]:
    """The label of each word."""
    return tuple(_named(label, column) for label in value or ())


def label(value: Any, index: int, column: Column) -> RowLabel:
    """The label of a text, or several of them."""
    if isinstance(value, list):
        return tuple(_named(each, column) for each in value)
    return _named(value, column)


def answers(value: Any, index: int, column: Column) -> tuple[Answer, ...]:
    """The answers to a question, as parts of its context."""
    return answers_of(value, f"{column.source}: document {index}, answers")


def _named(found: Label, column: Column) -> Label:
    """A number by the name the data set gives it: a teacher may count in another order."""
    names = column.class_names
    if not names or not isinstance(found, int):
        return found
    return names[found] if found >= 0 else None  # `datasets` has -1 where none is known


# Role -> how a value of its column is read.
VALUES: dict[str, Callable[[Any, int, Column], Any]] = {
    "messages": conversation,
    "text": text,
    "text_pair": text,
    "prompt": text,
    "completion": text,
    "source": text,
    "target": targets,
    "tokens": words,
    "tags": tags,
    "label": label,
    "question": text,
    "context": text,
    "answers": answers,
}
LABEL_ROLES = ("tags", "label")  # of a token or of a row; a document has at most one of them

# What a document is made of, by the roles of its columns.
DOCUMENTS: dict[tuple[str, ...], Callable[..., Any]] = {
    ("messages",): lambda conversation: conversation,
    ("text",): lambda text: text,
    ("prompt", "completion"): Exchange,
    ("prompt",): lambda prompt: Exchange(prompt, ""),
    ("source",): lambda source: Pair(source, ()),
    ("source", "target"): Pair,
    ("tokens", "tags"): Tagged,
    ("text", "text_pair", "label"): Labelled,
    ("text", "label"): lambda text, label: Labelled(text, None, label),
    ("tokens",): lambda tokens: Tagged(tokens, (None,) * len(tokens)),
    ("text", "text_pair"): lambda text, text_pair: Labelled(text, text_pair, None),
    ("question", "context", "answers"): Asked,
}
