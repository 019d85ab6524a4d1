"""Documents of label spaces to rows: tagged tokens; texts or pairs of texts with their labels.

Special tokens stand where the tokenizer puts them and have no target. Of a word that becomes
several tokens the first one has its tag; a word is never cut between two rows. Documents without
labels have their positions all the same.

T tokens of a row, P of them with a target.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from shared.errors import CorpusError
from shared.format.schema import ROW_CHUNK_BITS
from shared.tasks import ProblemType
from teacher_cache.tasks.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Label = str | int | None  # by name or by number; None: no label
RowLabel = Label | float | tuple[Label | float, ...]  # of a text

NO_LABEL = -1
_SHOWN_LABELS = 8
_LARGEST = float(np.finfo(np.float32).max)


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


LabelDocument = Tagged | Labelled | str  # a text alone has no label


def build(
    documents: Iterable[tuple[int, LabelDocument]],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    labels: Sequence[str],
    counters: Counter[str],
    problem_type: ProblemType = "single_label",
    *,
    labelled: bool = True,
) -> Iterator[Row]:
    """Rows of the given (index, document) pairs, in order; what is left out is counted.

    Without `labelled` every row has negative labels, or NaN where they would be numbers.
    """
    unknown = None if labelled else _unknown(problem_type, len(labels))
    numbers = {name: number for number, name in enumerate(labels)}
    for index, document in documents:
        counters["documents"] += 1
        where = f"document {index}"
        if isinstance(document, str):
            document = Labelled(document, None, None)
        if isinstance(document, Tagged):
            known = numbers if labelled else None
            yield from _tagged_rows(index, document, tokenizer, max_length, known, counters)
            continue
        answer = unknown
        if labelled:
            answer = _answer(document.label, numbers, problem_type, where)
        if answer is None:
            counters["unlabelled_documents"] += 1
        else:
            row = _labelled_row(index, document, answer, tokenizer, max_length, counters)
            yield replace(row, of_outputs=problem_type != "single_label")


def _unknown(problem_type: ProblemType, outputs: int) -> np.ndarray:
    """What stands for the labels of a row, as `_answer` has them, where none is known."""
    if problem_type == "regression":
        return np.full(outputs, np.nan, np.float32)
    return np.full(1 if problem_type == "single_label" else outputs, NO_LABEL, np.int32)


def _answer(
    label: RowLabel, numbers: Mapping[str, int], problem_type: ProblemType, where: str
) -> np.ndarray | None:
    """The class of a row i32 [1], yes or no for each label i32 [C], or numbers f32 [C]."""
    if problem_type == "multi_label":
        return yes_or_no(label, numbers, where)
    if problem_type == "regression":
        return values(label, numbers, where)
    if isinstance(label, float | tuple):
        raise CorpusError(
            f"{where}: found the label {_short(label)}, expected one class. Say --problem-type "
            "regression where labels are numbers, multi_label where a text has several."
        )
    number = class_number(label, numbers, where)
    return None if number is None else np.array([number], np.int32)


def _labelled_row(
    index: int,
    document: Labelled,
    answer: np.ndarray,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    counters: Counter[str],
) -> Row:
    texts = [document.text] if document.text_pair is None else [document.text, document.text_pair]
    encoded = tokenizer(*texts, truncation=False, verbose=False)
    if len(encoded["input_ids"]) > max_length:
        counters["cut_documents"] += 1
        encoded = tokenizer(*texts, truncation=True, max_length=max_length, verbose=False)
    ids = np.array(encoded["input_ids"], np.int32)
    types = encoded.get("token_type_ids") if document.text_pair is not None else None
    return Row(
        row_id=index << ROW_CHUNK_BITS,
        input_ids=ids,
        segments=(len(ids),),
        supervised=np.arange(len(answer), dtype=np.int32),
        labels=answer,
        token_type_ids=None if types is None else np.array(types, np.int32),
    )


def _tagged_rows(
    index: int,
    document: Tagged,
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    numbers: Mapping[str, int] | None,
    counters: Counter[str],
) -> Iterator[Row]:
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
            yield Row(
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


def special_ends(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and behind a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise CorpusError(f"{tokenizer.name_or_path}: where it puts special tokens cannot be told")


def class_number(label: Label, numbers: Mapping[str, int], where: str) -> int | None:
    """The class of a label by name or number; -100 and null are none."""
    if label is None or label == -100:
        return None
    if isinstance(label, int) and 0 <= label < len(numbers):
        return label
    if isinstance(label, str) and label in numbers:
        return numbers[label]
    names = ", ".join(list(numbers)[:_SHOWN_LABELS])
    more = f" and {len(numbers) - _SHOWN_LABELS} more" if len(numbers) > _SHOWN_LABELS else ""
    raise CorpusError(
        f"{where}: found the label {_short(label)}, expected a number below {len(numbers)} or one "
        f"of {names}{more}. Name all classes with --labels FILE."
    )


def is_vector(label: RowLabel, count: int) -> bool:
    """Whether a list says 0 or 1 for each of `count` labels, and does not name some of them.

    Of two labels [0, 1] could be both: only floats and booleans, which name nothing, are one.
    """
    if not isinstance(label, tuple) or len(label) != count:
        return False
    named = count <= 2 and not any(isinstance(x, bool | float) for x in label)
    return not named and all(x in (0, 1) for x in label)


def yes_or_no(label: RowLabel, numbers: Mapping[str, int], where: str) -> np.ndarray | None:
    """1 for each label that a text has, i32 [C]; no label known (null) is None, an empty list not.

    A list names or numbers those there are, or is 0 or 1 for each (`is_vector`); what is no list
    is the only one.
    """
    if label is None or label == -100:
        return None
    if is_vector(label, len(numbers)):
        return np.array(label, np.int32)
    answer_C = np.zeros(len(numbers), np.int32)
    for each in label if isinstance(label, tuple) else (label,):
        number = None if isinstance(each, float) else class_number(each, numbers, where)
        if number is None or answer_C[number]:
            found = "twice" if number is not None else "where a label is expected"
            raise CorpusError(
                f"{where}: found {_short(each)} {found} in the labels {_short(label)}. Expected "
                f"each label of the text once, or 0 or 1 for each of the {len(numbers)} labels "
                "(of two as 0.0 or 1.0)."
            )
        answer_C[number] = 1
    return answer_C


def values(label: RowLabel, names: Mapping[str, int], where: str) -> np.ndarray | None:
    """The numbers of a text, f32 [C]; null is none."""
    if label is None:
        return None
    parts = label if isinstance(label, tuple) else (label,)
    if len(parts) != len(names) or not all(_is_finite(part) for part in parts):
        expected = "a number" if len(names) == 1 else f"{len(names)} numbers"
        raise CorpusError(
            f"{where}: found the label {_short(label)}, expected {expected} within the range of "
            "float32 (--problem-type regression)."
        )
    return np.array(parts, np.float32)


def _is_finite(value: Label | float) -> bool:
    return isinstance(value, int | float) and abs(value) <= _LARGEST


def _short(label: RowLabel) -> str:
    text = repr(list(label) if isinstance(label, tuple) else label)
    return text if len(text) <= 80 else f"{text[:80]}..."
