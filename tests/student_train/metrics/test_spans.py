"""Exact match and F1 of answers against the plain code of SQuAD's scripts; windows joined."""

import re
import string
from collections import Counter

import numpy as np
import pytest

from student_train.metrics.spans import (
    WindowAnswer,
    best_of,
    exact_match,
    f1,
    joined,
    span_numbers,
    words,
)

ENGLISH = [
    "The U.S. Army",
    "the us army",
    "an army of the U.S.",
    "army",
    "",
    "the",
    "$4,000 (1990)",
    "4000 1990",
    "a-b, c",
    "ab c",
    "theatre and anthem",
]


def squad_words(text: str) -> list[str]:
    """normalize_answer of SQuAD's evaluate-v2.0.py, step by step, then split."""
    text = "".join(c for c in text.lower() if c not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def squad_f1(predicted: str, answer: str) -> float:
    ours, theirs = squad_words(predicted), squad_words(answer)
    same = sum((Counter(theirs) & Counter(ours)).values())
    if not ours or not theirs:
        return float(ours == theirs)
    if not same:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("answer", ENGLISH)
def test_english_is_scored_as_by_squads_script(answer):
    for predicted in ENGLISH:
        assert words(predicted) == squad_words(predicted)
        assert f1(predicted, answer) == pytest.approx(squad_f1(predicted, answer))
        assert exact_match(predicted, answer) == (squad_words(predicted) == squad_words(answer))


def test_chinese_is_scored_by_the_character():
    assert words("《大莱龙铁路》，2005年6月") == [*"大莱龙铁路", "2005", "年", "6", "月"]
    assert words("すもも ABC計画") == [*"すもも", "abc", *"計画"]
    assert exact_match("“巴西”。", "巴西") == 1
    # CMRC's script: longest common run aside, 4 characters of 5 and of 6 are the same here
    assert f1("山东省北部", "在山东北部的") == pytest.approx(2 * 4 / (5 + 6))


def test_the_best_answer_counts_and_one_of_articles_alone_does_not():
    assert best_of(f1, "blue whale", ["whale", "blue whales", "blue"]) == pytest.approx(2 / 3)
    assert best_of(f1, "", ["the", "blue"]) == 0
    assert best_of(f1, "", []) == 1
    assert best_of(f1, "", ["the"]) == 1
    assert best_of(exact_match, "blue", []) == 0


def window(text: str, score: float, null: float, answers: tuple[str, ...] = ("x",)) -> WindowAnswer:
    return WindowAnswer(answers, text, score, null)


def test_the_likeliest_span_of_any_window_is_the_answer():
    windows = [window("one", -4, -0.1), window("two", -1, -2), window("three", -1, -3)]
    assert joined(windows, may_be_empty=False) == "two"
    assert joined(windows, may_be_empty=True) == "two"
    assert joined([window("one", -4, -0.1)], may_be_empty=True) == ""
    assert joined([window("one", -4, -0.1)], may_be_empty=False) == "one"
    # The first window holds the answer: that the second holds none says nothing.
    assert joined([window("one", -1, -2), window("no", -9, 0)], may_be_empty=True) == "one"


def test_numbers_are_means_over_documents_with_an_interval():
    answers = [("x y",), ("y",), ("z",)] * 20
    said = ["x", "y", "q"] * 20
    windows = [[window(text, -1, -5, each)] for text, each in zip(said, answers, strict=True)]
    teacher = [[window(each[0], -1, -5, each)] for each in answers]
    numbers = span_numbers(windows, teacher)
    assert numbers["metric"] == "f1"
    assert numbers["f1"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert numbers["exact_match"] == pytest.approx(1 / 3)
    assert numbers["documents"] == 60
    assert numbers["teacher_f1"] == numbers["teacher_exact_match"] == 1
    # Of a mean over 60 documents two standard errors to either side, about.
    error = np.std([2 / 3, 1, 0]) / np.sqrt(60)
    assert numbers["f1"] - numbers["f1_low"] == pytest.approx(2 * error, rel=0.2)
    assert numbers["f1_high"] - numbers["f1"] == pytest.approx(2 * error, rel=0.2)
    assert "teacher_f1" not in span_numbers(windows, None)


def test_no_answer_is_one_only_where_some_question_has_none():
    unsure = [window("x", -3, -1)]
    assert span_numbers([unsure], None)["f1"] == 1
    without = [window("x", -3, -1, ())]
    numbers = span_numbers([unsure, without], None)
    assert numbers["f1"] == 0.5  # now "" for both: wrong for the first, right for the second
