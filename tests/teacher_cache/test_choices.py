"""Gradient errors against autograd through the losses that train; choices against a teacher."""

import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.errors import NonFiniteTargets
from shared.targets.record import Target
from shared.targets.spec import TargetSpec
from student_train.loss.rows import SoftTarget, forward_kl, log_cells, sampled_rows, teacher_cells
from student_train.loss.spec import LossSpec
from teacher_cache.config import PlanConfig
from teacher_cache.select.targets import select
from teacher_cache.tools.gradient_error import (
    Directions,
    HeadGradient,
    errors,
    mean_kl,
    noise_scale,
    relative,
)
from teacher_cache.tools.plan import estimate
from teacher_cache.tools.report import estimate_text, recommendation

C = 40
SPECS = {
    "topk": TargetSpec(kind="topk", num_classes=C, top_k=5),
    "adaptive": TargetSpec(kind="adaptive", num_classes=C, top_k=1, mean_entries=5, threshold=0.04),
    "sample": TargetSpec(kind="sample", num_classes=C, top_k=1, mean_entries=5, threshold=0.1),
    "dense": TargetSpec(kind="dense", num_classes=C, top_k=1, value_bits=16),
}


def logits(seed: int, positions: int = 12) -> torch.Tensor:
    return 2 * torch.randn(positions, C, generator=torch.Generator().manual_seed(seed))


def target_of(teacher_nC: torch.Tensor, spec: TargetSpec) -> Target:
    offset_n = torch.linspace(0, 0.99, len(teacher_nC), dtype=torch.float64)
    got = select(teacher_nC, spec, None, offset_n if spec.kind == "sample" else None)
    counts = None if got.counts is None else got.counts.to(torch.int32).numpy()
    ids = got.ids.to(torch.int32).numpy()
    return Target(ids, got.logprobs.numpy(), got.log_tail.numpy(), counts)


def trained_gradient(student_nC: torch.Tensor, target: Target, spec: TargetSpec) -> torch.Tensor:
    """d loss / d logits of the soft loss that a student trains with, by autograd in float64."""
    counts = None if target.counts is None else torch.from_numpy(target.counts)
    parts = torch.from_numpy(target.ids), torch.from_numpy(target.logprobs).double()
    tail_n = torch.from_numpy(target.log_tail).double()
    soft = SoftTarget(*parts, tail_n, counts=counts, kind=spec.kind).at(slice(None))
    z_nC = student_nC.double().requires_grad_()
    entry_nC = torch.zeros(len(z_nC), C, dtype=torch.bool)
    for row, (ids, logprobs) in enumerate(zip(soft.ids, soft.logprobs, strict=True)):
        entry_nC[row, ids[logprobs > -math.inf].long()] = True
    rest_n = z_nC.masked_fill(entry_nC, -1e30).logsumexp(dim=1)
    chosen_nK = z_nC.gather(1, soft.ids.long()).masked_fill(soft.logprobs == -math.inf, -1e30)
    student_nJ = log_cells(chosen_nK, rest_n)
    teacher_nJ = teacher_cells(soft.logprobs, soft.log_tail)
    rows = (
        sampled_rows(student_nJ, teacher_nJ)
        if spec.kind == "sample"
        else forward_kl(student_nJ, teacher_nJ, LossSpec())
    )
    rows.sum().backward()
    return z_nC.grad


@pytest.mark.parametrize("kind", SPECS)
def test_errors_are_those_of_the_losses_that_train(kind):
    spec, teacher_nC, student_nC = SPECS[kind], logits(1), logits(2)
    target = target_of(teacher_nC, spec)
    logp_nC, logq_nC = teacher_nC.log_softmax(dim=1), student_nC.log_softmax(dim=1)
    whole_nC = logq_nC.double().exp() - logp_nC.double().exp()
    expected_nC = trained_gradient(student_nC, target, spec) - whole_nC
    found_nC = errors(logp_nC, logq_nC, target, spec)
    torch.testing.assert_close(found_nC.double(), expected_nC, rtol=1e-4, atol=1e-6)
    if kind != "dense":
        assert expected_nC.abs().max() > 0.01


