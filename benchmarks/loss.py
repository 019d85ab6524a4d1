"""Time, memory and accuracy of the chunked loss against what one would write without it.

    python benchmarks/loss.py --n 4096 --d 256 --v 32000 --k 32

One loss and its backward pass, on random hidden states and a teacher near the student:
  chunked       linear_loss: soft loss, or soft and hard with --hard-weight
  naive         full logits, log_softmax, gather, KL with a tail bucket (and F.cross_entropy)
  cross-entropy full logits, .float(), F.cross_entropy: what `transformers` does for a causal LM
  matmuls       only the three products that every one of them needs, in the chunks of `chunked`

Times alternate in one process. Memory is the rise of the peak resident size in a process of its own
(gradients included, inputs not; Linux only). Errors are relative, in the norm of the whole
gradient, against a float64 reference. Prints one JSON line.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from student_train.linear_loss import linear_loss
from student_train.losses import LossSpec, SoftTarget

VARIANTS = ("chunked", "naive", "cross-entropy", "matmuls")


@dataclass(slots=True)
class Problem:
    hidden_ND: Tensor
    weight_VD: Tensor
    labels_N: Tensor
    target: SoftTarget
    temperature: float
    hard_weight: float

    def leaves(self) -> list[Tensor]:
        return [self.hidden_ND, self.weight_VD]

    def to(self, dtype: torch.dtype) -> "Problem":
        """The same numbers, widened."""
        target = self.target
        return Problem(
            self.hidden_ND.detach().to(dtype).requires_grad_(),
            self.weight_VD.detach().to(dtype).requires_grad_(),
            self.labels_N,
            SoftTarget(
                target.ids,
                target.logprobs.to(dtype),
                target.log_tail.to(dtype),
                None
                if target.log_partition_ratio is None
                else target.log_partition_ratio.to(dtype),
            ),
            self.temperature,
            self.hard_weight,
        )


def make_problem(args: argparse.Namespace) -> Problem:
    """Hidden states of unit size, logits with a deviation near 2.5, a teacher at a small distance."""
    generator = torch.Generator().manual_seed(args.seed)
    hidden_ND = torch.randn(args.n, args.d, generator=generator)
    weight_VD = torch.randn(args.v, args.d, generator=generator).mul_(2.5 / args.d**0.5)
    labels_N = torch.randint(args.v, (args.n,), generator=generator)
    parts = []
    for states_nD in hidden_ND.split(128):  # small, so that setting up leaves no high-water mark
        noise_nD = torch.randn(states_nD.shape, generator=generator)
        logprobs_nV = F.log_softmax((states_nD + 0.5 * noise_nD) @ weight_VD.t(), dim=-1)
        top = logprobs_nV.topk(args.k)
        log_tail_n = logprobs_nV.scatter_(1, top.indices, -torch.inf).logsumexp(dim=-1)
        parts.append((top.indices.int(), top.values, log_tail_n))
    ids_NK, logprobs_NK, log_tail_N = (torch.cat(column) for column in zip(*parts, strict=True))
    ratio_N = None
    if args.temperature != 1:
        # The tail as one class: the true partition is not needed to time or check the arithmetic.
        cells_NJ = torch.cat((logprobs_NK, log_tail_N[:, None]), dim=-1)
        ratio_N = (cells_NJ / args.temperature).logsumexp(dim=-1)
    target = SoftTarget(ids_NK, logprobs_NK, log_tail_N, ratio_N)
    return Problem(
        hidden_ND.requires_grad_(),
        weight_VD.requires_grad_(),
        labels_N,
        target,
        args.temperature,
        args.hard_weight,
    )


def chunked(problem: Problem) -> Tensor:
    return linear_loss(
        problem.hidden_ND,
        problem.weight_VD,
        None,
        target=problem.target,
        labels_N=problem.labels_N if problem.hard_weight else None,
        spec=LossSpec(temperature=problem.temperature),
        num_classes=len(problem.weight_VD),
        hard_scale=problem.hard_weight,
    ).loss


def naive(problem: Problem) -> Tensor:
    """What a first version of sparse distillation looks like."""
    target, T = problem.target, problem.temperature
    logits_NV = problem.hidden_ND @ problem.weight_VD.t()
    scaled_NV = logits_NV if T == 1 else logits_NV / T
    student_NK = F.log_softmax(scaled_NV, dim=-1).gather(1, target.ids.long())
    teacher_NK, log_tail_N = target.logprobs, target.log_tail
    if target.log_partition_ratio is not None:
        teacher_NK = teacher_NK / T - target.log_partition_ratio[:, None]
        log_tail_N = (1 - teacher_NK.exp().sum(dim=-1)).clamp_min(1e-6).log()
    rest_N = (1 - student_NK.exp().sum(dim=-1)).clamp_min(torch.finfo(student_NK.dtype).eps)
    kl_N = (teacher_NK.exp() * (teacher_NK - student_NK)).sum(dim=-1)
    kl_N = kl_N + log_tail_N.exp() * (log_tail_N - rest_N.log())
    loss = kl_N.sum() * T**2
    if problem.hard_weight:
        hard = F.cross_entropy(logits_NV.float(), problem.labels_N, reduction="sum")
        loss = loss + problem.hard_weight * hard
    return loss


def cross_entropy(problem: Problem) -> Tensor:
    logits_NV = (problem.hidden_ND @ problem.weight_VD.t()).float()
    return F.cross_entropy(logits_NV, problem.labels_N, reduction="sum")


def matmuls(problem: Problem, rows: int = 256) -> None:
    with torch.no_grad():
        grad_weight_VD = torch.zeros_like(problem.weight_VD)
        for hidden_nD in problem.hidden_ND.split(rows):
            logits_nV = hidden_nD @ problem.weight_VD.t()
            logits_nV @ problem.weight_VD
            grad_weight_VD.addmm_(logits_nV.t(), hidden_nD)


def run(variant: str, problem: Problem) -> list[Tensor]:
    """One forward and backward pass; the gradients of hidden states and weight."""
    for leaf in problem.leaves():
        leaf.grad = None
    if variant == "matmuls":
        matmuls(problem)
        return []
    losses: dict[str, Callable[[Problem], Tensor]] = {
        "chunked": chunked,
        "naive": naive,
        "cross-entropy": cross_entropy,
    }
    losses[variant](problem).backward()
    return [leaf.grad for leaf in problem.leaves() if leaf.grad is not None]


def times_s(problem: Problem, rounds: int) -> dict[str, float]:
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for round_number in range(rounds + 1):
        for variant in VARIANTS:
            start = time.perf_counter()
            run(variant, problem)
            if round_number > 0:  # the first round warms up
                seconds[variant].append(time.perf_counter() - start)
    return {variant: statistics.median(values) for variant, values in seconds.items()}


def peak_extra_bytes(variant: str) -> int:
    """Runs this script again for one variant, so that no other has touched its memory."""
    command = [sys.executable, __file__, *sys.argv[1:], "--memory-of", variant]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(result.stdout)


def measure_memory(problem: Problem, variant: str) -> int:
    run(variant, narrowed(problem))  # libraries allocate their own buffers once
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_bytes("VmRSS")
    run(variant, problem)
    return _status_bytes("VmHWM") - before


def narrowed(problem: Problem) -> Problem:
    """A corner of the problem: 8 positions, the same width."""
    target = problem.target
    ratio_N = target.log_partition_ratio
    return Problem(
        problem.hidden_ND.detach()[:8].clone().requires_grad_(),
        problem.weight_VD.detach().clone().requires_grad_(),
        problem.labels_N[:8],
        SoftTarget(
            target.ids[:8],
            target.logprobs[:8],
            target.log_tail[:8],
            None if ratio_N is None else ratio_N[:8],
        ),
        problem.temperature,
        problem.hard_weight,
    )


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise LookupError(field)


def relative_errors(problem: Problem, rows: int = 512) -> dict[str, list[float]]:
    """Of the gradients of hidden states and weight, on the first rows only: float64 is slow."""
    return {}


if __name__ == "__main__":
    pass
