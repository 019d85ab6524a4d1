"""Time, memory and accuracy of the chunked loss against what one would write without it.

    python benchmarks/loss.py --n 4096 --d 256 --v 32000 --k 32

One loss and its backward pass, on random hidden states and a teacher near the student:
  chunked       linear_loss: soft loss, or soft and hard with --hard-weight
  frozen head   the same with a weight that is not trained, as under adapters
  naive         full logits, log_softmax, gather, KL with a tail bucket (and F.cross_entropy)
  cross-entropy full logits, .float(), F.cross_entropy: what `transformers` does for a causal LM
  matmuls       only the three products that every one of them needs, in chunks of 384 rows

Times alternate in one process. Memory is the rise of the peak resident size in a process of its own
(gradients included, inputs not; Linux only). Errors are relative, in the norm of the whole
gradient, against a float64 reference. Prints one JSON line.
"""

import argparse
import ctypes
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

from student_train.loss.linear import linear_loss
from student_train.loss.rows import SoftTarget
from student_train.loss.spec import LossSpec

VARIANTS = ("chunked", "frozen head", "naive", "cross-entropy", "matmuls")


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

    def first(self, rows: int, dtype: torch.dtype) -> "Problem":
        """The first positions only, copied."""
        target, ratio_N = self.target, self.target.log_partition_ratio
        return Problem(
            self.hidden_ND.detach()[:rows].to(dtype, copy=True).requires_grad_(),
            self.weight_VD.detach().to(dtype, copy=True).requires_grad_(),
            self.labels_N[:rows],
            SoftTarget(
                target.ids[:rows],
                target.logprobs[:rows].to(dtype),
                target.log_tail[:rows].to(dtype),
                None if ratio_N is None else ratio_N[:rows].to(dtype),
            ),
            self.temperature,
            self.hard_weight,
        )


def make_problem(args: argparse.Namespace) -> Problem:
    """Normal hidden states, logits with a deviation of 2.5, a teacher not far from the student."""
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


def matmuls(problem: Problem, rows: int = 384) -> None:
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
        "frozen head": chunked,
        "naive": naive,
        "cross-entropy": cross_entropy,
    }
    problem.weight_VD.requires_grad_(variant != "frozen head")
    losses[variant](problem).backward()
    problem.weight_VD.requires_grad_()
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
    run(variant, problem.first(8, torch.float32))  # libraries allocate buffers of their own once
    ctypes.CDLL(None).malloc_trim(0)  # memory freed but kept by glibc would be used again, unseen
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_bytes("VmRSS")
    run(variant, problem)
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) << 10
    raise LookupError(field)


def relative_errors(problem: Problem, rows: int = 1024) -> dict[str, dict[str, float]]:
    """Of the loss and both gradients in float32, over the first rows, against float64."""
    part = problem.first(rows, torch.float32)
    wide = problem.first(rows, torch.float64)
    exact_loss = naive(wide)
    exact = torch.autograd.grad(exact_loss, wide.leaves())
    errors = {}
    for name, loss_of in (("chunked", chunked), ("naive", naive)):
        loss = loss_of(part)
        found = torch.autograd.grad(loss, part.leaves())
        pairs = [(loss, exact_loss), *zip(found, exact, strict=True)]
        relative = [
            float((one - other).norm().detach() / other.norm().detach()) for one, other in pairs
        ]
        errors[name] = dict(zip(("loss", "grad_hidden", "grad_weight"), relative, strict=True))
    return errors


def report(args: argparse.Namespace, problem: Problem) -> dict[str, object]:
    memory = {variant: peak_extra_bytes(variant) for variant in VARIANTS}
    seconds = times_s(problem, args.rounds)
    others = tuple(variant for variant in VARIANTS if variant != "chunked")
    return {
        "benchmark": "loss",
        "command": " ".join(sys.argv),
        "hardware": f"{_processor()}, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "shape": {"n": args.n, "d": args.d, "v": args.v, "k": args.k, "dtype": "float32"},
        "temperature": args.temperature,
        "hard_weight": args.hard_weight,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "time_ratio": {name: round(seconds["chunked"] / seconds[name], 3) for name in others},
        "extra_mib": {name: round(value / 2**20, 1) for name, value in memory.items()},
        "memory_ratio": {name: round(memory["chunked"] / memory[name], 4) for name in others},
        "relative_error": relative_errors(problem),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=4096, help="positions")
    parser.add_argument("--d", type=int, default=256, help="width of the hidden states")
    parser.add_argument("--v", type=int, default=32_000, help="classes")
    parser.add_argument("--k", type=int, default=32, help="entries per position")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--hard-weight", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds; the median is shown")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-of", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    problem = make_problem(args)
    if args.memory_of is not None:
        print(measure_memory(problem, args.memory_of))
    else:
        print(json.dumps(report(args, problem)))


if __name__ == "__main__":
    main()