def test_the_error_is_that_of_the_mean_of_outer_products():
    generator = torch.Generator().manual_seed(0)
    states_ND, whole_NC, error_NC = (
        torch.randn(50, width, generator=generator) for width in (6, C, C)
    )
    directions = Directions(6, C, 100)  # all 6 are affordable: nothing is estimated
    one, whole = HeadGradient(), HeadGradient()
    for part in (slice(0, 21), slice(21, 50)):
        one.add(directions.project(states_ND[part]), error_NC[part])
        whole.add(directions.project(states_ND[part]), whole_NC[part])
    found = relative(one, whole, 1.5)
    expected = np.linalg.norm(states_ND.T @ error_NC) / np.linalg.norm(states_ND.T @ whole_NC)
    assert found.error == pytest.approx(float(expected), rel=1e-5)
    assert found.error**2 == pytest.approx(found.bias**2 + found.deviation**2, rel=1e-9)
    assert found.student_kl == 1.5


def test_bias_stays_and_deviation_shrinks_with_the_batch():
    """Errors of mean 0.3 and deviation 1 in every component, known beforehand."""
    generator = torch.Generator().manual_seed(0)
    for count in (1000, 16_000):
        ones_NR = torch.ones(count, 1)
        noise_NC = torch.randn(count, C, generator=generator)
        gradients = {name: HeadGradient() for name in ("shared", "own", "whole")}
        gradients["shared"].add(ones_NR, noise_NC + 0.3)
        gradients["own"].add(ones_NR, noise_NC)
        gradients["whole"].add(ones_NR, torch.ones(count, C))
        shared = relative(gradients["shared"], gradients["whole"], 1.0)
        own = relative(gradients["own"], gradients["whole"], 1.0)
        assert shared.bias == pytest.approx(0.3, rel=0.05)
        assert own.bias == 0
        assert own.deviation == pytest.approx(count**-0.5, rel=0.25)


def test_projected_norms_are_near_the_real_ones(monkeypatch):
    monkeypatch.setattr("teacher_cache.tools.gradient_error._MAX_SUMS_BYTES", 4 * C * 10 * 64)
    directions = Directions(500, C, 10)
    assert directions.count == 64
    generator = torch.Generator().manual_seed(0)
    states_ND, error_NC = (torch.randn(80, w, generator=generator) for w in (500, C))
    one, whole = HeadGradient(), HeadGradient()
    one.add(directions.project(states_ND), error_NC)
    whole.add(directions.project(states_ND), error_NC[:, :1].expand(80, C))
    expected = np.linalg.norm(states_ND.T @ error_NC)
    expected /= np.linalg.norm(states_ND.T @ error_NC[:, :1].expand(80, C))
    assert relative(one, whole, 1.0).error == pytest.approx(float(expected), rel=0.3)


@pytest.mark.parametrize("wanted", [0.1, 2.0])
def test_a_student_has_the_kl_that_was_asked_for(wanted):
    teacher_nC, noise_nC = logits(3).log_softmax(dim=1), logits(4) / 2
    scale = noise_scale(teacher_nC, noise_nC, wanted)
    student_nC = (teacher_nC + scale * noise_nC).double().log_softmax(dim=1)
    p_nC = teacher_nC.double().exp()
    kl = float((p_nC * (teacher_nC.double() - student_nC)).sum(dim=1).mean())
    assert kl == pytest.approx(wanted, rel=0.01)
    assert mean_kl(teacher_nC, teacher_nC + scale * noise_nC) == pytest.approx(kl, rel=1e-4)


