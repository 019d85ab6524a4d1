"""Mixed targets as the loss sees them, against the teachers' whole distributions in float64."""

import math

import numpy as np
import pytest
import torch

from shared.targets.base import TargetKind
from shared.targets.kinds import KINDS
from shared.targets.record import Target
from shared.targets.spec import TargetSpec
from student_train.data.mixtures import Voice, entropy_of, mixture
from student_train.loss.rows import SoftTarget, prepare_target
from student_train.loss.spec import LossSpec
from teacher_cache.select.targets import select

P, C = 7, 23
WEIGHTS = (0.7, 0.3)
ASKED: dict[TargetKind, dict] = {
    "dense": {},
    "topk": {"top_k": 5, "value_bits": 16},
    "adaptive": {"mean_entries": 5, "threshold": 0.03},
    "sample": {"mean_entries": 5, "threshold": 0.06},
}


def teachers() -> list[torch.Tensor]:
    """Logits [P, C] of two teachers who agree on some classes."""
    generator = torch.Generator().manual_seed(4)
    shared_PC = 3 * torch.randn(P, C, generator=generator)
    return [shared_PC + 2 * torch.randn(P, C, generator=generator) for _ in WEIGHTS]


def voices(kind: TargetKind, temperature: float = 1.0, offset_N=None) -> list[Voice]:
    """The targets as `cache-teacher` selects them, unquantised."""
    temperatures = () if temperature == 1 or kind in ("dense", "sample") else (temperature,)
    spec = TargetSpec(kind=kind, num_classes=C, temperatures=temperatures, **ASKED[kind])
    found = []
    for logits_PC, weight in zip(teachers(), WEIGHTS, strict=True):
        got = select(logits_PC, spec, offset_N=offset_N)
        counts = None if got.counts is None else got.counts.numpy().astype(np.int32)
        log_tail = got.log_tail.numpy()
        if kind in ("dense", "sample"):
            log_tail = np.full(P, -np.inf, np.float32)
        target = Target(got.ids.numpy().astype(np.int32), got.logprobs.numpy(), log_tail, counts)
        ratio = got.log_partition_ratio.get(temperature)
        found.append(Voice(target, weight, None if ratio is None else ratio.numpy()))
    return found


def dense_mixture(temperature: float) -> torch.Tensor:
    """sum_i w_i softmax(z_i / T), float64 [P, C]."""
    tempered = [(logits.double() / temperature).softmax(-1) for logits in teachers()]
    return sum(w * p for w, p in zip(WEIGHTS, tempered, strict=True))  # type: ignore[return-value]


def as_the_loss_sees_it(target: Target, kind: TargetKind, temperature: float) -> SoftTarget:
    """Through `prepare_target`, with the ratio that an ensemble gives with it."""
    soft = SoftTarget(
        torch.from_numpy(target.ids.copy()),
        torch.from_numpy(target.logprobs),
        torch.from_numpy(target.log_tail),
        None if temperature == 1 else torch.zeros(P),
        None if target.counts is None else torch.from_numpy(target.counts),
        kind,
    )
    return prepare_target(soft.at(slice(None)), None, LossSpec(temperature=temperature))


def kept_by_all(found: list[Voice]) -> torch.Tensor:
    """Classes that every teacher kept, bool [P, C], looked up one by one."""
    kept_PC = torch.ones(P, C, dtype=torch.bool)
    for voice in found:
        target, own_PC = voice.target, torch.zeros(P, C, dtype=torch.bool)
        counts = [target.ids.shape[-1]] * P if target.counts is None else target.counts.tolist()
        ids = iter(target.ids.reshape(-1).tolist())
        for position, count in enumerate(counts):
            for _ in range(count):
                own_PC[position, next(ids)] = True
        kept_PC &= own_PC
    return kept_PC


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.7, 0.5])
def test_dense_is_the_exact_mixture_of_tempered_distributions(temperature):
    found = mixture(voices("dense"), "dense", temperature)
    seen = as_the_loss_sees_it(found, "dense", temperature)
    # float32: values down to -30 nats carry 2e-6, at T = 0.5 twice that
    torch.testing.assert_close(
        seen.logprobs.double(), dense_mixture(temperature).log(), rtol=1e-6, atol=4e-6
    )


def test_the_entropy_of_a_dense_mixture_is_that_of_the_distribution():
    p_PC = dense_mixture(1.0)
    expected = -(p_PC * p_PC.log()).sum(-1)
    found = torch.from_numpy(entropy_of(mixture(voices("dense"), "dense")))
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    certain = Target(np.arange(2)[None], np.array([[0, -np.inf]], np.float32), np.zeros(1))
    assert entropy_of(certain).tolist() == [0.0]


