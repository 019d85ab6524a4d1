"""Labels as a corpus has them to what is learnt: numbers of classes, yes or no, or numbers.

C classes of a label space.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from shared.errors import CorpusError
from shared.tasks import ProblemType
from teacher_cache.corpus.documents import Label, RowLabel, is_vector
from teacher_cache.tasks.rows import NO_LABEL

_SHOWN_LABELS = 8
_LARGEST = float(np.finfo(np.float32).max)


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


def one_class(label: RowLabel, numbers: Mapping[str, int], where: str) -> np.ndarray | None:
    """The class of a text, i32 [1]; -100 and null are none."""
    if isinstance(label, float | tuple):
        raise CorpusError(
            f"{where}: found the label {_short(label)}, expected one class. Say --problem-type "
            "regression where labels are numbers, multi_label where a text has several."
        )
    number = class_number(label, numbers, where)
    return None if number is None else np.array([number], np.int32)


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


@dataclass(frozen=True, slots=True)
class Problem:
    """What the labels of a text are to it; `outputs` is how many a head has, one for each label.

    `answer` makes what is learnt of a label, None where it has none; `unknown` stands for it where
    no text has a label.
    """

    answer: Callable[[RowLabel, Mapping[str, int], str], np.ndarray | None]
    unknown: Callable[[int], np.ndarray]  # outputs -> as `answer` returns it
    classes: Callable[[int], int]  # outputs -> classes of a position; a number is one
    position_per_output: bool = True  # else a row has one position
    numbers: bool = False  # what is learnt are numbers, not classes
    fewest_labels: int = 1


PROBLEMS: dict[ProblemType, Problem] = {
    "single_label": Problem(
        one_class,
        lambda _: np.full(1, NO_LABEL, np.int32),
        classes=lambda outputs: outputs,
        position_per_output=False,
        fewest_labels=2,
    ),
    "multi_label": Problem(
        yes_or_no,
        lambda outputs: np.full(outputs, NO_LABEL, np.int32),
        classes=lambda _: 2,  # no and yes
    ),
    "regression": Problem(
        values,
        lambda outputs: np.full(outputs, np.nan, np.float32),
        classes=lambda _: 1,
        numbers=True,
    ),
}
