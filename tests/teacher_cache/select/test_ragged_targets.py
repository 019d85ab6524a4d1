"""Adaptive, sampled and dense targets against their definitions, one position at a time."""

import math

import pytest
import torch
from torch import Tensor

from shared.targets.ragged import drawn_logprob
from shared.targets.spec import TargetSpec
from teacher_cache.select import class_sums
from teacher_cache.select.base import Selected
from teacher_cache.select.targets import select


def spec_for(kind: str, num_classes: int, threshold: float) -> TargetSpec:
    return TargetSpec(kind=kind, num_classes=num_classes, mean_entries=8, threshold=threshold)


def spread_logits(num_rows: int, width: int, seed: int = 0) -> Tensor:
    """Rows from nearly flat to very peaked."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 1.2, num_rows)[:, None]
    return torch.randn(num_rows, width, generator=generator) * scale + 5


def rows_of(selected: Selected) -> list[dict[int, float]]:
    """Class -> log-probability, for each position."""
    assert selected.counts is not None
    sizes = selected.counts.tolist()
    parts = zip(selected.ids.split(sizes), selected.logprobs.split(sizes), strict=True)
    return [dict(zip(ids.tolist(), logs.tolist(), strict=True)) for ids, logs in parts]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1100, 1000, 130, 50])
def test_adaptive_keeps_every_class_of_the_threshold_and_the_largest(dtype, width):
    logits_NV, num_classes, eps = spread_logits(24, width).to(dtype), min(width, 1000), 0.004
    selected = select(logits_NV, spec_for("adaptive", num_classes, eps))
    exact_NC = logits_NV[:, :num_classes].double().log_softmax(dim=1)
    for row, (found, logs) in enumerate(zip(rows_of(selected), exact_NC.tolist(), strict=True)):
        sure = {i for i, lp in enumerate(logs) if lp >= math.log(eps) + 1e-5}
        near = {i for i, lp in enumerate(logs) if lp >= math.log(eps) - 1e-5}
        largest = max(range(num_classes), key=lambda i: (logs[i], -i))
        assert sure | {largest} <= found.keys() <= near | {largest}
        assert found == pytest.approx({i: logs[i] for i in found}, abs=2e-6)
        rest = sum(math.exp(lp) for i, lp in enumerate(logs) if i not in found)
        tail = math.log(rest) if rest > 0 else -math.inf
        assert selected.log_tail[row].item() == pytest.approx(tail, rel=2e-6, abs=2e-6)


def test_adaptive_keeps_at_most_255_the_smaller_of_equal_classes_first():
    logits_NV = torch.zeros(3, 1000)
    logits_NV[1, 990:] = 0.5
    logits_NV[2, :5] = 9.0
    selected = select(logits_NV, spec_for("adaptive", 1000, 1e-5))
    ids = [sorted(row) for row in rows_of(selected)]
    assert ids[0] == list(range(255))
    assert ids[1] == [*range(245), *range(990, 1000)]
    assert len(ids[2]) == 255


def offsets(num_rows: int, seed: int) -> Tensor:
    return torch.rand(num_rows, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [1000, 77])
def test_a_sample_is_what_walking_along_the_classes_gives(width):
    """In Python: the grid offset, offset + c, ... over the classes below c in the order of ids."""
    logits_NV, c, u_N = spread_logits(40, width), 0.03, offsets(40, 1)
    spec = spec_for("sample", width, c)
    found = rows_of(select(logits_NV, spec, offset_N=u_N))
    drawn = float(drawn_logprob(spec))
    differing = 0
    for row, logs in enumerate(logits_NV.double().log_softmax(dim=1).tolist()):
        largest = max(range(width), key=lambda i: (logs[i], -i))
        kept = {i for i, lp in enumerate(logs) if lp >= math.log(c)}
        if not kept and logs[largest] >= math.log(c) - 3:
            kept = {largest}
        expected, point, total = {i: logs[i] for i in kept}, u_N[row].item() * c, 0.0
        for i, lp in enumerate(logs):
            if i not in kept:
                total += math.exp(lp)
                while point < total:
                    assert i not in expected
                    expected[i], point = drawn, point + c
        differing += found[row].keys() != expected.keys()  # a point may lie on an edge
        if found[row].keys() == expected.keys():
            assert found[row] == pytest.approx(expected, abs=2e-6)
    assert differing <= 1


def test_the_mean_of_many_samples_is_the_distribution():
    """2,000 draws: each class within 5 standard errors, the total within one spacing of 1."""
    logits_NV, c, draws = spread_logits(4, 300, seed=3) / 3, 0.02, 2000
    p_NC = logits_NV.double().softmax(dim=1)
    spec, sum_NC = spec_for("sample", 300, c), torch.zeros(4, 300, dtype=torch.float64)
    for seed in range(draws):
        got = select(logits_NV, spec, offset_N=offsets(4, seed))
        rows = torch.repeat_interleave(torch.arange(4), got.counts)
        weights = torch.zeros_like(sum_NC)
        weights[rows, got.ids] = got.logprobs.double().exp()
        assert ((weights.sum(dim=1) - 1).abs() <= c + 1e-6).all()
        sum_NC += weights
    error_NC = (sum_NC / draws - p_NC).abs()
    deviation_NC = torch.where(p_NC < c, (p_NC * (c - p_NC)).clamp(min=0).sqrt(), 0.0)
    assert (error_NC <= 5 * deviation_NC / math.sqrt(draws) + 1e-6).all()


def test_a_class_far_below_the_spacing_is_not_forced_in():
    """40,000 equal classes: the largest has p = c / 800, which the codec could not write."""
    logits_NV = torch.zeros(2, 40_000)
    spec = spec_for("sample", 40_000, 0.02)
    for row in rows_of(select(logits_NV, spec, offset_N=offsets(2, 0))):
        assert len(row) == 50
        assert set(row.values()) == {float(drawn_logprob(spec))}


def test_dense_keeps_every_class():
    logits_NV = spread_logits(6, 50)
    logits_NV[2, 7] = -math.inf
    selected = select(logits_NV, TargetSpec(kind="dense", num_classes=40))
    exact_NC = logits_NV[:, :40].double().log_softmax(dim=1)
    assert torch.equal(selected.ids, torch.arange(40).expand(6, 40))
    torch.testing.assert_close(selected.logprobs, exact_NC.float(), rtol=2e-6, atol=2e-6)
    assert (selected.log_tail == -math.inf).all()


@pytest.mark.parametrize("kind", ["adaptive", "sample"])
def test_no_bit_depends_on_the_chunk(kind, monkeypatch):
    logits_NV, u_N = spread_logits(9, 5000), offsets(9, 4)
    spec = spec_for(kind, 4990, 0.01)
    whole = select(logits_NV, spec, offset_N=u_N)
    monkeypatch.setattr(class_sums, "BLOCK_BYTES", 2 * 20_000)
    parts = [select(logits_NV[a:b], spec, offset_N=u_N[a:b]) for a, b in ((0, 1), (1, 6), (6, 9))]
    for name in ("ids", "logprobs", "counts", "log_tail", "entropy", "log_partition"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(whole, name)), name


@pytest.mark.parametrize("kind", ["adaptive", "sample"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_position_is_marked_and_harms_no_other(kind, poison):
    logits_NV, u_N = spread_logits(5, 500), offsets(5, 4)
    spec = spec_for(kind, 500, 0.02)
    clean = rows_of(select(logits_NV, spec, offset_N=u_N))
    logits_NV[3, 100] = poison
    selected = select(logits_NV, spec, offset_N=u_N)
    assert selected.bad_N.tolist() == [False, False, False, True, False]
    found = rows_of(selected)
    assert list(found[3]) == [0]
    assert [row for i, row in enumerate(found) if i != 3] == [
        row for i, row in enumerate(clean) if i != 3
    ]
