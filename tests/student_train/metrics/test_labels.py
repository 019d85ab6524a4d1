"""Metrics of label spaces against slow readings of their definitions."""

import math

import numpy as np
import pytest

from student_train.metrics.bootstrap import bootstrap_interval, ratio
from student_train.metrics.labels import (
    LabelPredictions,
    accuracy,
    bio_spans,
    calibration_error,
    is_bio,
    macro_f1,
    task_numbers,
)

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "I-MISC", "B-MISC")


def slow_entities(tags, rows):
    """(kind, first, last) of every entity, one tag at a time."""
    found, open_kind, first = set(), None, 0
    for place, (tag, row) in enumerate(zip(tags, rows, strict=True)):
        prefix, _, kind = tag.partition("-")
        new_row = place > 0 and rows[place - 1] != row
        ends = open_kind is not None and (new_row or prefix in "OB" or kind != open_kind)
        if ends:
            found.add((open_kind, first, place - 1))
            open_kind = None
        if open_kind is None and prefix != "O":
            open_kind, first = kind, place
    if open_kind is not None:
        found.add((open_kind, first, len(tags) - 1))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_entities_are_those_of_a_slow_reader(seed):
    rng = np.random.default_rng(seed)
    rows = np.repeat(np.arange(6), rng.integers(1, 12, 6))
    tags = rng.integers(0, len(TAGS), len(rows))
    spans = bio_spans(tags, rows, TAGS)
    kinds = sorted({tag[2:] for tag in TAGS if tag != "O"})
    found = {
        (kinds[kind], first, last)
        for kind, first, last in zip(spans.kind_S, spans.first_S, spans.last_S, strict=True)
    }
    assert found == slow_entities([TAGS[tag] for tag in tags], rows)
    assert len(found) == len(spans.first_S)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("B-PER I-PER O", {("PER", 0, 1)}),
        ("I-PER I-PER B-PER", {("PER", 0, 1), ("PER", 2, 2)}),
        ("B-PER I-LOC I-LOC", {("PER", 0, 0), ("LOC", 1, 2)}),
        ("O O O", set()),
    ],
)
def test_entities_by_hand(tags, expected):
    assert slow_entities(tags.split(), [0, 0, 0]) == expected


def answers(labels, predicted, rows, teacher=None):
    return LabelPredictions(rows, labels, predicted, np.full(len(rows), 0.5), teacher)


def test_entity_f1_counts_whole_entities_of_the_right_kind():
    rng = np.random.default_rng(3)
    rows = np.repeat(np.arange(40), 9)
    labels = rng.integers(0, len(TAGS), len(rows))
    wrong = rng.random(len(rows)) < 0.3
    predicted = np.where(wrong, rng.integers(0, len(TAGS), len(rows)), labels)
    numbers = task_numbers(answers(labels, predicted, rows, labels), TAGS)
    ours, theirs = (slow_entities([TAGS[t] for t in tags], rows) for tags in (labels, predicted))
    precision, recall = len(ours & theirs) / len(theirs), len(ours & theirs) / len(ours)
    assert numbers["metric"] == "entity_f1"
    assert numbers["entity_f1"] == pytest.approx(
        2 * precision * recall / (precision + recall), rel=1e-12
    )
    assert numbers["accuracy"] == sum(labels == predicted) / len(labels)
    assert numbers["teacher_entity_f1"] == 1.0
    assert numbers["entity_f1_low"] < numbers["entity_f1"] < numbers["entity_f1_high"]


def test_macro_f1_is_the_mean_over_classes_that_occur():
    rng = np.random.default_rng(1)
    labels, predicted = rng.integers(0, 6, 200), rng.integers(2, 7, 200)
    labels, predicted = labels * 2, predicted * 2  # odd classes never occur
    each = []
    for c in set(labels) | set(predicted):
        both = sum((labels == c) & (predicted == c))
        each.append(2 * both / (sum(labels == c) + sum(predicted == c)))
    assert macro_f1(labels, predicted) == pytest.approx(sum(each) / len(each), rel=1e-12)


def test_calibration_error_is_the_sum_over_fifteen_bins():
    rng = np.random.default_rng(2)
    confidence = np.concatenate([rng.random(500), np.arange(16) / 15])
    right = rng.random(516) < confidence**2
    total = 0.0
    for b in range(15):
        inside = [i for i, p in enumerate(confidence) if b / 15 < p <= (b + 1) / 15 or b == p == 0]
        if inside:
            total += abs(right[inside].mean() - confidence[inside].mean()) * len(inside)
    assert calibration_error(confidence, right) == pytest.approx(total / 516, rel=1e-9)
    sure = np.ones(10)
    assert calibration_error(sure, np.arange(10) < 7) == pytest.approx(0.3)


def test_the_interval_is_that_of_a_share():
    """Rows of one position: the normal approximation, within the noise of 1,000 draws."""
    right = (np.arange(2000) % 10 < 8).astype(float)
    low, high = bootstrap_interval(right, np.ones(2000), seed=0)
    half = 1.96 * math.sqrt(0.8 * 0.2 / 2000)
    assert low == pytest.approx(0.8 - half, abs=0.15 * half)
    assert high == pytest.approx(0.8 + half, abs=0.15 * half)
    assert bootstrap_interval(right, np.ones(2000), seed=0) == (low, high)


def test_rows_are_drawn_whole():
    """Ten equal positions in each row are worth one: the interval is that of the rows."""
    right = (np.arange(200) % 10 < 8).astype(np.int64)
    one = task_numbers(answers(np.ones(200, int), right, np.arange(200)), ("a", "b"))
    rows = np.repeat(np.arange(200), 10)
    ten = task_numbers(answers(np.ones(2000, int), np.repeat(right, 10), rows), ("a", "b"))
    assert one["metric"] == ten["metric"] == "accuracy"
    assert ten["accuracy_low"] == pytest.approx(one["accuracy_low"], rel=1e-12)
    assert ten["accuracy_high"] == pytest.approx(one["accuracy_high"], rel=1e-12)


def test_nothing_gives_zeros_and_no_nan():
    none = np.zeros(0, np.int64)
    for names in (TAGS, ("a", "b")):
        numbers = task_numbers(answers(none, none, none, none), names)
        assert {value for value in numbers.values() if not isinstance(value, str)} == {0.0}
    outside = np.zeros(5, np.int64)
    assert task_numbers(answers(outside, outside, outside), TAGS)["entity_f1"] == 0.0
    assert ratio(none, none) == accuracy(none, none) == 0.0


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (TAGS, True),
        (("O", "I-PER"), False),
        (("O", "B-PER", "E-PER"), False),
        (("NOUN", "VERB"), False),
        (("O",), False),
    ],
)
def test_tags_of_spans_are_told_from_other_labels(names, expected):
    assert is_bio(names) is expected
