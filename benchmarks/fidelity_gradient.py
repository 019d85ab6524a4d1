"""How far the gradient of a cached target is from that of the whole distribution, without training.

The distributions are those of `--samples` (safetensors with `ids` [N, M] by descending probability,
`logits`, `lse`, `next_token`). Only M classes of each position are known: the mass of the others is
spread over them in proportion to how often a class is among the M anywhere, none above the M-th.

A position's state h [D] is 1 and a random projection of the square roots of its probabilities, so
that like positions have like states, as in a model. Students have these logits:
  KL 3, KL 0.1   ln p + a random head: scale h R / sqrt(D), R normal; the scale gives that mean KL
  unigram        ln of the class frequencies, the same at every position: before much is learnt

G = mean over positions of dL/dz h^T is the gradient of the output head, [C, D]; every kind goes
through select, codec and the loss of the product. With E its difference to full KL's G, relative to
|G|: total = |E| over all S segments; bias = what is left of it over infinitely many segments and
draws, bias^2 = (|sum E_s|^2 - sum |E_s|^2) / (S (S - 1)); deviation^2 = total^2 - bias^2, which
falls as 1/positions. A bias within its noise of 0 may come out as the root of a negative number:
it is then shown as 0.

N positions, n of a segment, M classes known of each, C classes, D channels, J directions.
"""

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from shared.targets.base import TargetKind
from shared.targets.record import ClassRanks, Target
from shared.targets.spec import TargetSpec
from student_train.loss.logits import logits_loss
from student_train.loss.rows import SoftTarget
from student_train.loss.spec import LossSpec, Tail
from teacher_cache.select.kinds import SELECTORS
from teacher_cache.select.targets import select

SEGMENT = 128  # consecutive tokens, as in the files
CHANNELS = 32
CHECKED_POSITIONS, CHECKED_DRAWS, DIRECTIONS = 64, 1000, 8
KINDS: tuple[tuple[str, TargetKind, Tail], ...] = (
    ("topk renormalised", "topk", "renormalise"),
    ("topk + bucket", "topk", "bucket"),
    ("topk + label", "topk", "label"),
    ("adaptive + bucket", "adaptive", "bucket"),
    ("sample", "sample", "bucket"),
)


@dataclass(slots=True)
class Distributions:
    """A teacher's distributions at N positions, and what is made of them once."""

    num_classes: int
    ids_NM: Tensor  # int64, by descending probability
    probs_NM: Tensor  # float32
    labels_N: Tensor  # int64
    frequency_C: Tensor  # float32, sums to 1
    ranks: ClassRanks
    states_ND: Tensor  # float32

    def log_probs(self, rows: slice) -> Tensor:
        """Over every class, float32 [n, C]."""
        ids_nM, probs_nM = self.ids_NM[rows], self.probs_NM[rows]
        rest_n1 = (1 - probs_nM.double().sum(dim=1, keepdim=True)).clamp_min(1e-7).float()
        rest_nC = self.frequency_C.expand(len(ids_nM), -1).scatter(1, ids_nM, 0.0)
        rest_nC *= rest_n1 / rest_nC.sum(dim=1, keepdim=True)
        rest_nC = torch.minimum(rest_nC, probs_nM[:, -1:])
        rest_nC *= rest_n1 / rest_nC.sum(dim=1, keepdim=True)
        return rest_nC.scatter(1, ids_nM, probs_nM).log().log_softmax(dim=1)


Student = Callable[[slice, Tensor], Tensor]  # rows, the teacher's log-probabilities -> logits