@pytest.mark.parametrize("kind", ["topk", "adaptive"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_classes_that_all_kept_are_exact_and_the_rest_is_the_tail(kind, temperature):
    said = voices(kind, temperature)
    seen = as_the_loss_sees_it(mixture(said, kind, temperature), kind, temperature)
    kept_PC, mixed_PC = kept_by_all(said), dense_mixture(temperature)
    found_PC = torch.zeros(P, C, dtype=torch.float64)
    found_PC.scatter_add_(1, seen.ids.long(), seen.logprobs.double().exp())
    assert 0 < kept_PC.sum(1).min() < kept_PC.sum(1).max()  # positions differ
    torch.testing.assert_close(found_PC, mixed_PC * kept_PC, rtol=2e-6, atol=1e-9)
    tail_P = (mixed_PC * ~kept_PC).sum(1)
    torch.testing.assert_close(seen.log_tail.double().exp(), tail_P, rtol=1e-5, atol=1e-6)


def test_a_tail_of_nothing_stays_nothing_and_a_position_may_have_no_entry():
    ids = np.array([[0, 1]], np.int32)
    whole = Voice(
        Target(ids, np.log(np.array([[0.25, 0.75]], np.float32)), np.array([-np.inf])), 0.5
    )
    assert mixture([whole, whole], "topk").log_tail.tolist() == [-math.inf]
    other = Voice(Target(ids + 2, whole.target.logprobs, np.array([-np.inf])), 0.5)
    apart = mixture([whole, other], "topk")
    assert apart.counts is not None
    assert apart.counts.tolist() == [0]
    assert apart.log_tail.tolist() == pytest.approx([0.0], abs=1e-7)


def test_an_entry_without_probability_is_no_entry():
    """A topk cache with fewer classes than slots fills them up with probability 0."""
    full = Target(
        np.array([[3, 0]], np.int32), np.array([[0, -np.inf]], np.float32), np.array([-np.inf])
    )
    found = mixture([Voice(full, 0.5), Voice(full, 0.5)], "topk")
    assert found.ids.tolist() == [3]
    assert found.logprobs.tolist() == [0.0]


def test_samples_are_right_on_average_and_add_up_what_repeats():
    draws, spacing = 200, ASKED["sample"]["threshold"]
    mean_PC = torch.zeros(P, C, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for _ in range(draws):
        offset_N = torch.rand(P, generator=generator, dtype=torch.float64)
        found = mixture(voices("sample", offset_N=offset_N), "sample")
        assert found.counts is not None
        keys = np.repeat(np.arange(P), found.counts) * C + found.ids
        assert len(np.unique(keys)) == len(keys)
        mass_PC = torch.zeros(P * C, dtype=torch.float64)
        mass_PC[torch.from_numpy(keys)] = torch.from_numpy(np.exp(found.logprobs.astype(float)))
        mean_PC += mass_PC.reshape(P, C) / draws
        assert (found.log_tail == -np.inf).all()
    # A class below the spacing c is drawn with probability p / c and weight c: variance below c p.
    error_PC = torch.zeros(P, C, dtype=torch.float64)
    for weight, logits_PC in zip(WEIGHTS, teachers(), strict=True):
        p_PC = logits_PC.double().softmax(-1)
        error_PC += weight * (spacing * p_PC * (p_PC < spacing) / draws).sqrt()
    # 161 classes: 4 standard errors are passed once in 16,000.
    # One draw more or less of a class that is hardly ever drawn is no error either.
    too_far_PC = (mean_PC - dense_mixture(1.0)).abs() - 4 * error_PC - spacing / draws
    assert too_far_PC.max() <= 0


def test_a_sample_may_have_more_entries_than_a_byte_counts():
    ids = [np.arange(start, start + 200, dtype=np.int32) for start in (0, 200)]
    flat = np.full(200, math.log(1 / 200), np.float32)
    counts, no_tail = np.array([200], np.int32), np.array([-np.inf], np.float32)
    said = [Voice(Target(each, flat, no_tail, counts), 0.5) for each in ids]
    found = mixture(said, "sample")
    assert found.counts is not None
    assert found.counts.tolist() == [400]
    np.testing.assert_allclose(np.exp(found.logprobs), 1 / 400, rtol=1e-6)


@pytest.mark.parametrize("kind", list(ASKED))
@pytest.mark.parametrize("weights", [(0.5, 0.5), (0.9, 0.1)])
def test_a_teacher_mixed_with_itself_is_that_teacher(kind, weights):
    offset_N = torch.full((P,), 0.3, dtype=torch.float64)
    alone = voices(kind, offset_N=offset_N)[0].target
    found = mixture([Voice(alone, weight) for weight in weights], kind)
    masses = []
    for target in (alone, found):
        per = C if kind == "dense" else ASKED[kind].get("top_k", 0)
        counts = np.full(P, per) if target.counts is None else target.counts
        mass_PC = np.zeros((P, C))
        mass_PC[np.repeat(np.arange(P), counts), target.ids.reshape(-1)] = np.exp(
            target.logprobs.reshape(-1)
        )
        masses.append(mass_PC)
    np.testing.assert_allclose(masses[1], masses[0], rtol=2e-6)
    np.testing.assert_allclose(np.exp(found.log_tail), np.exp(alone.log_tail), rtol=1e-6)


@pytest.mark.parametrize("kind", ["dense", "topk", "sample"])
def test_a_kind_that_is_added_is_mixed_by_its_traits(kind, monkeypatch):
    monkeypatch.setitem(KINDS, "toy", type("Toy", (type(KINDS[kind]),), {})())
    said = voices(kind, offset_N=torch.linspace(0, 0.9, P))
    found, expected = (mixture(said, name) for name in ("toy", kind))
    for ours, theirs in zip(dense_rows(found), dense_rows(expected), strict=True):
        assert ours == theirs


def dense_rows(target: Target) -> list[tuple[list[int], list[float]]]:
    """Classes and log-probabilities as lists, position by position."""
    counts = [target.ids.shape[-1]] * P if target.counts is None else target.counts.tolist()
    ends = np.cumsum(counts)[:-1]
    pairs = zip(
        np.split(target.ids.ravel(), ends), np.split(target.logprobs.ravel(), ends), strict=True
    )
    return [(ids.tolist(), logprobs.tolist()) for ids, logprobs in pairs]
