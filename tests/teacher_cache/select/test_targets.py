"""The selected targets against sorting in Python and sums in float64."""

import math

import pytest
import torch
from torch import Tensor

from shared.targets.spec import TargetSpec
from teacher_cache.select import class_sums, equal
from teacher_cache.select.base import Selected
from teacher_cache.select.targets import select

# float32 sums of thousands of terms, and log-probabilities near -20: 1e-6 relative, 2e-6 absolute
TOLERANCE = {"rtol": 2e-6, "atol": 2e-6}


def spec_for(num_classes: int, top_k: int, *temperatures: float) -> TargetSpec:
    return TargetSpec(
        kind="topk", num_classes=num_classes, top_k=top_k, value_bits=7, temperatures=temperatures
    )


def spread_logits(num_rows: int, width: int, seed: int = 0) -> Tensor:
    """Rows from nearly flat to very peaked."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 1.2, num_rows)[:, None]
    return torch.randn(num_rows, width, generator=generator) * scale + 5


def sorted_ids(row: list[float], k: int) -> list[int]:
    return sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]


def check_against_reference(selected: Selected, logits_NV: Tensor, spec: TargetSpec) -> None:
    exact_NC = logits_NV[:, : spec.num_classes].double()
    logprobs_NC = exact_NC.log_softmax(dim=1)
    ids_NK = torch.tensor([sorted_ids(row, spec.num_entries) for row in exact_NC.tolist()])
    assert torch.equal(selected.ids, ids_NK)
    rest_NC = logprobs_NC.scatter(1, ids_NK, -math.inf)
    expected = {
        "logprobs": logprobs_NC.gather(1, ids_NK),
        "log_tail": rest_NC.logsumexp(dim=1),
        "entropy": torch.special.entr(logprobs_NC.exp()).sum(dim=1),
        "log_partition": exact_NC.logsumexp(dim=1),
    }
    for name, value in expected.items():
        torch.testing.assert_close(
            getattr(selected, name), value.float(), **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
        )
    for temperature, ratio_N in selected.log_partition_ratio.items():
        exact_N = (logprobs_NC / temperature).logsumexp(dim=1)
        torch.testing.assert_close(ratio_N, exact_N.float(), **TOLERANCE)
    assert not selected.bad_N.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("width", "num_classes", "top_k"),
    [
        (1000, 1000, 4),  # two stages, last group of 40
        (1024, 1024, 4),  # two stages, whole groups only
        (1100, 1001, 1),  # columns beyond C
        (1000, 1000, 12),  # two stages, three quarters of the groups
        (1000, 1000, 13),  # one stage: too few groups for two
        (50, 40, 40),  # every class an entry
        (50, 40, 64),  # fewer classes than asked for
        (5, 2, 1),
    ],
)
def test_select_equals_the_float64_reference(dtype, width, num_classes, top_k):
    logits_NV = spread_logits(13, width).to(dtype)
    spec = spec_for(num_classes, top_k, 0.5, 2.0, 4.0)
    check_against_reference(select(logits_NV, spec), logits_NV, spec)


@pytest.mark.parametrize("num_classes", [640, 1009])
def test_ties_go_to_the_smaller_id(num_classes):
    """Three different values among a thousand classes, and both zeros: every edge is a tie."""
    generator = torch.Generator().manual_seed(1)
    logits_NV = torch.randint(-1, 2, (40, num_classes), generator=generator).to(torch.bfloat16)
    negative_zero = torch.rand(logits_NV.shape, generator=generator) < 0.5
    logits_NV = torch.where((logits_NV == 0) & negative_zero, -0.0, logits_NV)
    logits_NV[20:] = logits_NV[20:].clamp(max=0)
    for top_k in (
        1,
        3,
        4,
        7,
        8,
        12,
        13,
        num_classes,
    ):  # of 10 and 16 groups, two stages to 7 and 12
        spec = spec_for(num_classes, top_k)
        check_against_reference(select(logits_NV, spec), logits_NV, spec)


@pytest.mark.parametrize("top_k", [1, 8, 18, 24])
def test_one_and_two_stages_choose_the_same(monkeypatch, top_k):
    """Of 24 groups, the last of 28 classes; where all are chosen, two stages still are exact."""
    logits_NV = spread_logits(64, 1500).to(torch.bfloat16)
    monkeypatch.setattr(equal, "TWO_STAGES_SHARE", 1.0)
    two_stages = select(logits_NV, spec_for(1500, top_k))
    monkeypatch.setattr(equal, "TWO_STAGES_SHARE", 0.0)
    one_stage = select(logits_NV, spec_for(1500, top_k))
    assert torch.equal(two_stages.ids, one_stage.ids)


@pytest.fixture
def two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("two_threads")
def test_no_bit_depends_on_the_chunk(dtype, monkeypatch):
    """40,000 classes: enough for torch to share the sum of a single row between threads."""
    logits_NV, labels_N = spread_logits(5, 40_000).to(dtype), torch.arange(5)
    spec = spec_for(39_999, 8, 2.0)
    whole = select(logits_NV, spec, labels_N)
    monkeypatch.setattr(class_sums, "BLOCK_BYTES", 2 * 160_000)
    for here in (slice(0, 1), slice(1, 4), slice(4, 5)):
        part = select(logits_NV[here], spec, labels_N[here])
        for name in ("ids", "logprobs", "log_tail", "entropy", "log_partition", "label_logprob"):
            assert torch.equal(getattr(part, name), getattr(whole, name)[here]), name
        assert torch.equal(part.log_partition_ratio[2.0], whole.log_partition_ratio[2.0][here])


@pytest.mark.parametrize("tail_nats", [1.0, 20.0, 60.0])
def test_a_tiny_tail_keeps_its_relative_precision(tail_nats):
    """One minus the kept mass would be 0 from 17 nats on."""
    logits_NV = torch.zeros(1, 300) - tail_nats
    logits_NV[0, 7] = 0.0
    selected = select(logits_NV, spec_for(300, 1))
    exact = math.log(299) - tail_nats - math.log1p(299 * math.exp(-tail_nats))
    assert selected.log_tail.item() == pytest.approx(exact, rel=1e-6)


def test_keeping_every_class_leaves_no_tail():
    selected = select(spread_logits(4, 30), spec_for(30, 30))
    assert torch.equal(selected.log_tail, torch.full((4,), -math.inf))
    torch.testing.assert_close(selected.logprobs.exp().sum(dim=1), torch.ones(4))


def test_masked_classes_are_legal_and_come_last():
    logits_NV = spread_logits(6, 1000)
    logits_NV[:, 100:900] = -math.inf
    logits_NV[0] = -math.inf
    logits_NV[0, [3, 500, 950]] = torch.tensor([1.0, 2.0, 1.0])
    spec = spec_for(1000, 5, 2.0, 50.0)
    selected = select(logits_NV, spec)
    check_against_reference(selected, logits_NV, spec)
    assert selected.ids[0].tolist() == [500, 3, 950, 0, 1]  # then minus infinity, by smaller id
    assert selected.log_tail[0] == -math.inf


def test_bad_rows_are_marked_and_harm_no_other():
    good_NV = spread_logits(6, 1000)
    bad_NV = good_NV.clone()
    bad_NV[1, 999] = math.nan
    bad_NV[2, 5] = math.inf
    bad_NV[3] = -math.inf
    bad_NV[4, 998:] = torch.tensor([math.inf, -math.inf])
    spec = spec_for(1000, 4)
    found, expected = select(bad_NV, spec), select(good_NV, spec)
    assert found.bad_N.tolist() == [False, True, True, True, True, False]
    assert ((found.ids >= 0) & (found.ids < 1000)).all()
    for row in (0, 5):
        assert torch.equal(found.logprobs[row], expected.logprobs[row])


def test_what_stands_beyond_the_classes_changes_nothing():
    logits_NV = spread_logits(3, 700)
    polluted_NV = torch.cat([logits_NV, torch.full((3, 68), math.nan)], dim=1)
    clean, polluted = (select(x, spec_for(700, 4)) for x in (logits_NV, polluted_NV))
    assert not polluted.bad_N.any()
    assert torch.equal(clean.ids, polluted.ids)
    assert torch.equal(clean.log_tail, polluted.log_tail)


def test_label_logprob():
    logits_NV = spread_logits(4, 90)
    labels_N = torch.tensor([3, 79, -100, 85])
    selected = select(logits_NV, spec_for(80, 4), labels_N)
    exact_NC = logits_NV[:, :80].double().log_softmax(dim=1).float()
    assert selected.label_logprob is not None
    torch.testing.assert_close(selected.label_logprob[0], exact_NC[0, 3], **TOLERANCE)
    torch.testing.assert_close(selected.label_logprob[1], exact_NC[1, 79], **TOLERANCE)
    assert selected.label_logprob[2].isnan()  # no label
    assert selected.label_logprob[3] == -math.inf  # a label that is no class


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_callers_logits_stay_as_they_were(dtype):
    logits_NV = spread_logits(5, 2000).to(dtype)
    before_NV = logits_NV.clone()
    select(logits_NV, spec_for(2000, 4, 2.0), torch.zeros(5, dtype=torch.long))
    assert torch.equal(logits_NV, before_NV)


def test_no_positions():
    selected = select(
        torch.empty(0, 1000), spec_for(1000, 4, 2.0), torch.empty(0, dtype=torch.long)
    )
    assert selected.ids.shape == (0, 4)
    assert selected.log_tail.shape == selected.log_partition_ratio[2.0].shape == (0,)


def test_too_few_columns_are_refused():
    with pytest.raises(ValueError, match="99 columns, the targets 100 classes"):
        select(torch.zeros(1, 99), spec_for(100, 4))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_selects_what_the_reference_does(dtype):
    logits_NV = spread_logits(64, 50_257).to(dtype)
    spec = spec_for(50_250, 32, 2.0)
    selected = select(logits_NV.cuda(), spec)
    assert torch.equal(selected.ids.cpu(), select(logits_NV, spec).ids)
    torch.testing.assert_close(
        selected.log_tail.cpu(), select(logits_NV, spec).log_tail, **TOLERANCE
    )
