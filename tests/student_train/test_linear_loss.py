"""The chunked loss against full distributions in float64 that know nothing of chunks or cells.

Shapes: N positions, V logit width, C classes, K entries, D hidden.
"""

import itertools
import math
import subprocess
import sys
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from shared.errors import ConfigError
from student_train.loss.linear import LinearLossOutput, linear_loss, logits_loss
from student_train.loss.rows import SoftTarget
from student_train.loss.spec import LossSpec

N, D, V, C, K = 11, 7, 23, 20, 5
SPECS = [
    LossSpec(soft_loss=loss, tail=tail, temperature=temperature, jsd_beta=0.3)
    for loss, tail in [
        *itertools.product(["forward-kl"], ["bucket", "label", "none", "renormalise"]),
        *itertools.product(["reverse-kl", "jsd", "tvd", "mse"], ["bucket"]),
    ]
    for temperature in ([1.0] if loss == "mse" else [1.0, 2.0, 4.0])
]
SPECS += [LossSpec(temperature=temperature, label_smoothing=0.2) for temperature in (1.0, 2.0)]


def name_of(spec: LossSpec) -> str:
    smooth = "-smooth" if spec.label_smoothing else ""
    return f"{spec.soft_loss}-{spec.tail}-{spec.temperature:g}{smooth}"