def load(path: Path, positions: int) -> Distributions:
    """The first positions of a file; everything random has a fixed seed."""
    with safe_open(path, "np") as file:
        num_classes = int(file.metadata()["vocab_size"])
        ids_NM = file.get_tensor("ids").astype(np.int64)[:positions]
        log_p = file.get_tensor("logits").astype(np.float64) - file.get_tensor("lse")[:, None]
        labels_N = file.get_tensor("next_token").astype(np.int64)[:positions]
    probs_NM = torch.from_numpy(np.exp(log_p[:positions]).astype(np.float32))
    counts_C = np.bincount(ids_NM.ravel(), minlength=num_classes)
    frequency_C = torch.from_numpy((counts_C + 0.5) / (counts_C + 0.5).sum()).float()
    projection = torch.randn(num_classes, CHANNELS - 1, generator=torch.Generator().manual_seed(0))
    ids = torch.from_numpy(ids_NM)
    parts = [
        torch.einsum("nm,nmd->nd", probs_NM[rows].sqrt(), projection[ids[rows]])
        for rows in segments(len(ids))
    ]
    states_ND = torch.cat(parts)
    states_ND = (states_ND - states_ND.mean(dim=0)) / states_ND.std(dim=0)
    states_ND = torch.cat((torch.ones(len(ids), 1), states_ND), dim=1)
    ranks = ClassRanks.from_counts(counts_C)
    labels = torch.from_numpy(labels_N)
    return Distributions(num_classes, ids, probs_NM, labels, frequency_C, ranks, states_ND)


def segments(positions: int) -> Iterator[slice]:
    """Whole segments only."""
    yield from (slice(i, i + SEGMENT) for i in range(0, positions - SEGMENT + 1, SEGMENT))


# ---- students


