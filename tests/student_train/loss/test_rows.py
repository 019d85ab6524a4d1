"""Row losses against their formulas written out in float64."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from shared.errors import ConfigError
from student_train.loss.linear import linear_loss
from student_train.loss.rows import (
    SoftTarget,
    log_cells,
    merge_repeats,
    prepare_target,
    soft_rows,
    teacher_cells,
)
from student_train.loss.spec import LossSpec

P = [[0.5, 0.3, 0.15, 0.05], [0.9, 0.07, 0.02, 0.01]]  # the last cell is the tail
Q = [[0.2, 0.4, 0.1, 0.3], [0.7, 0.1, 0.1, 0.1]]


def float64(values: list) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def by_hand(name: str, p: list[float], q: list[float], beta: float) -> float:
    mixed = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return {
        "forward-kl": kl(p, q),
        "reverse-kl": kl(q, p),
        "jsd": beta * kl(p, mixed) + (1 - beta) * kl(q, mixed),
        "tvd": sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
        "mse": sum((math.log(a) - math.log(b)) ** 2 for a, b in zip(p[:-1], q[:-1], strict=True))
        / (len(p) - 1),
    }[name]


def rows(spec: LossSpec, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    return soft_rows(student, teacher_cells(teacher[:, :-1], teacher[:, -1]), spec)


@pytest.mark.parametrize(
    ("spec", "factor"),
    [
        (LossSpec(soft_loss="forward-kl", temperature=1), 1),
        (LossSpec(soft_loss="forward-kl", temperature=2), 4),
        (LossSpec(soft_loss="reverse-kl", temperature=4), 16),
        (LossSpec(soft_loss="jsd", temperature=2, jsd_beta=0.3), 4),
        (LossSpec(soft_loss="jsd", jsd_beta=0.5), 1),
        (LossSpec(soft_loss="tvd", temperature=4), 4),
        (LossSpec(soft_loss="mse"), 1),
    ],
)
def test_each_row_loss_equals_its_formula(spec, factor):
    teacher, student = float64(P).log(), float64(Q).log()
    pairs = zip(P, Q, strict=True)
    expected = [factor * by_hand(spec.soft_loss, p, q, spec.jsd_beta) for p, q in pairs]
    torch.testing.assert_close(rows(spec, student, teacher), float64(expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["forward-kl", "reverse-kl", "jsd", "tvd", "mse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_probability_on_either_side_stays_finite(name, dtype):
    infinite = -math.inf
    cells = [
        [0.0, infinite, infinite, infinite],
        [math.log(0.5), math.log(0.5), infinite, infinite],
    ]
    cells += [[infinite, infinite, infinite, 0.0], [infinite] * 4]
    for p, q in itertools.product(cells, cells[:3]):
        logits = torch.tensor([q], dtype=dtype, requires_grad=True)
        loss = rows(
            LossSpec(soft_loss=name),
            log_cells(logits[:, :-1], logits[:, -1]),
            torch.tensor([p], dtype=dtype),
        )
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert torch.isfinite(loss).all(), (p, q)
        assert torch.isfinite(gradient).all(), (p, q)


def test_reverse_kl_takes_the_teachers_tail_for_at_least_e_to_the_minus_14():
    student = float64([[0.9, 0.1]]).log()
    teacher = float64([[0.0, -math.inf]])
    expected = 0.9 * math.log(0.9) + 0.1 * (math.log(0.1) + 14)
    actual = rows(LossSpec(soft_loss="reverse-kl"), student, teacher)
    torch.testing.assert_close(actual, float64([expected]), rtol=1e-12, atol=0)


def target_of(p: list[float], tail: float, ratio: float | None = None) -> SoftTarget:
    return SoftTarget(
        torch.arange(len(p))[None],
        float64([p]).log(),
        float64([tail]).log(),
        None if ratio is None else float64([ratio]),
    )


def test_a_stored_temperature_goes_through_the_log_partition():
    full = float64([0.6, 0.2, 0.1, 0.06, 0.04])
    for temperature in (2.0, 4.0):
        tempered = full ** (1 / temperature)
        ratio = math.log(tempered.sum())
        tempered /= tempered.sum()
        spec = LossSpec(temperature=temperature)
        actual = prepare_target(target_of([0.6, 0.2], 0.2, ratio), None, spec)
        torch.testing.assert_close(actual.logprobs.exp()[0], tempered[:2], rtol=1e-6, atol=0)
        torch.testing.assert_close(actual.log_tail.exp()[0], tempered[2:].sum(), rtol=1e-6, atol=0)


def test_a_tempered_tail_is_at_least_a_millionth_unless_it_is_exactly_zero():
    spec = LossSpec(temperature=2)
    ratio = math.log(math.sqrt(0.5) * 2)
    kept_all = prepare_target(target_of([0.5, 0.5], 0.0, ratio), None, spec)
    almost_all = prepare_target(target_of([0.5, 0.5], 1e-9, ratio), None, spec)
    assert kept_all.log_tail.item() == -math.inf
    assert almost_all.log_tail.exp().item() == pytest.approx(1e-6)


def test_a_temperature_without_its_log_partition_is_refused():
    with pytest.raises(ConfigError, match="temperature 2"):
        prepare_target(target_of([0.5], 0.5), None, LossSpec(temperature=2))


def test_tail_none_and_renormalise():
    target = target_of([0.5, 0.25], 0.25)
    dropped = prepare_target(target, None, LossSpec(tail="none"))
    assert dropped.log_tail.item() == -math.inf
    torch.testing.assert_close(dropped.logprobs, target.logprobs)
    whole = prepare_target(target, None, LossSpec(tail="renormalise"))
    assert whole.log_tail.item() == -math.inf
    torch.testing.assert_close(whole.logprobs.exp(), float64([[2 / 3, 1 / 3]]))


def test_tail_label_adds_the_tail_to_the_label_and_leaves_unlabelled_rows_alone():
    two = SoftTarget(
        torch.tensor([[4, 7], [4, 7]]),
        float64([[0.5, 0.25], [0.5, 0.25]]).log(),
        float64([0.25, 0.25]).log(),
    )
    actual = prepare_target(two, torch.tensor([9, -100]), LossSpec(tail="label"))
    assert actual.ids[0].tolist() == [4, 7, 9]
    assert actual.logprobs[0].exp().tolist() == pytest.approx([0.5, 0.25, 0.25])
    assert actual.logprobs[1].exp().tolist() == pytest.approx([0.5, 0.25, 0.0])
    assert actual.log_tail.exp().tolist() == pytest.approx([0.0, 0.25])
    with pytest.raises(ConfigError, match="hard labels"):
        prepare_target(two, None, LossSpec(tail="label"))


def test_repeated_ids_are_added_up_and_unique_ones_keep_every_bit():
    logprobs = torch.tensor([[0.5, 0.125, 0.3, 0.075]]).log()
    owners = torch.tensor([[0, 3, 2, 3]])  # slots 1 and 3 hold the same id
    merged = merge_repeats(logprobs, owners)
    assert merged[0, [0, 2]].tolist() == logprobs[0, [0, 2]].tolist()
    assert merged.exp()[0, [1, 3]].tolist() == pytest.approx([0.0, 0.2])


@pytest.mark.parametrize(
    "wrong",
    [
        {"soft_loss": "kl"},
        {"tail": "drop"},
        {"temperature": 0.0},
        {"temperature": math.inf},
        {"jsd_beta": 1.0},
        {"soft_loss": "jsd", "tail": "label"},
        {"soft_loss": "mse", "temperature": 2.0},
    ],
)
def test_a_spec_that_makes_no_sense_cannot_be_built(wrong):
    with pytest.raises(ConfigError):
        LossSpec(**wrong)


class Waits(TorchDispatchMode):
    """Counts how often a tensor becomes a number of Python's: a GPU is waited for each time."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_target_that_knows_its_longest_position_waits_for_no_chunk():
    """On a GPU it finds that number once, when it is made; the loss is that of each chunk's own."""
    torch.manual_seed(0)
    counts = torch.randint(1, 6, (40,))
    ids = torch.cat([torch.randperm(50)[:count] for count in counts.tolist()])
    logprobs = torch.full((len(ids),), -2.5)
    options = {"labels_N": None, "spec": LossSpec(), "num_classes": 50, "chunk_rows": 8}
    states, weight = torch.randn(40, 16), torch.randn(50, 16)
    found = {}
    for most in (None, 5):
        log_tail = torch.full((40,), -1.0)
        target = SoftTarget(ids, logprobs, log_tail, None, counts, "adaptive", most_entries=most)
        with Waits() as waits:
            output = linear_loss(states, weight, None, target=target, **options)
        found[most] = waits.count, output.soft_sum
    assert found[None][0] == found[5][0] + 5  # chunks
    assert found[5][0] == 0
    torch.testing.assert_close(found[None][1], found[5][1])