@dataclass(kw_only=True)
class Problem:
    """A head, hidden states, and a teacher whose every probability is known."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher: Tensor  # [N, C], probabilities at T = 1
    labels: Tensor | None
    spec: LossSpec
    top_k: int = K
    classes: int = C
    logit_scale: float = 1.0
    softcap: float | None = None
    soft_scale: float = 0.7
    hard_scale: float = 0.4
    with_entropy: bool = False
    counts: list[int] | None = None  # entries of each position, where they differ

    def to(self, dtype: torch.dtype) -> "Problem":
        return replace(
            self,
            hidden=self.hidden.detach().to(dtype).requires_grad_(),
            weight=self.weight.detach().to(dtype).requires_grad_(),
            bias=None if self.bias is None else self.bias.detach().to(dtype).requires_grad_(),
        )

    def leaves(self) -> list[Tensor]:
        return [leaf for leaf in (self.hidden, self.weight, self.bias) if leaf is not None]

    def target(self) -> SoftTarget:
        """Entries and tail by sorting; the tail summed over the classes that are in it."""
        probability, ids = self.teacher.sort(dim=1, descending=True)
        ratio = (self.teacher ** (1 / self.spec.temperature)).sum(dim=1).log()
        if self.counts is not None:
            rows = list(enumerate(self.counts))
            return SoftTarget(
                torch.cat([ids[n, :k].flip(0) for n, k in rows]).int(),
                torch.cat([probability[n, :k].flip(0) for n, k in rows]).log(),
                torch.stack([probability[n, k:].sum() for n, k in rows]).log(),
                ratio,
                torch.tensor(self.counts, dtype=torch.int32),
                "adaptive",
            )
        return SoftTarget(
            ids[:, : self.top_k].int(),
            probability[:, : self.top_k].log(),
            probability[:, self.top_k :].sum(dim=1).log(),
            ratio,
        )

    def chunked(self, **changes: object) -> LinearLossOutput:
        options = {
            "target": changes.pop("target") if "target" in changes else self.target(),
            "labels_N": self.labels,
            "spec": self.spec,
            "num_classes": self.classes,
            "soft_scale": self.soft_scale,
            "hard_scale": self.hard_scale,
            "logit_scale": self.logit_scale,
            "softcap": self.softcap,
            "chunk_rows": 4,
            "with_entropy": self.with_entropy,
        }
        return linear_loss(self.hidden, self.weight, self.bias, **(options | changes))

    def logits(self) -> Tensor:
        logits = F.linear(self.hidden, self.weight, self.bias) * self.logit_scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits

    def reference(self) -> Tensor:
        """The loss, row by row and class by class, from full distributions over C classes."""
        soft = sum(self._soft_row(n) for n in range(len(self.hidden)))
        hard = self.hidden.new_zeros(())
        if self.labels is not None:
            logits = self.logits()[:, : self.classes]
            smoothing = {"label_smoothing": self.spec.label_smoothing, "reduction": "sum"}
            hard = F.cross_entropy(logits, self.labels, ignore_index=-100, **smoothing)
        return self.soft_scale * soft + self.hard_scale * hard

    def _soft_row(self, n: int) -> Tensor:
        spec, T = self.spec, self.spec.temperature
        q = (self.logits()[n, : self.classes] / T).softmax(dim=0)
        p = self.teacher[n] ** (1 / T)
        p = p / p.sum()
        order = self.teacher[n].argsort(descending=True).tolist()
        k = self.top_k if self.counts is None else self.counts[n]
        kept, others = order[:k], order[k:]
        p_tail, q_tail = p[others].sum(), q[others].sum()
        if T != 1 and others:
            p_tail = p_tail.clamp_min(1e-6)  # DESIGN: what a cache can know of a tempered tail
        cells = [(p[c], q[c]) for c in kept]
        label = -100 if self.labels is None else int(self.labels[n])
        if spec.tail == "label" and label >= 0:
            if label in kept:
                slot = kept.index(label)
                cells[slot] = (cells[slot][0] + p_tail, cells[slot][1])
            else:
                cells.append((p_tail, q[label]))
        elif spec.tail == "renormalise":
            total = sum(a for a, _ in cells)
            cells = [(a / total, b) for a, b in cells]
        elif spec.tail in ("bucket", "label") and others:
            cells.append((p_tail, q_tail))
        beta = spec.jsd_beta
        if spec.soft_loss == "forward-kl":
            return T**2 * sum(a * (a / b).log() for a, b in cells)
        if spec.soft_loss == "reverse-kl":
            floored = [(a.clamp_min(math.exp(-14)) if b is q_tail else a, b) for a, b in cells]
            return T**2 * sum(b * (b / a).log() for a, b in floored)
        if spec.soft_loss == "jsd":
            mixed = [beta * a + (1 - beta) * b for a, b in cells]
            terms = zip(cells, mixed, strict=True)
            return T**2 * sum(
                beta * a * (a / m).log() + (1 - beta) * b * (b / m).log() for (a, b), m in terms
            )
        if spec.soft_loss == "tvd":
            return T * sum((a - b).abs() for a, b in cells) / 2
        return sum((q[c].log() - p[c].log()) ** 2 for c in kept) / len(kept)


def make_problem(seed: int = 0, rows: int = N, **changes: object) -> Problem:
    """Tail masses go evenly from 1e-9 to 0.5; some labels are entries, some not, some missing."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    teacher = (2 * randn(rows, C)).softmax(dim=1)
    tails = torch.logspace(-9, math.log10(0.5), rows, dtype=torch.float64)[:, None]
    kept = torch.zeros_like(teacher).scatter(1, teacher.topk(K).indices, 1.0)
    in_tail = teacher * (1 - kept)
    teacher = teacher * kept / (teacher * kept).sum(1, keepdim=True) * (1 - tails)
    # Spread no tail class above an entry: at 0.5 its 15 classes share what 5 entries have.
    teacher = teacher.clamp_min(1e-3 * kept) + in_tail / in_tail.sum(1, keepdim=True) * tails
    teacher = teacher / teacher.sum(1, keepdim=True)
    labels = torch.randint(C, (rows,), generator=generator)
    labels[::4] = teacher.argmax(1)[::4]
    labels[2::5] = -100
    problem = Problem(
        hidden=randn(rows, D).requires_grad_(),
        weight=randn(V, D).requires_grad_(),
        bias=randn(V).requires_grad_(),
        teacher=teacher,
        labels=labels,
        spec=LossSpec(),
    )
    return replace(problem, **changes)


