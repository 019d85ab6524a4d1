"""A loss whose every probability is known, and what it is in full distributions, in float64.

The reference knows nothing of chunks, cells or entries.

Shapes: N positions, V logit width, C classes, K entries, D hidden.
"""

import itertools
import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from student_train.loss.linear import linear_loss
from student_train.loss.rows import SoftTarget
from student_train.loss.spec import LossSpec
from student_train.loss.terms import LossOutput

N, D, V, C, K = 11, 7, 23, 20, 5
COUNTS = [1, 3, 2, 5, 1, 1, C - 1, 4, 2, 7, 1]  # of entries, where they differ by position
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

    def to(self, dtype: torch.dtype, device: str = "cpu") -> "Problem":
        def leaf(tensor: Tensor) -> Tensor:
            return tensor.detach().to(device, dtype).requires_grad_()

        return replace(
            self,
            hidden=leaf(self.hidden),
            weight=leaf(self.weight),
            bias=None if self.bias is None else leaf(self.bias),
            teacher=self.teacher.to(device),
            labels=None if self.labels is None else self.labels.to(device),
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

    def chunked(self, **changes: object) -> LossOutput:
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
