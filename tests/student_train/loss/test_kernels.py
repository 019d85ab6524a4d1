"""Every implementation of the row losses against full distributions in float64.

A toy stands among them: it shows what an implementation has to be, and that these tests hold it to
it.

Shapes: n positions of a chunk, N of all, C classes, K entries.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from student_train.loss.kernels import table
from student_train.loss.kernels.base import RowKernel, RowSums, RowTerms, Wanted
from student_train.loss.rows import (
    LOG_FLOOR,
    MASKED_LOGIT,
    SoftTarget,
    sampled_rows,
    soft_rows,
    teacher_cells,
)
from student_train.loss.spec import LossSpec
from tests.student_train.loss.problem import (
    COUNTS,
    SPECS,
    C,
    K,
    N,
    V,
    assert_same_gradients,
    gradients,
    make_problem,
    name_of,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


class PositionByPosition:
    """A kernel as one would first write it: each class by itself, in float64, by autograd."""

    def fits(self, device: torch.device, dtype: torch.dtype, spec: LossSpec) -> bool:
        return True

    def num_buffers(self, wanted: Wanted) -> int:
        """None: the gradient takes the place of the logits."""
        return 0

    def run(
        self,
        logits_nC: Tensor,
        buffers: Sequence[Tensor],
        terms: RowTerms,
        wanted: Wanted,
        *,
        gradient: bool,
    ) -> RowSums:
        with torch.enable_grad():
            leaf_nC = logits_nC.double().clamp_min(MASKED_LOGIT).requires_grad_()
            given_nC = leaf_nC
            if wanted.softcap is not None:
                given_nC = wanted.softcap * torch.tanh(leaf_nC / wanted.softcap)
            zero = leaf_nC.sum() * 0
            soft = sum(
                (soft_of(given_nC[n], n, terms, wanted.spec) for n in range(len(leaf_nC))), zero
            )
            hard = sum(
                (hard_of(given_nC[n], n, terms, wanted.spec) for n in range(len(leaf_nC))), zero
            )
            loss = wanted.soft_scale * soft + wanted.hard_scale * hard
        if gradient:
            logits_nC.copy_(torch.autograd.grad(loss, leaf_nC)[0])
        given_nC = given_nC.detach()
        top_n1 = terms.top_ids_n1
        best_n1 = given_nC.amax(dim=1, keepdim=True)
        agrees_n1 = (given_nC.gather(1, top_n1.clamp_min(0)) >= best_n1) & (top_n1 >= 0)
        entropy = torch.distributions.Categorical(logits=given_nC).entropy().sum()
        sums = (soft.detach(), hard.detach(), agrees_n1.sum(), entropy * wanted.with_entropy)
        return RowSums(*(total.to(logits_nC.dtype) for total in sums), logits_nC)


def soft_of(logits_C: Tensor, n: int, terms: RowTerms, spec: LossSpec) -> Tensor:
    log_q_C = (logits_C / spec.temperature).log_softmax(dim=0)
    mass: dict[int, float] = {}
    for number, logprob in zip(
        terms.ids_nK[n].tolist(), terms.logprobs_nK[n].tolist(), strict=True
    ):
        if logprob > -math.inf:
            mass[number] = mass.get(number, 0.0) + math.exp(logprob)
    others = [number for number in range(len(logits_C)) if number not in mass]
    rest = log_q_C[others].logsumexp(dim=0) if others else log_q_C.new_tensor(LOG_FLOOR)
    student_J = torch.cat([log_q_C[list(mass)], rest[None]]).clamp_min(LOG_FLOOR)
    logprobs_1K = torch.tensor([list(mass.values())], dtype=torch.float64, device=rest.device).log()
    teacher_1J = teacher_cells(logprobs_1K, terms.log_tail_n[n, None].double())
    if terms.sampled:
        return sampled_rows(student_J[None], teacher_1J).sum()
    return soft_rows(student_J[None], teacher_1J, spec).sum()


def hard_of(logits_C: Tensor, n: int, terms: RowTerms, spec: LossSpec) -> Tensor:
    label, smoothing = int(terms.labels_n1[n]), spec.label_smoothing
    if label < 0:
        return logits_C.sum() * 0
    log_q_C = logits_C.log_softmax(dim=0)
    mean = log_q_C.mean().clamp_min(LOG_FLOOR)
    return -(1 - smoothing) * log_q_C[label].clamp_min(LOG_FLOOR) - smoothing * mean


ALL: dict[str, RowKernel] = table.KERNELS | {"position by position": PositionByPosition()}


@pytest.fixture(params=ALL, autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> RowKernel:
    """The only line of the table."""
    chosen = ALL[request.param]
    monkeypatch.setattr(table, "KERNELS", {request.param: chosen})
    return chosen


@pytest.fixture(autouse=True)
def _on_a_cpu(kernel: RowKernel, request: pytest.FixtureRequest) -> None:
    """Most tests are small, and are for those that work there."""
    wanted = (torch.device("cpu"), torch.float64, LossSpec())
    if "device" not in request.fixturenames and not kernel.fits(*wanted):
        pytest.skip("this implementation is for another device")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_value_and_gradients_equal_the_dense_reference(spec, device, kernel):
    problem = make_problem(spec=spec)
    reference = problem.reference()
    expected = gradients(reference, problem)
    # The reference itself forms the tail as exp of logs: 1e-11 of slack for float64.
    for dtype, tolerance, floor in ((torch.float64, 1e-11, 1e-12), (torch.float32, 1e-5, 0)):
        if not kernel.fits(torch.device(device), dtype, spec):
            continue
        case = problem.to(dtype, device)
        loss = case.chunked().loss
        torch.testing.assert_close(loss.cpu().double(), reference, rtol=tolerance, atol=floor)
        found = [gradient.cpu() for gradient in gradients(loss, case)]
        assert_same_gradients(found, expected, tolerance)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_scale_cap_and_missing_bias(temperature, labelled, taught, smoothing):
    problem = make_problem(
        spec=LossSpec(temperature=temperature, label_smoothing=smoothing),
        logit_scale=0.6,
        softcap=1.5,
        soft_scale=0.7 * taught,
    )
    problem = problem if labelled else replace(problem, labels=None)
    for case in (problem, replace(problem, bias=None)):
        loss = case.chunked(**({} if taught else {"target": None})).loss
        reference = case.reference()
        torch.testing.assert_close(loss, reference, rtol=1e-11, atol=1e-12)
        if taught or labelled:
            assert_same_gradients(gradients(loss, case), gradients(reference, case), 1e-11)


def test_reported_sums_equal_the_dense_ones():
    problem = make_problem(rows=40, with_entropy=True)
    for temperature, labels in itertools.product((1.0, 2.0), (problem.labels, None)):
        case = replace(problem, spec=LossSpec(temperature=temperature), labels=labels)
        output = case.chunked()
        student = case.logits()[:, :C].softmax(dim=1)
        entropy = -(student * student.log()).sum()
        agreement = (student.argmax(1) == case.teacher.argmax(1)).sum()
        torch.testing.assert_close(output.student_entropy_sum, entropy.detach())
        assert output.agreement == agreement
        assert 0 < agreement < 40
        parts = case.soft_scale * output.soft_sum + case.hard_scale * output.hard_sum
        torch.testing.assert_close(output.loss.detach(), parts)
        assert not any(
            total.requires_grad
            for total in (output.soft_sum, output.hard_sum, output.student_entropy_sum)
        )


def test_repeated_ids_add_up():
    problem = make_problem(labels=None)
    target = problem.target()
    halved = target.logprobs - math.log(2)
    twice = SoftTarget(
        torch.cat((target.ids, target.ids.flip(1)), dim=1),
        torch.cat((halved, halved.flip(1)), dim=1),
        target.log_tail,
    )
    for loss in ("forward-kl", "reverse-kl", "jsd", "tvd", "mse"):
        once = replace(problem, spec=LossSpec(soft_loss=loss))
        expected = once.chunked().loss
        actual = once.chunked(target=twice).loss
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
        assert_same_gradients(gradients(actual, once), gradients(expected, once), 1e-11)


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_entries_may_differ_in_number(spec):
    """1 to C - 1 of them, so that chunks differ in their widest position."""
    problem = make_problem(spec=spec, counts=COUNTS)
    reference, loss = problem.reference(), problem.chunked().loss
    torch.testing.assert_close(loss, reference, rtol=1e-11, atol=1e-12)
    assert_same_gradients(gradients(loss, problem), gradients(reference, problem), 1e-11)


@pytest.mark.parametrize("with_entropy", [False, True])
def test_a_sample_is_the_cross_entropy_to_its_weights(with_entropy):
    """Against -sum w log softmax; the weights of a position need not sum to 1."""
    problem = make_problem(with_entropy=with_entropy)
    generator = torch.Generator().manual_seed(2)
    weights_NC = torch.rand(N, C, generator=generator, dtype=torch.float64)
    weights_NC *= torch.rand(N, C, generator=generator) < 0.3
    weights_NC[:, 3] = 0.2  # no position without any
    rows, ids = weights_NC.nonzero(as_tuple=True)
    target = SoftTarget(
        ids.int(),
        weights_NC[rows, ids].log(),
        torch.full((N,), -math.inf, dtype=torch.float64),
        counts=torch.bincount(rows),
        kind="sample",
    )
    log_q_NC = problem.logits()[:, :C].log_softmax(dim=1)
    expected = -problem.soft_scale * (weights_NC * log_q_NC).sum()
    expected += problem.hard_scale * F.nll_loss(log_q_NC, problem.labels, reduction="sum")
    loss = problem.chunked(target=target).loss
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    assert_same_gradients(gradients(loss, problem), gradients(expected, problem), 1e-11)


def test_empty_slots_do_not_matter_wherever_they_point():
    """A slot of probability 0 may hold any class id, an entry's or another's."""
    problem = make_problem()
    target = problem.target()
    for padding in (target.ids[:, :3], torch.zeros(N, 3).int(), torch.full((N, 3), C - 1).int()):
        padded = SoftTarget(
            torch.cat((padding, target.ids), dim=1),
            torch.cat((torch.full((N, 3), -math.inf), target.logprobs), dim=1),
            target.log_tail,
        )
        expected, actual = problem.chunked(), problem.chunked(target=padded)
        torch.testing.assert_close(actual.loss, expected.loss, rtol=1e-13, atol=0)
        assert actual.agreement == expected.agreement
        expected_gradients = gradients(expected.loss, problem)
        assert_same_gradients(gradients(actual.loss, problem), expected_gradients, 1e-12)


EXTREME_SPECS = [
    *SPECS,
    *(
        replace(spec, temperature=temperature)
        for spec in SPECS
        if spec.temperature == 2
        for temperature in (0.05, 0.3, 20.0)
    ),
]


@pytest.mark.parametrize("spec", EXTREME_SPECS, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_stay_finite(spec, dtype):
    """PEERS: a finite loss with NaN gradients; 0 times -inf."""
    problem = make_problem(spec=spec).to(dtype)
    target = problem.target()
    ruled_out, certain = target.ids[5, 1:3].long()
    problem.bias.data[ruled_out] = -math.inf  # by the student, though it is an entry
    problem.bias.data[certain] = 300.0  # beyond any rounding: the rest underflows
    target.logprobs[0] = -math.inf  # a row with neither entries nor tail
    target.log_tail[:3] = -math.inf
    target.logprobs[1, 2:] = -math.inf
    target.logprobs[2] = torch.tensor([0.0] + [-math.inf] * (K - 1))
    output = problem.chunked(target=target, with_entropy=True)
    for total in (output.loss, output.soft_sum, output.hard_sum, output.student_entropy_sum):
        assert torch.isfinite(total)
    for gradient in gradients(output.loss, problem):
        assert torch.isfinite(gradient).all()


def test_a_tiny_rest_of_the_student_keeps_its_gradient():
    """log(1 - sum q) is 75 % off at q_tail = 1e-6 in float32; logsumexp over the rest is not."""
    problem = make_problem(labels=None)
    sharp = replace(
        problem, weight=problem.weight.detach() * 0.01, bias=problem.bias.detach() * 0.01
    )
    ids = problem.target().ids.long()
    kept = torch.zeros(V).index_fill(0, ids[5], 14.0).double()
    sharp = replace(sharp, bias=sharp.bias + kept).to(torch.float64)
    expected = gradients(sharp.reference(), sharp)
    narrow = sharp.to(torch.float32)
    assert_same_gradients(gradients(narrow.chunked().loss, narrow), expected, 1e-5)
