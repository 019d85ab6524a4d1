"""Metrics of question answering: exact match and F1 over the words of an answer.

As the scripts of SQuAD 1.1 and 2.0 have them (Rajpurkar et al. 2016, 2018), with the normalisation
of MLQA (Lewis et al. 2020), which for English text in ASCII is the same and which takes a language
without spaces character by character: of lower-cased text, punctuation and the articles go, and
words are what stands between spaces, but each Chinese or Japanese character is a word of its own.

D documents: one question on one text, whose windows are answered each.
"""

import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from student_train.metrics.bootstrap import bootstrap_interval

_ARTICLES = re.compile(r"\b(a|an|the)\b")
# Han with its extensions and compatibility forms, kana: written without spaces.
_CHARACTER = re.compile(
    "([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])"
)


@dataclass(frozen=True, slots=True)
class WindowAnswer:
    """What a model answers in one window of a document, and how sure it is."""

    answers: tuple[str, ...]  # those to the document's question; none: it has no answer
    text: str  # of the likeliest span
    score: float  # ln p(start) + ln p(end)
    null_score: float  # the same of there being no answer in this window


def span_numbers(
    windows_D: Sequence[Sequence[WindowAnswer]],
    teacher_D: Sequence[Sequence[WindowAnswer]] | None,
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """F1, the main metric, with its interval over draws of D documents; exact match; the teacher's.

    Documents in the same order for both. Whether any question has no answer decides whether "no
    answer" is one: in a data set without such questions it would always be wrong.
    """
    answers_D = [windows[0].answers for windows in windows_D]
    may_be_empty = not all(answers_D)
    f1_D, exact_D = _scores(windows_D, answers_D, may_be_empty=may_be_empty)
    low, high = bootstrap_interval(f1_D, np.ones(len(f1_D)), seed=seed)
    numbers: dict[str, Any] = {
        "metric": "f1",
        "f1": _mean(f1_D),
        "f1_low": low,
        "f1_high": high,
        "exact_match": _mean(exact_D),
        "documents": len(f1_D),
    }
    if teacher_D is not None:
        its_f1_D, its_exact_D = _scores(teacher_D, answers_D, may_be_empty=may_be_empty)
        numbers |= {"teacher_f1": _mean(its_f1_D), "teacher_exact_match": _mean(its_exact_D)}
    return numbers


def _scores(
    windows_D: Sequence[Sequence[WindowAnswer]],
    answers_D: Sequence[tuple[str, ...]],
    *,
    may_be_empty: bool,
) -> tuple[np.ndarray, np.ndarray]:
    predicted_D = [joined(windows, may_be_empty=may_be_empty) for windows in windows_D]
    pairs = list(zip(predicted_D, answers_D, strict=True))
    f1_D = [best_of(f1, predicted, answers) for predicted, answers in pairs]
    exact_D = [best_of(exact_match, predicted, answers) for predicted, answers in pairs]
    return np.array(f1_D), np.array(exact_D)


def joined(windows: Sequence[WindowAnswer], *, may_be_empty: bool) -> str:
    """The answer of all windows of a document: the likeliest span of any, the first of equal.

    "" is the answer where even the window that is least sure that it holds none is surer of that
    than any window of a span: the least null score against the best score, as SQuAD 2.0 has it.
    """
    best = max(windows, key=lambda window: window.score)
    null_score = min(window.null_score for window in windows)
    return "" if may_be_empty and null_score > best.score else best.text


def best_of(metric: Any, predicted: str, answers: Sequence[str]) -> float:
    """The best value over all answers; those that normalise to nothing do not count."""
    there = [answer for answer in answers if words(answer)] or [""]
    return float(max(metric(predicted, answer) for answer in there))


def exact_match(predicted: str, answer: str) -> float:
    """Whether the words are the same."""
    return float(words(predicted) == words(answer))


def f1(predicted: str, answer: str) -> float:
    """Harmonic mean of precision and recall over words; of no words 1 where both have none."""
    ours, theirs = words(predicted), words(answer)
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def words(text: str) -> list[str]:
    """What an answer is compared by."""
    kept = "".join(character for character in text.lower() if not _is_punctuation(character))
    return _CHARACTER.sub(r" \1 ", _ARTICLES.sub(" ", kept)).split()


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def _mean(values_D: np.ndarray) -> float:
    return float(values_D.mean()) if len(values_D) else 0.0