def gradients(loss: Tensor, problem: Problem) -> list[Tensor]:
    return list(torch.autograd.grad(loss, problem.leaves()))


def assert_same_gradients(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """In the norm of the whole tensor: a single element may be a difference of large ones."""
    for one, other in zip(actual, expected, strict=True):
        error = (one.double() - other.double()).norm() / other.double().norm()
        assert error <= tolerance, error


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_value_and_gradients_equal_the_dense_reference(spec):
    problem = make_problem(spec=spec)
    reference = problem.reference()
    expected = gradients(reference, problem)
    loss = problem.chunked().loss
    # The reference itself forms the tail as exp of logs: 1e-11 of slack for float64.
    torch.testing.assert_close(loss, reference, rtol=1e-11, atol=1e-12)
    assert_same_gradients(gradients(loss, problem), expected, 1e-11)
    narrow = problem.to(torch.float32)
    narrow_loss = narrow.chunked().loss
    torch.testing.assert_close(narrow_loss.double(), reference, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(narrow_loss, narrow), expected, 1e-5)


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


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_the_loss_from_full_logits_is_the_same(spec):
    problem = make_problem(spec=spec, with_entropy=True)
    logits = problem.logits()
    before = logits.detach().clone()
    dense = logits_loss(
        logits,
        target=problem.target(),
        labels_N=problem.labels,
        spec=spec,
        num_classes=C,
        soft_scale=problem.soft_scale,
        hard_scale=problem.hard_scale,
        with_entropy=True,
    )
    chunked = problem.chunked()
    for field in ("loss", "soft_sum", "hard_sum", "agreement", "student_entropy_sum"):
        torch.testing.assert_close(getattr(dense, field), getattr(chunked, field))
    expected = gradients(chunked.loss, problem)
    assert_same_gradients(gradients(dense.loss, problem), expected, 1e-11)
    assert torch.equal(logits, before)  # PEERS: an in-place step once edited the model's output


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_backward_is_the_slope_of_the_returned_value(spec):
    """PEERS: T^2 in the value but not in the gradient."""
    problem = make_problem(spec=spec)
    generator = torch.Generator().manual_seed(1)
    directions = [
        torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for leaf in problem.leaves()
    ]
    slopes = gradients(problem.chunked().loss, problem)
    expected = sum((a * b).sum() for a, b in zip(slopes, directions, strict=True))
    step, values = 1e-6, []
    for sign in (1, -1):
        moved = [
            (leaf + sign * step * direction).detach()
            for leaf, direction in zip(problem.leaves(), directions, strict=True)
        ]
        shifted = replace(problem, hidden=moved[0], weight=moved[1], bias=moved[2])
        values.append(shifted.chunked().loss)
    # A central difference is off by step^2 and by 1e-16 / step; both are near 1e-10.
    torch.testing.assert_close((values[0] - values[1]) / (2 * step), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
def test_keeping_every_class_equals_dense_kl(temperature):
    problem = make_problem(spec=LossSpec(temperature=temperature), top_k=C, labels=None)
    student = (problem.logits()[:, :C] / temperature).log_softmax(dim=1)
    teacher = (problem.teacher.log() / temperature).log_softmax(dim=1)
    dense = F.kl_div(student, teacher, log_target=True, reduction="sum") * temperature**2
    output = problem.chunked()
    torch.testing.assert_close(output.soft_sum, dense.detach(), rtol=1e-11, atol=0)
    assert_same_gradients(gradients(output.loss, problem), gradients(0.7 * dense, problem), 1e-11)


@pytest.mark.parametrize("spec", [s for s in SPECS if s.tail == "bucket"], ids=name_of)
def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient(spec):
    problem = make_problem(spec=spec, labels=None, soft_scale=1.0)
    problem = replace(problem, teacher=problem.logits().detach()[:, :C].softmax(dim=1))
    for case, tolerance in ((problem, 1e-13), (problem.to(torch.float32), 1e-5)):
        loss = case.chunked().loss
        assert abs(loss.item()) <= tolerance
        if spec.soft_loss != "tvd":  # its slope jumps at 0, in the direction of rounding
            for gradient in gradients(loss, case):
                assert gradient.abs().max() <= tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_chunk_size_does_not_matter(dtype, temperature):
    problem = make_problem(rows=29, spec=LossSpec(temperature=temperature)).to(dtype)
    whole = problem.chunked(chunk_rows=29, with_entropy=True)
    expected = gradients(whole.loss, problem)
    tolerance = 1e-13 if dtype == torch.float64 else 1e-6  # only the order of sums differs
    for rows in (1, 7, 512, None):
        output = problem.chunked(chunk_rows=rows, with_entropy=True)
        torch.testing.assert_close(output.loss, whole.loss, rtol=tolerance, atol=0)
        assert_same_gradients(gradients(output.loss, problem), expected, tolerance)
        assert output.agreement == whole.agreement


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


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, math.nan])
def test_a_smoothing_that_leaves_the_label_nothing_is_refused(smoothing):
    with pytest.raises(
        ConfigError, match=r"--label-smoothing .*: expected a number from 0 to below"
    ):
        LossSpec(label_smoothing=smoothing)