def students_for(data: Distributions) -> dict[str, Student]:
    """The three students of the head of this file."""
    generator = torch.Generator().manual_seed(1)
    head_DC = torch.randn(CHANNELS, data.num_classes, generator=generator) / math.sqrt(CHANNELS)
    frequency_C = data.frequency_C.log()
    some = slice(0, None, max(1, len(data.ids_NM) // 64))

    def near(scale: float) -> Student:
        return lambda rows, logp_nC: torch.addmm(
            logp_nC, data.states_ND[rows], head_DC, alpha=scale
        )

    def kl(scale: float) -> float:
        logp_nC = data.log_probs(some)
        logq_nC = near(scale)(some, logp_nC).log_softmax(dim=1)
        return float((logp_nC.exp() * (logp_nC - logq_nC)).sum(dim=1).mean())

    students = {f"KL {goal:g}": near(scale_for(goal, kl)) for goal in (3.0, 0.1)}
    return students | {"unigram": lambda rows, logp_nC: frequency_C.expand_as(logp_nC).clone()}


def scale_for(goal: float, kl: Callable[[float], float]) -> float:
    """Bisection; KL grows with the scale."""
    low, high = 0.0, 16.0
    for _ in range(14):
        middle = (low + high) / 2
        low, high = (middle, high) if kl(middle) < goal else (low, middle)
    return high


# ---- targets


def spec_for(kind: TargetKind, num_classes: int, entries: int, probs_NM: Tensor) -> TargetSpec:
    """With the threshold that calibration finds on these positions."""
    spec = TargetSpec(
        kind=kind, num_classes=num_classes, top_k=entries, mean_entries=float(entries)
    )
    if kind == "topk":
        return spec
    return replace(
        spec, threshold=SELECTORS[spec.kind].find_threshold(probs_NM[:, :255].log(), spec)
    )


def draws_for(probs_NM: Tensor, entries: int) -> int:
    """How many draws with replacement come nearest to that many different ids on average.

    Those of the classes beyond M are taken to be all different.
    """
    probs_NM = probs_NM.double()
    rest = float((1 - probs_NM.sum(dim=1)).clamp_min(0).mean())

    def unique(draws: int) -> float:
        return float((1 - (1 - probs_NM) ** draws).sum(dim=1).mean()) + draws * rest

    low, high = 1, 4096
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if unique(middle) <= entries else (low, middle)
    return min((low, high), key=lambda draws: abs(unique(draws) - entries))


def cached(
    logp_nC: Tensor, spec: TargetSpec, ranks: ClassRanks, rng: np.random.Generator
) -> SoftTarget:
    """Selected, encoded and decoded: what a student would read from a cache."""
    n = len(logp_nC)
    bits_n = rng.integers(0, 1 << 64, n, np.uint64)
    offset_n = torch.from_numpy((bits_n >> np.uint64(11)) * 2.0**-53)
    got = select(logp_nC, spec, offset_N=offset_n if spec.kind == "sample" else None)
    target = Target(
        got.ids.numpy().astype(np.int32),
        got.logprobs.numpy(),
        got.log_tail.numpy(),
        None if got.counts is None else got.counts.numpy().astype(np.int32),
        bits_n if spec.kind == "sample" else None,
    )
    decoded = spec.decode(spec.encode(target, ranks), n, ranks)
    counts = None if decoded.counts is None else torch.from_numpy(decoded.counts)
    soft = SoftTarget(
        torch.from_numpy(np.array(decoded.ids)),
        torch.from_numpy(decoded.logprobs),
        torch.from_numpy(decoded.log_tail),
        counts=counts,
        kind=spec.kind,
    )
    return soft.at(slice(None)) if counts is not None else soft


def published(logp_nC: Tensor, draws: int, generator: torch.Generator) -> SoftTarget:
    """RS-KD: draws with replacement, each of weight 1 / draws; the loss adds up repeated ones."""
    ids_nS = torch.multinomial(logp_nC.exp(), draws, replacement=True, generator=generator)
    weights = torch.full(ids_nS.shape, -math.log(draws))
    return SoftTarget(ids_nS, weights, torch.full((len(ids_nS),), -math.inf), kind="sample")


def logits_gradient(
    logits_nC: Tensor, target: SoftTarget, tail: Tail, labels_n: Tensor | None
) -> Tensor:
    """dL/dz of every position by the product's loss, [n, C]."""
    logits_nC = logits_nC.detach().requires_grad_()
    output = logits_loss(
        logits_nC,
        target=target,
        labels_N=labels_n,
        spec=LossSpec(tail=tail),
        num_classes=logits_nC.shape[1],
        hard_scale=0.0,
    )
    (gradient_nC,) = torch.autograd.grad(output.loss, logits_nC)
    return gradient_nC


def unique_of(target: SoftTarget) -> int:
    """How many different ids have a weight, all positions together."""
    ids_nK = target.ids.masked_fill(target.logprobs == -math.inf, -1).sort(dim=1).values
    fresh_nK = torch.ones_like(ids_nK, dtype=torch.bool)
    fresh_nK[:, 1:] = ids_nK[:, 1:] != ids_nK[:, :-1]
    return int((fresh_nK & (ids_nK >= 0)).sum())


# ---- errors over positions


class Errors:
    """Sums over segments of one kind's gradient error, [C, D]."""

    def __init__(self, like: Tensor) -> None:
        self.sum_CD, self.squares, self.segments, self.entries = torch.zeros_like(like), 0.0, 0, 0

    def add(self, error_CD: Tensor, entries: int) -> None:
        self.sum_CD += error_CD
        self.squares += float(error_CD.double().square().sum())
        self.segments, self.entries = self.segments + 1, self.entries + entries

    def relative_to(self, gradient_CD: Tensor) -> dict[str, float]:
        """Total, bias and deviation, relative to the norm of the mean gradient."""
        S, whole = self.segments, float(gradient_CD.double().square().sum())
        total = float(self.sum_CD.double().square().sum())
        bias = (total - self.squares) / (S * (S - 1))
        total /= S * S
        found = {"total": total, "bias": max(bias, 0.0), "deviation": max(total - bias, 0.0)}
        numbers = {name: float(f"{math.sqrt(x / whole):.3g}") for name, x in found.items()}
        return numbers | {"mean_entries": round(self.entries / S / SEGMENT, 2)}


def measure_errors(
    data: Distributions, name: str, sizes: list[int], seed: int = 0
) -> list[dict[str, Any]]:
    """Every kind and number of entries for every student."""
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    probs_NM, C = data.probs_NM, data.num_classes
    draws = {entries: draws_for(probs_NM, entries) for entries in sizes}
    specs = {(kind, k): spec_for(kind, C, k, probs_NM) for _, kind, _ in KINDS for k in sizes}
    students = students_for(data)
    shape = torch.zeros(data.num_classes, CHANNELS)
    mean_of, errors = {s: torch.zeros_like(shape) for s in students}, {}
    every = list(segments(len(data.ids_NM)))
    for number, rows in enumerate(every):
        logp_nC, labels_n, states_nD = (
            data.log_probs(rows),
            data.labels_N[rows],
            data.states_ND[rows],
        )
        targets = {key: cached(logp_nC, spec, data.ranks, rng) for key, spec in specs.items()}
        drawn = {k: published(logp_nC, draws[k], generator) for k in sizes}
        jobs = [(text, k, targets[kind, k], tail) for text, kind, tail in KINDS for k in sizes]
        jobs += [("RS-KD as published", k, drawn[k], "bucket") for k in sizes]
        for student, logits_of in students.items():
            logits_nC = logits_of(rows, logp_nC)
            full_nC = logits_nC.softmax(dim=1) - logp_nC.exp()
            mean_of[student] += full_nC.t() @ states_nD / (SEGMENT * len(every))
            for text, k, target, tail in jobs:
                gradient_nC = logits_gradient(logits_nC, target, tail, labels_n)
                error_CD = gradient_nC.sub_(full_nC).t() @ states_nD / SEGMENT
                entry = errors.setdefault((student, text, k), Errors(shape))
                entry.add(error_CD, unique_of(target))
        print(f"{name}: segment {number + 1} of {len(every)}", file=sys.stderr, flush=True)
    return [
        {"student": s, "kind": text, "entries": k, **found.relative_to(mean_of[s])}
        for (s, text, k), found in errors.items()
    ]


# ---- bias of sampling over many draws


def check_sampling(data: Distributions, entries: int = 12) -> dict[str, Any]:
    """Many draws of `sample` and of RS-KD at the same positions, student at KL 3.

    `errors_in_se`: the mean error along each direction in standard errors; the first direction is
    the full gradient itself, the others are random. `mean_error_norm`: |mean error| over the size
    that its noise alone would have, about 1 without a bias.
    """
    rng, generator = np.random.default_rng(7), torch.Generator().manual_seed(7)
    step = len(data.ids_NM) // CHECKED_POSITIONS
    rows = slice(0, step * CHECKED_POSITIONS, step)
    logp_nC, states_nD, probs_nM = data.log_probs(rows), data.states_ND[rows], data.probs_NM[rows]
    logits_nC = students_for(data)["KL 3"](rows, logp_nC)
    full_nC = logits_nC.softmax(dim=1) - logp_nC.exp()
    gradient_CD = full_nC.t() @ states_nD / len(states_nD)
    directions = torch.randn(DIRECTIONS, *gradient_CD.shape, generator=generator)
    directions[0] = gradient_CD
    directions /= directions.flatten(1).norm(dim=1)[:, None, None]
    spec = spec_for("sample", data.num_classes, entries, probs_nM)
    draws = draws_for(probs_nM, entries)
    makers: dict[str, Callable[[], SoftTarget]] = {
        "sample": lambda: cached(logp_nC, spec, data.ranks, rng),
        "rskd": lambda: published(logp_nC, draws, generator),
    }
    found = {
        text: many_draws(make, logits_nC, full_nC, states_nD, directions)
        for text, make in makers.items()
    }
    scale = float(gradient_CD.norm())
    for numbers in found.values():
        numbers["deviation"] = float(f"{numbers['deviation'] / scale:.3g}")
    ratio = found["sample"]["deviation"] / found["rskd"]["deviation"]
    outside = 1 - math.erf(3 / math.sqrt(2))
    return {
        "draws": CHECKED_DRAWS,
        "positions": CHECKED_POSITIONS,
        "rskd_draws": draws,
        "expected_largest_in_se": round(expected_largest(DIRECTIONS), 2),
        "chance_of_one_above_3": float(f"{1 - (1 - outside) ** DIRECTIONS:.2g}"),
        "deviation_ratio": round(ratio, 3),
        **found,
    }


def many_draws(
    make: Callable[[], SoftTarget],
    logits_nC: Tensor,
    full_nC: Tensor,
    states_nD: Tensor,
    directions: Tensor,
) -> dict[str, Any]:
    """Errors of the head gradient over independent draws."""
    sum_CD = torch.zeros_like(directions[0], dtype=torch.float64)
    squares, along, entries = 0.0, [], 0
    for _ in range(CHECKED_DRAWS):
        target = make()
        error_nC = logits_gradient(logits_nC, target, "bucket", None).sub_(full_nC)
        error_CD = error_nC.t() @ states_nD / len(states_nD)
        along.append((directions.flatten(1) @ error_CD.flatten()).double())
        sum_CD += error_CD
        squares += float(error_CD.double().square().sum())
        entries += unique_of(target)
    R, along_RJ = CHECKED_DRAWS, torch.stack(along)
    mean_square = float((sum_CD / R).square().sum())
    variance = (squares / R - mean_square) * R / (R - 1)
    in_se = along_RJ.mean(dim=0) / (along_RJ.std(dim=0) / math.sqrt(R))
    return {
        "mean_entries": round(entries / R / len(states_nD), 2),
        "deviation": math.sqrt(variance),
        "mean_error_norm": round(math.sqrt(mean_square / (variance / R)), 3),
        "errors_in_se": [round(x, 2) for x in in_se.tolist()],
        "largest_in_se": round(float(in_se.abs().max()), 2),
    }


def expected_largest(count: int) -> float:
    """Mean of the largest of `count` absolute standard normal numbers, by summation."""
    step = 1e-3
    return step * sum(1 - math.erf(i * step / math.sqrt(2)) ** count for i in range(8000))


# ---- report


def measure_samples(
    folder: Path, names: list[str], positions: int, sizes: list[int]
) -> list[dict[str, Any]]:
    """Every file; tables go to stderr."""
    found = []
    for name in names:
        data = load(folder / f"{name}.safetensors", positions // SEGMENT * SEGMENT)
        sampling = check_sampling(data) if data.num_classes < 1 << 16 else None
        if sampling:
            print(f"{name}: {sampling}", file=sys.stderr, flush=True)
        errors = measure_errors(data, name, sizes)
        for student in dict.fromkeys(error["student"] for error in errors):
            print(f"\n{name}, student {student}, {len(data.ids_NM)} positions", file=sys.stderr)
            print(error_table([e for e in errors if e["student"] == student]), file=sys.stderr)
        found.append({"sample": name, "positions": len(data.ids_NM)})
        found[-1] |= {"sampling": sampling, "errors": errors}
    return found


def error_table(errors: list[dict[str, Any]]) -> str:
    """bias / deviation of each kind; and the ratio of the two ways to sample."""
    sizes = sorted({error["entries"] for error in errors})
    lines = [f"{'bias / deviation':<20}" + "".join(f"{k:>18}" for k in sizes)]
    by_key = {(e["kind"], e["entries"]): e for e in errors}
    for kind in dict.fromkeys(e["kind"] for e in errors):
        cells = [
            f"{by_key[kind, k]['bias']:.4f} / {by_key[kind, k]['deviation']:.4f}" for k in sizes
        ]
        lines.append(f"{kind:<20}" + "".join(f"{cell:>18}" for cell in cells))
    for kind in ("adaptive + bucket", "sample", "RS-KD as published"):
        cells = [f"{by_key[kind, k]['mean_entries']:.1f}" for k in sizes]
        lines.append(f"{'entries, ' + kind[:9]:<20}" + "".join(f"{cell:>18}" for cell in cells))
    ratios = [
        by_key["sample", k]["deviation"] / by_key["RS-KD as published", k]["deviation"]
        for k in sizes
    ]
    return "\n".join([*lines, f"{'sample / RS-KD':<20}" + "".join(f"{r:>18.2f}" for r in ratios)])