@pytest.fixture(scope="module")
def options(teacher_dir: Path, corpus_file: Path, tmp_path_factory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("choices") / "cache"
    paths = {"teacher": str(teacher_dir), "corpus": str(corpus_file), "out": out}
    return paths | {"limit_documents": 30, "max_length": 64, "device": "cpu"}


@pytest.fixture(scope="module")
def numbers(options) -> dict[str, Any]:
    return estimate(PlanConfig(**options, targets="adaptive", mean_entries=6.0, calibrate=True))


def test_kept_mass_and_truncation_of_a_threshold(numbers, options, teacher_dir):
    """Against the classes above the threshold of the float64 teacher, position by position."""
    from teacher_cache.job import calibrate as plan
    from teacher_cache.job.draft import resolve

    draft = resolve(PlanConfig(**options), load_teacher=False)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float64)
    asked = next(choice for choice in numbers["choices"] if choice["asked"])
    kept, entries = [], []
    for row in plan.sample_corpus(draft).rows:
        ids = torch.from_numpy(row.input_ids.astype(np.int64))
        with torch.no_grad():
            p_TC = teacher(ids[None]).logits[0, :-1].softmax(-1)
        for p_C in p_TC:
            above = p_C[p_C >= asked["threshold"]]
            above = above if len(above) else p_C.max()[None]
            kept.append(float(above.sum()))
            entries.append(len(above))
    assert numbers["measured_positions"] == len(kept)
    assert asked["kept_mass"]["1"] == pytest.approx(np.mean(kept), abs=1e-4)
    assert asked["truncation_kl"] == pytest.approx(-np.mean(np.log(kept)), rel=1e-3)
    assert asked["entries"] == pytest.approx(np.mean(entries), abs=0.01)
    assert asked["entries"] == pytest.approx(6, rel=0.05)


def test_what_a_sample_loses_is_no_bias_and_what_topk_loses_is(numbers):
    for choice in numbers["choices"]:
        for error in choice["gradient_error"].values():
            if choice["kind"] == "sample":
                assert error["bias"] < 0.5 * error["error"]
            elif choice["kind"] == "dense":
                assert error["error"] < 1e-3
            elif choice["kept_mass"]["1"] < 0.95:
                assert error["bias"] > 0.7 * error["error"]


def test_larger_targets_lose_less(numbers):
    for kind in ("topk", "adaptive", "sample"):
        found = [choice for choice in numbers["choices"] if choice["kind"] == kind]
        assert len(found) >= 3
        for student in ("far", "near"):
            lost = [choice["gradient_error"][student]["error"] for choice in found]
            assert lost == sorted(lost, reverse=True)


def test_the_text_marks_what_was_asked_for_and_names_what_comes_closest(numbers):
    text = estimate_text(numbers)
    marked = [line for line in text.splitlines() if line.endswith("<- asked for")]
    assert [line.split()[:2] for line in marked] == [["adaptive", "6"]]
    asked = next(choice for choice in numbers["choices"] if choice["asked"])
    fitting = [
        choice
        for choice in numbers["choices"]
        if choice["bytes_per_position"] <= asked["bytes_per_position"]
    ]
    best = min(fitting, key=lambda choice: choice["gradient_error"]["far"]["error"])
    said = recommendation(numbers)
    assert said.startswith("least gradient error in at most the bytes of adaptive 6: ")
    assert f"{best['gradient_error']['far']['error']:.4f}" in said.partition(";")[0]
    assert said in text


def test_nothing_is_recommended_that_lacks_a_temperature(numbers):
    choices = [
        {**choice, "kept_mass": choice["kept_mass"] | ({"2": 0.5} if choice["asked"] else {})}
        for choice in numbers["choices"]
    ]
    assert "itself" in recommendation(numbers | {"choices": choices})


def test_a_teacher_of_nothing_but_nan_is_refused(options, teacher_dir, tmp_path):
    broken = Path(shutil.copytree(teacher_dir, tmp_path / "broken"))
    teacher = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        teacher.lm_head.weight.fill_(math.nan)
    teacher.save_pretrained(broken)
    config = PlanConfig(**options | {"teacher": str(broken)}, calibrate=True)
    with pytest.raises(NonFiniteTargets, match=r"broken: NaN or infinity at every position.*dtype"):
        estimate(config)


def test_more_entries_than_classes_are_still_planned_for(options):
    few = PlanConfig(**options, targets="sample", mean_entries=250.0, calibrate=True)
    asked = [choice for choice in estimate(few)["choices"] if choice["asked"]]
    assert [choice["text"] for choice in asked] == ["sample 250"]
    assert 1 < asked[0]["entries"] < 250  # as many as the smallest spacing gives
