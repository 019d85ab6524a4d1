"""The loss from full logits against that in chunks, and against full distributions."""

import pytest
import torch

from student_train.loss.logits import logits_loss
from tests.student_train.loss.problem import (
    COUNTS,
    SPECS,
    C,
    assert_same_gradients,
    gradients,
    make_problem,
    name_of,
)


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
def test_entries_may_differ_in_number(spec):
    """1 to C - 1 of them."""
    problem = make_problem(spec=spec, counts=COUNTS)
    reference = problem.reference()
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