def test_scales_may_be_tensors():
    problem = make_problem()
    scaled = problem.chunked(soft_scale=torch.tensor(0.7), hard_scale=torch.tensor(0.4))
    # 0.7 was rounded to float32.
    torch.testing.assert_close(scaled.loss, problem.chunked().loss, rtol=1e-7, atol=0)


def test_columns_beyond_the_classes_change_nothing_and_get_no_gradient():
    """PEERS: a padded vocabulary that took part in the softmax."""
    problem = make_problem()
    loud = problem.to(torch.float64)
    loud.weight.data[C:] = 1e3
    loud.bias.data[C:] = math.inf
    expected, actual = problem.chunked().loss, loud.chunked().loss
    assert torch.equal(actual, expected)
    _, weight, bias = gradients(actual, loud)
    assert not weight[C:].any()
    assert not bias[C:].any()
    assert weight[:C].all()


@pytest.mark.parametrize("spec", SPECS, ids=name_of)
def test_mass_off_the_kept_ids_is_pressed_on(spec):
    """PEERS: both sides renormalised, so that nothing outside the entries was ever corrected."""
    problem = make_problem(spec=spec)
    ids = problem.target().ids.long()
    logits = problem.logits().detach()[:, :C].requires_grad_()
    output = logits_loss(
        logits,
        target=problem.target(),
        labels_N=problem.labels,
        spec=spec,
        num_classes=C,
        hard_scale=0.0,
    )
    (gradient,) = torch.autograd.grad(output.loss, logits)
    off = torch.ones_like(gradient, dtype=torch.bool).scatter(1, ids, False)
    assert gradient[off].abs().min() > 0


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
@pytest.mark.parametrize("compute", ["chunked", "full"])
def test_entries_may_differ_in_number(spec, compute):
    """1 to C - 1 of them, so that chunks differ in their widest position."""
    counts = [1, 3, 2, 5, 1, 1, C - 1, 4, 2, 7, 1]
    problem = make_problem(spec=spec, counts=counts)
    reference = problem.reference()
    if compute == "chunked":
        loss = problem.chunked().loss
    else:
        loss = logits_loss(
            problem.logits(),
            target=problem.target(),
            labels_N=problem.labels,
            spec=spec,
            num_classes=C,
            soft_scale=problem.soft_scale,
            hard_scale=problem.hard_scale,
        ).loss
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


