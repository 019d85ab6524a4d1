"""Windows: which tokens may be chosen, the likeliest span, and references."""

import re
from itertools import product

import numpy as np
import pytest
import torch

from shared import strict
from shared.errors import CorruptCache
from shared.windows import WindowReference, best_spans, reference_of, window_logits

CONTEXT = torch.tensor([[3, 6], [2, 8], [1, 2]])  # the first row has 7 tokens, the last 3


def test_only_token_0_and_the_context_have_logits():
    torch.manual_seed(0)
    start_BT, end_BT = torch.randn(2, 3, 8).unbind()
    index_N = torch.tensor([0, 1, 8, 9, 16, 17, 1])
    found = window_logits(start_BT, end_BT, CONTEXT, index_N, num_classes=11)
    assert found.shape == (7, 11)
    for line, index in enumerate(index_N.tolist()):
        row, end = divmod(index, 8)
        first, behind = CONTEXT[row].tolist()
        for token in range(11):
            allowed = token == 0 or first <= token < behind
            logits = end_BT if end else start_BT
            expected = logits[row, token] if allowed else -torch.inf
            assert found[line, token] == expected


@pytest.mark.parametrize("longest", [1, 2, 3, 30])
def test_the_best_span_is_that_of_all_pairs(longest):
    torch.manual_seed(longest)
    logp = torch.randn(3, 2, 8).double()
    spans = best_spans(logp, CONTEXT, longest)
    for row, (first, behind) in enumerate(CONTEXT.tolist()):
        pairs = [
            (float(logp[row, 0, s] + logp[row, 1, e]), s - first, e - first)
            for s, e in product(range(first, behind), repeat=2)
            if 0 <= e - s < longest
        ]
        best = max(pairs, key=lambda pair: pair[0])
        assert (float(spans.score_B[row]), int(spans.first_B[row]), int(spans.last_B[row])) == best
        assert float(spans.null_B[row]) == float(logp[row, 0, 0] + logp[row, 1, 0])


def test_of_equal_spans_the_first_and_shortest_wins():
    spans = best_spans(torch.zeros(1, 2, 8), torch.tensor([[2, 8]]), 30)
    assert (int(spans.first_B), int(spans.last_B)) == (0, 0)


def test_no_span_with_a_probability_has_no_score():
    logp = torch.full((1, 2, 8), -torch.inf)
    logp[0, 0, 5] = logp[0, 1, 3] = 0.0  # the end before the start
    assert best_spans(logp, torch.tensor([[2, 8]]), 30).score_B.tolist() == [-torch.inf]


def test_a_reference_reads_any_span_of_its_window():
    text = "Über 3 小时 — done"
    offsets = np.array([[0, 2], [2, 4], [5, 6], [7, 8], [7, 8], [8, 9], [10, 11], [12, 16]])
    for first in range(len(offsets)):
        part = offsets[first:]
        reference = WindowReference.of(text, part, ("a",))
        again = reference_of(
            {
                name: list(v) if isinstance(v, tuple) else v
                for name, v in reference.to_json().items()
            },
            len(part),
            "here",
        )
        assert again == reference
        for last in range(first, len(offsets)):
            expected = text[offsets[first, 0] : offsets[last, 1]]
            assert reference.between(0, last - first) == expected


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "here: found 'None', expected an object"),
        ({"answers": [], "text": "a", "steps": [0]}, "here: the field 'lengths' is missing"),
        ({"answers": [3], "text": "a", "steps": [0], "lengths": [1]}, "here: answers: found '3'"),
        ({"answers": [], "text": "a", "steps": [0, 1], "lengths": [1, 1]}, "expected 1"),
        ({"answers": [], "text": "a", "steps": [0], "lengths": []}, "the places of 1 and 0 tokens"),
    ],
)
def test_a_reference_that_is_none_is_an_error(value, message):
    with pytest.raises(CorruptCache, match=message):
        reference_of(value, 1, "here")


def test_the_places_of_a_windows_tokens_are_checked_together(monkeypatch):
    """Not one after another: a window has hundreds, and an evaluation has thousands of windows."""
    calls, original = [], strict._build
    monkeypatch.setattr(strict, "_build", lambda *a: calls.append(a) or original(*a))
    places = {"steps": list(range(384)), "lengths": [2**63] * 384}
    found = reference_of({"answers": ["a"], "text": "a"} | places, 384, "here")
    assert (found.steps, found.lengths) == (tuple(range(384)), (2**63,) * 384)
    assert len(calls) < 10
    for wrong in (-(2**63) - 1, 2**64, True, 1.0, None, "1", [1]):
        steps = [*range(383), wrong]
        with pytest.raises(CorruptCache, match=f"here: steps: found '{re.escape(str(wrong))}'"):
            reference_of({"answers": ["a"], "text": "a"} | places | {"steps": steps}, 384, "here")
