"""Hidden-state losses against their formulas written out in float64."""

import pytest
import torch

from student_train.loss.hidden import PER_STATE, hidden_contrastive, hidden_cosine, hidden_mse
from tests.student_train.loss.test_rows import float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_hidden_mse_is_that_of_standardised_states(dtype):
    generator = torch.Generator().manual_seed(3)
    student = torch.randn(5, 4, generator=generator).to(dtype).requires_grad_()
    teacher = torch.randn(5, 4, generator=generator).to(dtype)
    mean = float64([0.3, -2.0, 7.0, 0.0])
    deviation = torch.tensor([0.5, 1.0, 4.0, 2.0])
    wide = student.detach().double(), teacher.double()
    standardised = [(states - mean) / deviation.double() for states in wide]
    expected = (standardised[0] - standardised[1]).square().mean(dim=1).sum()
    actual = hidden_mse(student, teacher, deviation)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=0)
    (gradient,) = torch.autograd.grad(actual, student)
    by_formula = 2 * (wide[0] - wide[1]) / deviation.double() ** 2 / 4
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-6  # the gradient is rounded to its dtype
    torch.testing.assert_close(gradient.double(), by_formula, rtol=rtol, atol=1e-6)


def test_a_dead_channel_does_not_divide_by_zero():
    student, teacher = torch.ones(2, 3, requires_grad=True), torch.zeros(2, 3)
    assert torch.isfinite(hidden_mse(student, teacher, torch.tensor([0.0, 1.0, 1.0])))
    assert hidden_mse(student, teacher, torch.zeros(3)).item() == 2


def test_hidden_cosine_is_summed_over_positions():
    student = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0]], requires_grad=True)
    teacher = torch.tensor([[0.0, 2.0], [3.0, 3.0], [1.0, 0.0]])
    loss = hidden_cosine(student, teacher, torch.ones(2))
    assert loss.item() == pytest.approx(1 + 0 + 1, abs=1e-6)
    (gradient,) = torch.autograd.grad(loss, student)
    assert torch.isfinite(gradient).all()


def test_hidden_cosine_equals_its_formula():
    generator = torch.Generator().manual_seed(4)
    student = torch.randn(6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    actual = hidden_cosine(student, teacher, torch.ones(5))
    (gradient,) = torch.autograd.grad(actual, student)
    s, t, expected, by_formula = student.detach(), teacher, 0.0, torch.zeros(6, 5).double()
    for n in range(6):
        lengths = s[n].square().sum().sqrt() * t[n].square().sum().sqrt()
        cosine = (s[n] * t[n]).sum() / lengths
        expected += 1 - cosine
        by_formula[n] = cosine * s[n] / s[n].square().sum() - t[n] / lengths
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradient, by_formula)


def dense_contrastive(student, teacher, rows, temperature):
    """InfoNCE written out row by row in float64, and its gradient by autograd of that alone."""
    numbers = sorted(set(rows.tolist()))
    pooled = [
        [torch.stack([x for x, r in zip(states, rows.tolist(), strict=True) if r == n]).mean(0)
         for n in numbers]
        for states in (student, teacher)
    ]  # fmt: skip
    total = torch.zeros((), dtype=torch.float64)
    for i, s in enumerate(pooled[0]):
        cosines = [(s @ t) / (s @ s).sqrt() / (t @ t).sqrt() / temperature for t in pooled[1]]
        total = total + torch.stack(cosines).exp().sum().log() - cosines[i]
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.05, 0.5])
def test_hidden_contrastive_equals_its_formula(dtype, temperature):
    """Rows of 3, 1, 0 and 2 states: the one without takes no part."""
    generator = torch.Generator().manual_seed(5)
    rows = torch.tensor([0, 0, 0, 1, 3, 3])
    student = torch.randn(6, 4, generator=generator).to(dtype).requires_grad_()
    teacher = torch.randn(6, 4, generator=generator).to(dtype)
    actual = hidden_contrastive(student, teacher, rows, 4, temperature)
    (gradient,) = torch.autograd.grad(actual, student)
    wide = student.detach().double().requires_grad_()
    expected = dense_contrastive(wide, teacher.double(), rows, temperature)
    (by_formula,) = torch.autograd.grad(expected, wide)
    torch.testing.assert_close(actual.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    rtol = 2**-8 if dtype == torch.bfloat16 else 1e-4  # the gradient is rounded to its dtype
    torch.testing.assert_close(gradient.double(), by_formula, rtol=rtol, atol=1e-4)


@pytest.mark.parametrize("count", [0, 3])
def test_hidden_contrastive_of_one_row_or_none_is_zero_with_no_gradient(count):
    student = torch.randn(count, 4, requires_grad=True)
    rows = torch.ones(count, dtype=torch.int64)
    loss = hidden_contrastive(student, torch.randn(count, 4), rows, 3, 0.05)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0
    assert gradient.abs().sum().item() == 0
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["mse", "cosine"])
def test_no_position_gives_zero(name):
    student = torch.zeros(0, 3, requires_grad=True)
    loss = PER_STATE[name](student, torch.zeros(0, 3), torch.ones(3))
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0
    assert gradient.shape == (0, 3)