@pytest.mark.parametrize("temperature", [0.05, 0.7, 2.5, 20.0])
def test_a_dense_target_is_exact_at_any_temperature(temperature):
    problem = make_problem(spec=LossSpec(temperature=temperature), top_k=C)
    every_C = torch.arange(C).expand(N, C)
    target = SoftTarget(
        every_C, problem.teacher.log(), problem.teacher.new_full((N,), -math.inf), kind="dense"
    )
    reference = problem.reference()
    loss = problem.chunked(target=target).loss
    torch.testing.assert_close(loss, reference, rtol=1e-11, atol=1e-12)
    assert_same_gradients(gradients(loss, problem), gradients(reference, problem), 1e-11)


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


def test_no_position_gives_zero_and_zero_gradients():
    problem = make_problem()
    empty = replace(
        problem,
        hidden=torch.zeros(0, D, dtype=torch.float64, requires_grad=True),
        teacher=problem.teacher[:0],
        labels=problem.labels[:0],
    )
    for temperature in (1.0, 2.0):
        loss = replace(empty, spec=LossSpec(temperature=temperature)).chunked().loss
        assert loss.item() == 0
        assert not any(gradient.any() for gradient in gradients(loss, empty))


def test_nothing_to_learn_gives_zero_and_zero_gradients():
    problem = make_problem()
    problem.bias.data[0] = 50.0  # no agreement with a class that nobody named
    nothing = torch.full((N,), -100)
    for labels in (None, nothing):
        output = problem.chunked(target=None, labels_N=labels)
        assert output.loss.item() == 0
        assert output.agreement == 0
        assert not any(gradient.any() for gradient in gradients(output.loss, problem))


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_a_batch_in_parts_has_the_same_summed_gradient(parts):
    """PEERS: a mean over each micro-batch."""
    problem = make_problem(rows=28)
    expected = gradients(problem.chunked().loss, problem)
    for leaf in problem.leaves():
        leaf.grad = None
    for rows in torch.arange(28).chunk(parts):
        part = replace(
            problem,
            hidden=problem.hidden[rows],
            teacher=problem.teacher[rows],
            labels=problem.labels[rows],
        )
        part.chunked().loss.backward()
    assert_same_gradients([leaf.grad for leaf in problem.leaves()], expected, 1e-12)


def test_a_tied_head_gets_both_gradients():
    problem = make_problem()
    tokens = torch.arange(N)
    embedding = torch.nn.Parameter(problem.weight.detach().clone())
    results = []
    for of in (Problem.reference, lambda case: case.chunked().loss):
        case = replace(problem, hidden=torch.tanh(embedding[tokens]), weight=embedding)
        results.append(torch.autograd.grad(of(case), embedding)[0])
    assert_same_gradients(results[1:], results[:1], 1e-11)


class Allocations(TorchDispatchMode):
    """Sizes, in elements, of all tensors that operations return."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor)]
        self.sizes += [tuple(tensor.shape) for tensor in tensors]
        return result


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_no_tensor_is_as_large_as_positions_times_classes(temperature):
    rows, chunk_rows, width = 300, 8, V
    problem = make_problem(rows=rows, spec=LossSpec(temperature=temperature))
    target = problem.target()
    with Allocations() as seen:
        loss = problem.chunked(chunk_rows=chunk_rows, target=target, with_entropy=True).loss
        loss.backward()
    largest = max(math.prod(shape) for shape in seen.sizes)
    assert largest <= max(rows * D, chunk_rows * width, width * D, rows * (K + 1))
    assert largest < rows * C


_MEMORY = """
import resource, torch
from student_train.loss.linear import linear_loss
from student_train.loss.spec import LossSpec
from student_train.loss.rows import SoftTarget
torch.set_num_threads(1)
V, D, K = 32000, 16, 4
weight = torch.randn(V, D, requires_grad=True)
def peak(N):
    logprobs = torch.full((N, K), -2.0)
    target = SoftTarget(torch.arange(K).expand(N, K), logprobs, torch.full((N,), -0.8))
    hidden = torch.randn(N, D, requires_grad=True)
    linear_loss(hidden, weight, None, target=target, labels_N=torch.arange(N), spec=LossSpec(),
        num_classes=V, with_entropy=True).loss.backward()
    assert hidden.grad.any()
    weight.grad = None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
