"""Metrics of several labels and of numbers against slow readings of their definitions."""

import numpy as np
import pytest

from student_train.metrics.rows import (
    macro_f1,
    multi_label_numbers,
    pearson,
    regression_numbers,
    spearman,
    subset_accuracy,
)


def counts(labels, said):
    pairs = list(zip(np.ravel(labels), np.ravel(said), strict=True))
    return [sum(pair == wanted for pair in pairs) for wanted in ((1, 1), (0, 1), (1, 0))]


@pytest.mark.parametrize("seed", range(5))
def test_f1_is_counted_cell_by_cell(seed):
    rng = np.random.default_rng(seed)
    labels, probs = (rng.random((40, 6)) < 0.3).astype(int), rng.random((40, 6))
    labels[:, 4], probs[:, 4] = 0, 0.1  # a label that is nowhere has no F1
    said = (probs > 0.5).astype(int)
    hits, false, missed = counts(labels, said)
    numbers = multi_label_numbers(labels, probs, probs**2)
    assert numbers["micro_f1"] == pytest.approx(2 * hits / (2 * hits + false + missed))
    each = [counts(labels[:, c], said[:, c]) for c in range(6) if c != 4]
    f1 = [2 * h / (2 * h + f + m) for h, f, m in each]
    assert numbers["macro_f1"] == pytest.approx(np.mean(f1))
    right = [
        all(a == b for a, b in zip(*rows, strict=True)) for rows in zip(labels, said, strict=True)
    ]
    assert numbers["subset_accuracy"] == np.mean(right)
    hits, false, missed = counts(labels, probs**2 > 0.5)
    assert numbers["teacher_micro_f1"] == pytest.approx(2 * hits / (2 * hits + false + missed))
    assert numbers["micro_f1_low"] < numbers["micro_f1"] < numbers["micro_f1_high"]


def test_probabilities_that_are_right_as_often_as_they_say_have_no_calibration_error():
    rng = np.random.default_rng(0)
    probs = rng.random((4000, 5))
    labels = (rng.random((4000, 5)) < probs).astype(int)
    assert multi_label_numbers(labels, probs, None)["ece"] < 0.02
    assert multi_label_numbers(labels, probs**3, None)["ece"] > 0.1


def test_a_half_is_no():
    numbers = multi_label_numbers(np.array([[1, 0]]), np.array([[0.5, 0.5]]), None)
    assert (numbers["micro_f1"], numbers["subset_accuracy"], numbers["macro_f1"]) == (0, 0, 0)
    assert "teacher_micro_f1" not in numbers


def slow_ranks(values):
    return [
        np.mean([place for place, v in enumerate(sorted(values), 1) if v == value])
        for value in values
    ]


@pytest.mark.parametrize("seed", range(5))
def test_correlations_by_their_definitions(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 6, (50, 2)).astype(float)  # with ties
    said = labels + rng.normal(0, 2, (50, 2))
    numbers = regression_numbers(labels, said, -labels)
    of_each = [np.corrcoef(labels[:, c], said[:, c])[0, 1] for c in range(2)]
    assert numbers["pearson"] == pytest.approx(np.mean(of_each))
    ranks = [[slow_ranks(each[:, c]) for c in range(2)] for each in (labels, said)]
    of_ranks = [np.corrcoef(ranks[0][c], ranks[1][c])[0, 1] for c in range(2)]
    assert numbers["spearman"] == pytest.approx(np.mean(of_ranks))
    assert numbers["mse"] == pytest.approx(np.mean((labels - said) ** 2))
    assert numbers["teacher_pearson"] == pytest.approx(-1)
    assert numbers["teacher_spearman"] == pytest.approx(-1)
    assert numbers["teacher_mse"] == pytest.approx(np.mean((2 * labels) ** 2))
    assert numbers["pearson_low"] < numbers["pearson"] < numbers["pearson_high"]


def test_what_does_not_vary_correlates_with_nothing():
    constant, varying = np.ones((5, 1)), np.arange(5.0)[:, None]
    assert pearson(constant, varying) == spearman(varying, constant) == 0
    empty = np.zeros((0, 1))
    assert regression_numbers(empty, empty, None)["pearson"] == 0
    nothing = np.zeros((0, 2), bool)
    assert macro_f1(nothing, nothing) == subset_accuracy(nothing, nothing) == 0
