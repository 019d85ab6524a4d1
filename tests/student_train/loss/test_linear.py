"""The chunked loss against full distributions in float64 that know nothing of chunks or cells.

Shapes: N positions, V logit width, C classes, K entries, D hidden.
"""

import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from shared.errors import ConfigError
from student_train.loss.logits import logits_loss
from student_train.loss.rows import SoftTarget
from student_train.loss.spec import LossSpec
from tests.student_train.loss.problem import (
    SPECS,
    C,
    D,
    K,
    N,
    Problem,
    V,
    assert_same_gradients,
    gradients,
    make_problem,
    name_of,
)


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
