"""The threshold of a ragged kind: it gives the mean number of entries that was asked for."""

import logging
import math

import pytest
import torch
from torch import Tensor

from shared.targets.ragged import MAX_ENTRIES, MIN_SPACING
from shared.targets.spec import TargetSpec
from teacher_cache.select.ragged import Adaptive, Sample
from teacher_cache.select.targets import select

RULES = {"adaptive": Adaptive.thresholds, "sample": Sample.thresholds}


def spec_of(kind: str, mean: float, threshold: float = 0.0) -> TargetSpec:
    return TargetSpec(kind=kind, num_classes=1000, mean_entries=mean, threshold=threshold)


def logits_of(scale: float | Tensor, num_rows: int = 600, num_classes: int = 1000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_rows, num_classes, generator=generator) * scale


def largest(logits_NV: Tensor) -> Tensor:
    """As calibration sees them: the largest of each position, descending."""
    return logits_NV.log_softmax(dim=1).topk(min(MAX_ENTRIES, logits_NV.shape[1])).values


MIXED = torch.logspace(-1, 1.3, 600)[:, None]  # from nearly flat to certain, as real positions are


def real_mean(logits_NV: Tensor, kind: str, mean: float, threshold: float) -> float:
    """Entries that stage one really keeps."""
    generator = torch.Generator().manual_seed(1)
    offset_N = torch.rand(len(logits_NV), dtype=torch.float64, generator=generator)
    counts = select(logits_NV, spec_of(kind, mean, threshold), offset_N=offset_N).counts
    assert counts is not None
    return counts.double().mean().item()


@pytest.mark.parametrize("kind", ["adaptive", "sample"])
@pytest.mark.parametrize("mean", [2.0, 12.0, 40.0])
@pytest.mark.parametrize("scale", [MIXED, 3.0, 1.5], ids=["mixed", "peaked", "flat"])
def test_the_mean_is_the_one_asked_for(kind, mean, scale):
    logits_NV = logits_of(scale)
    threshold = RULES[kind].find(largest(logits_NV), mean)
    assert RULES[kind].mean_entries(largest(logits_NV), threshold) == pytest.approx(mean, rel=0.01)
    assert real_mean(logits_NV, kind, mean, threshold) == pytest.approx(mean, rel=0.02)


@pytest.mark.parametrize("mean", [30.0, 100.0])
def test_a_sample_of_flat_positions_is_counted_as_it_is_drawn(mean):
    """Of 40,000 equal classes none is kept as it is: 1 / spacing entries, not one more."""
    logits_NV = torch.zeros(4, 40_000)
    threshold = RULES["sample"].find(largest(logits_NV), mean)
    assert threshold == pytest.approx(1 / mean, rel=1e-3)


@pytest.mark.parametrize("kind", ["adaptive", "sample"])
def test_the_result_has_four_digits_at_most(kind):
    for mean in (2.0, 3.0, 7.7, 12.0, 20.0):
        found = RULES[kind].find(largest(logits_of(MIXED)), mean)
        assert found == float(f"{found:.4g}")


@pytest.mark.parametrize(
    ("kind", "scale", "lowest"), [("adaptive", 30.0, 1e-7), ("sample", 8.0, MIN_SPACING)]
)
def test_too_many_entries_are_told(kind, scale, lowest, caplog):
    """A peaked teacher has few classes with any probability to speak of."""
    logprobs_NK = largest(logits_of(scale, 50))
    most = RULES[kind].mean_entries(logprobs_NK, lowest)
    assert most < 200
    with caplog.at_level(logging.WARNING):
        assert RULES[kind].find(logprobs_NK, 200) == lowest
    assert caplog.messages == [
        f"--mean-entries 200: this teacher has {most:.1f} at the lowest threshold there is, "
        f"{lowest:.2g}, which is used"
    ]
    TargetSpec(kind=kind, num_classes=1000, mean_entries=200, threshold=lowest)  # is accepted


def test_too_few_entries_of_a_sample_are_told(caplog):
    """A flat teacher needs more than one draw even of the largest spacing."""
    logprobs_NK = largest(logits_of(2.0, 50))
    least = RULES["sample"].mean_entries(logprobs_NK, 0.9)
    with caplog.at_level(logging.WARNING):
        assert RULES["sample"].find(logprobs_NK, 1) == 0.9
    assert caplog.messages == [
        f"--mean-entries 1: this teacher has {least:.1f} at the highest threshold there is, 0.9, "
        "which is used"
    ]


def test_one_entry_of_adaptive_is_within_reach(caplog):
    """The largest class always is one, so nothing else may reach the threshold."""
    logprobs_NK = largest(logits_of(2.0, 50))
    threshold = RULES["adaptive"].find(logprobs_NK, 1)
    assert RULES["adaptive"].mean_entries(logprobs_NK, threshold) == pytest.approx(1, abs=0.021)
    assert not caplog.messages


def test_inclusion_is_what_selection_does():
    """Of many samples, each class is in as many as its share says; adaptive has no chance in it."""
    logits_NV, c, draws = logits_of(torch.tensor([[0.5], [2.0], [6.0]]), 3), 0.03, 3000
    order_NK = logits_NV.log_softmax(dim=1).topk(MAX_ENTRIES)
    share_NK, beyond_N = RULES["sample"].inclusion(order_NK.values, c)
    generator = torch.Generator().manual_seed(2)
    hits_NV = torch.zeros(3, 1000)
    for _ in range(draws):
        offset_N = torch.rand(3, dtype=torch.float64, generator=generator)
        got = select(logits_NV, spec_of("sample", 8, c), offset_N=offset_N)
        hits_NV[torch.repeat_interleave(torch.arange(3), got.counts), got.ids] += 1
    found_NK = (hits_NV / draws).gather(1, order_NK.indices)
    error_NK = (share_NK * (1 - share_NK) / draws).sqrt()
    assert ((found_NK - share_NK).abs() <= 5 * error_NK + 1e-4).all()
    rest_N = hits_NV.sum(dim=1) / draws - found_NK.sum(dim=1)
    torch.testing.assert_close(rest_N, beyond_N, rtol=0, atol=5 * math.sqrt(30 / draws))

    share_NK, beyond_N = RULES["adaptive"].inclusion(order_NK.values, c)
    kept = select(logits_NV, spec_of("adaptive", 8, c))
    assert share_NK.sum(dim=1).tolist() == kept.counts.tolist()
    assert not beyond_N.any()