print(peak(1024), peak(4096))
"""


def test_four_times_the_positions_take_no_logits_more():
    """Peak memory from outside: more of [N, D], while [N, V] would grow by 393 MB."""
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    few, many = map(int, done.stdout.split())
    assert many - few < 3072 * 32000 * 4 / 20


def test_a_frozen_head_costs_no_weight_gradient():
    problem = make_problem()
    expected = gradients(problem.chunked().loss, problem)[0]
    frozen = replace(problem, weight=problem.weight.detach(), bias=problem.bias.detach())
    with Allocations() as seen:
        loss = frozen.chunked().loss
        (gradient,) = torch.autograd.grad(loss, frozen.hidden)
    assert torch.equal(gradient, expected)
    # Slices and transposes of the weight are views; a buffer would have all V rows.
    assert (V, D) not in seen.sizes


def test_a_frozen_trunk_still_trains_the_head():
    problem = make_problem()
    expected = gradients(problem.chunked().loss, problem)[1:]
    frozen = replace(problem, hidden=problem.hidden.detach())
    actual = torch.autograd.grad(frozen.chunked().loss, [frozen.weight, frozen.bias])
    assert_same_gradients(list(actual), expected, 1e-13)


def test_evaluation_makes_no_gradients():
    problem = make_problem()
    expected = problem.chunked().loss.detach()
    with torch.no_grad(), Allocations() as seen:
        output = problem.chunked()
    assert torch.equal(output.loss, expected)
    assert not output.loss.requires_grad
    assert not {(N, D), (V, D)} & set(seen.sizes)


def test_inputs_are_left_as_they_were():
    problem = make_problem(softcap=2.0, spec=LossSpec(temperature=2.0), with_entropy=True)
    target = problem.target()
    tensors = [*problem.leaves(), problem.labels, target.ids, target.logprobs, target.log_tail]
    before = [tensor.detach().clone() for tensor in tensors]
    problem.chunked(target=target).loss.backward()
    assert all(torch.equal(*pair) for pair in zip(tensors, before, strict=True))


def test_the_incoming_gradient_multiplies():
    problem = make_problem()
    expected = gradients(problem.chunked().loss, problem)
    actual = gradients(problem.chunked().loss * -3.0, problem)
    assert_same_gradients(actual, [-3 * gradient for gradient in expected], 1e-14)


def test_a_second_backward_is_refused_not_wrong():
    problem = make_problem()
    loss = problem.chunked().loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="compute the loss again"):
        loss.backward()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_bfloat16_is_as_close_as_its_products_allow(temperature):
    problem = make_problem(rows=64, spec=LossSpec(temperature=temperature))
    rounded = problem.to(torch.bfloat16).to(torch.float64)
    reference = gradients(rounded.reference(), rounded)
    plain = rounded.to(torch.bfloat16)
    loss = plain.chunked(chunk_rows=8).loss
    actual = gradients(loss, plain)
    assert loss.dtype == torch.float32
    assert [gradient.dtype for gradient in actual] == [torch.bfloat16] * 3
    # One rounding of logits near 5 is 2^-7 of them; gradients are differences of probabilities.
    assert_same_gradients(actual, reference, 2e-2)


def test_autocast_runs_the_products_in_its_dtype_and_keeps_the_parameters():
    problem = make_problem(rows=64).to(torch.float32)
    expected = gradients(problem.chunked().loss, problem)
    with torch.autocast("cpu", dtype=torch.bfloat16), Allocations():
        hidden = problem.hidden.bfloat16()
        loss = replace(problem, hidden=hidden).chunked().loss
    actual = gradients(loss, problem)
    assert [gradient.dtype for gradient in actual] == [torch.float32] * 3
    assert_same_gradients(actual, expected, 2e-2)
    assert not torch.equal(actual[1], expected[1])
