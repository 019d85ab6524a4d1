"""How far the gradient that a student gets from a cache is from the one of the whole distribution.

The gradient of KL(teacher || student) at the student's logits is q - p. What a cache leaves of it:

    topk, adaptive   q_i - p_i of an entry, and q_i (1 - pb / qb) of a class in the tail, pb and qb
                     the tails of teacher and student (the bucket of `--tail bucket`)
    sample           q_i sum(w) - w_i, with the weights w of the draw, 0 where a class is no entry
    dense            q_i - p_i, p as it is stored

An error e is one of these minus q - p. What trains is not a position but a mean over a batch, so
errors are added up as the gradient of an output head, G = mean over positions of h e^T: what is
wrong everywhere in the same direction (a bias) stays however large the batch is, while what differs
from position to position (a deviation) shrinks with its square root.

Nobody knows the student yet. Its logits are the teacher's plus noise that follows the teacher's
state: s v^T W, v the unit vector of a few random projections of h, W a fixed standard normal matrix
and s such that KL is what was asked for. So such a student differs systematically, as a real one.

n positions of a chunk, C classes, D channels, R directions that h is projected on (all D where they
are few enough: norms are then exact, else estimates).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.targets.record import Target
from shared.targets.spec import TargetSpec

STUDENT_KLS = {"far": 2.0, "near": 0.1}  # nats
_NOISE_DIRECTIONS = 16
PARTS = 4
_MAX_SUMS_BYTES = 512 << 20  # of all gradients together
_LARGEST_SCALE = 64.0


@dataclass(frozen=True, slots=True)
class GradientError:
    """Relative to the norm of the whole gradient, over a batch of so many positions."""

    student_kl: float
    error: float
    bias: float  # what is left of the error however large the batch is
    deviation: float  # what shrinks with the square root of the batch


class Directions:
    """Fixed random matrices: what states are projected on, and the students' noise."""

    def __init__(self, width: int, num_classes: int, num_gradients: int) -> None:
        affordable = _MAX_SUMS_BYTES // (4 * num_classes * num_gradients)
        generator = torch.Generator().manual_seed(0)
        self.count = max(4, min(width, affordable))
        self.project_DR = torch.eye(width)
        if self.count < width:
            self.project_DR = torch.randn(width, self.count, generator=generator)
        self.noise_DM = torch.randn(width, _NOISE_DIRECTIONS, generator=generator)
        self.noise_MC = torch.randn(_NOISE_DIRECTIONS, num_classes, generator=generator)

    def noise(self, states_nD: Tensor) -> Tensor:
        """[n, C] of deviation 1."""
        where = states_nD.device
        v_nM = torch.nn.functional.normalize(states_nD.float() @ self.noise_DM.to(where), dim=1)
        return v_nM @ self.noise_MC.to(where)

    def project(self, states_nD: Tensor) -> Tensor:
        """[n, R]"""
        return states_nD.float() @ self.project_DR.to(states_nD.device)


def noise_scale(logp_nC: Tensor, noise_nC: Tensor, wanted_kl: float) -> float:
    """The s that gives this mean KL(teacher || student)."""
    low, high = 0.0, 1.0
    while high < _LARGEST_SCALE and mean_kl(logp_nC, logp_nC + high * noise_nC) < wanted_kl:
        low, high = high, 2 * high
    for _ in range(12):
        middle = (low + high) / 2
        if mean_kl(logp_nC, logp_nC + middle * noise_nC) < wanted_kl:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def mean_kl(logp_nC: Tensor, logits_nC: Tensor) -> float:
    """KL(teacher || student), nats."""
    terms_nC = logp_nC.exp() * (logp_nC - logits_nC.log_softmax(dim=1))
    return float(terms_nC.nan_to_num(0.0).sum(dim=1).mean())  # NaN: a masked class


def errors(logp_nC: Tensor, logq_nC: Tensor, target: Target, spec: TargetSpec) -> Tensor:
    """e [n, C]: the gradient at the student's logits from `target`, minus q - p."""
    p_nC, q_nC = logp_nC.exp(), logq_nC.exp()
    rows, ids, weights = _entries(target, logp_nC.device)
    w_nC = torch.zeros_like(p_nC)
    w_nC[rows, ids] = weights
    if spec.kind == "sample":
        return (w_nC.sum(dim=1, keepdim=True) - 1) * q_nC + p_nC - w_nC
    kept_nC = torch.zeros_like(p_nC, dtype=torch.bool)
    kept_nC[rows, ids] = True
    tail_n = torch.from_numpy(target.log_tail).to(p_nC.device).exp()
    rest_n = q_nC.masked_fill(kept_nC, 0.0).sum(dim=1)
    ratio_n = tail_n / rest_n.clamp_min(torch.finfo(torch.float32).tiny)
    return p_nC - torch.where(kept_nC, w_nC, q_nC * ratio_n[:, None])


def _entries(target: Target, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Position, class and weight of each entry, [E]."""
    positions = len(target.log_tail)
    counts = (
        torch.full((positions,), target.ids.shape[1])
        if target.counts is None
        else torch.from_numpy(target.counts).long()
    )
    rows = torch.repeat_interleave(torch.arange(positions), counts)
    ids = torch.from_numpy(target.ids.reshape(-1).astype("int64"))
    weights = torch.from_numpy(target.logprobs.reshape(-1)).exp()
    return rows.to(device), ids.to(device), weights.to(device)


class HeadGradient:
    """Sums of h e^T over positions dealt out to `PARTS` parts, whose errors are independent."""

    def __init__(self) -> None:
        self.sums: list[Tensor] = []  # [R, C] of each part
        self.counts = [0] * PARTS

    def add(self, projected_nR: Tensor, error_nC: Tensor) -> None:
        for part in range(PARTS):
            added = projected_nR[part::PARTS].T @ error_nC[part::PARTS]
            if len(self.sums) <= part:
                self.sums.append(torch.zeros_like(added))
            self.sums[part] += added
            self.counts[part] += len(error_nC[part::PARTS])

    def squares(self) -> tuple[float, float]:
        """Squared norm of the mean over all positions, and of what all parts share.

        The product of two parts' means is the latter on average, without bias; it counts as 0 where
        it is within two standard errors of 0 (of the products of all pairs).
        """
        flat = torch.stack([s.flatten() for s in self.sums])
        products = (flat @ flat.T).double()
        whole = float(products.sum()) / sum(self.counts) ** 2
        pairs = torch.stack(
            [
                products[i, j] / (self.counts[i] * self.counts[j])
                for i in range(PARTS)
                for j in range(i)
                if self.counts[i] and self.counts[j]
            ]
            or [torch.tensor(0.0), torch.tensor(0.0)]
        )
        shared = float(pairs.mean())
        noise = float(pairs.std()) / math.sqrt(len(pairs)) if len(pairs) > 1 else math.inf
        return whole, shared if shared > 2 * noise else 0.0


def relative(error: HeadGradient, whole: HeadGradient, student_kl: float) -> GradientError:
    """An error over the norm of the gradient of the whole distributions."""
    square, shared = error.squares()
    norm = math.sqrt(whole.squares()[0])
    if norm == 0:
        return GradientError(student_kl, 0.0, 0.0, 0.0)
    shared = min(shared, square)
    return GradientError(
        student_kl=student_kl,
        error=math.sqrt(square) / norm,
        bias=math.sqrt(shared) / norm,
        deviation=math.sqrt(square - shared) / norm,
    )
