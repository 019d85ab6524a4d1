"""What every kind and size of targets would cost, and lose, on this teacher and this corpus.

n positions of a piece, N of all, K entries of each, C classes, D channels.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from shared.format import frames
from shared.format.schema import MIN_BLOCK_POSITIONS
from shared.targets.base import TargetKind
from shared.targets.ragged import MAX_ENTRIES
from shared.targets.record import ClassRanks, Floats, Target
from shared.targets.spec import TargetSpec
from shared.tasks import TASKS
from teacher_cache.engines.batches import forward_batches
from teacher_cache.engines.teacher import FINAL, Teacher
from teacher_cache.job.calibrate import Largest, Sample, learn_targets
from teacher_cache.job.draft import Draft
from teacher_cache.job.statistics import kept_masses
from teacher_cache.select.targets import Selected, select
from teacher_cache.select.thresholds import most_entries
from teacher_cache.tasks.rows import Row
from teacher_cache.tools.gradient_error import (
    PARTS,
    STUDENT_KLS,
    Directions,
    GradientError,
    HeadGradient,
    errors,
    mean_kl,
    noise_scale,
    relative,
)

TOP_KS = (8, 16, 32, 64, 128)
MEAN_ENTRIES = (4, 8, 16, 32, 64)
_DENSE_CLASSES = 2048  # more are shown only where they are asked for
_POSITIONS = 8192  # that errors are measured over
_PIECE_BYTES = 32 << 20  # of float32 over all classes; about ten of them exist at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One kind and size of targets; what is None or empty was not measured."""

    kind: TargetKind
    size: float  # top-k, mean entries, or all classes
    asked: bool
    bytes_per_position: float  # of the target columns
    entries: float | None = None  # of a position, as found
    threshold: float | None = None
    kept_mass: dict[str, float] = field(default_factory=dict)  # by temperature
    # KL(what is kept, scaled to a sum of 1 || all of it): -ln kept mass. The other direction is
    # infinite. Not of a sample, which leaves nothing out on average.
    truncation_kl: float | None = None
    gradient_error: dict[str, GradientError] = field(default_factory=dict)  # by student

    @property
    def text(self) -> str:
        return self.kind if self.kind == "dense" else f"{self.kind} {self.size:g}"


@dataclass(frozen=True, slots=True)
class Measured:
    """Every choice, and what the teacher's distributions look like."""

    choices: list[Choice]
    positions: int
    entropy: Floats  # [N]
    kept_mass_by_k: dict[str, dict[str, float]]  # temperature -> k -> mean


def specs(draft: Draft) -> list[TargetSpec]:
    """The kinds and sizes to compare; the one asked for is among them."""
    asked, classes = draft.targets, draft.targets.num_classes
    plain = TargetSpec(
        kind="topk",
        num_classes=classes,
        value_bits=draft.config.value_bits,
        temperatures=tuple(sorted({t for t in draft.config.temperature if t != 1})),
    )
    ks = {*TOP_KS, *([asked.top_k] if asked.kind == "topk" else [])}
    found = [replace(plain, top_k=k) for k in sorted(ks) if k <= classes]
    for kind in ("adaptive", "sample"):
        means = {*map(float, MEAN_ENTRIES), *([asked.mean_entries] if asked.kind == kind else [])}
        found += [
            replace(
                plain,
                kind=kind,
                top_k=1,
                mean_entries=mean,
                temperatures=() if kind == "sample" else plain.temperatures,
            )
            for mean in sorted(means)
            if mean < classes or mean == asked.mean_entries
        ]
    if asked.kind == "dense" or classes <= _DENSE_CLASSES:
        found.append(TargetSpec(kind="dense", num_classes=classes, top_k=1, value_bits=16))
    # --like brings a threshold with it.
    return [replace(s, threshold=asked.threshold) if is_asked(s, asked) else s for s in found]


def size_of(spec: TargetSpec) -> float:
    if spec.ragged:
        return spec.mean_entries
    return spec.num_entries


def is_asked(spec: TargetSpec, asked: TargetSpec) -> bool:
    return spec.kind == asked.kind and size_of(spec) == size_of(asked)


def measure(
    draft: Draft, teacher: Teacher, sample: Sample, largest: Largest, forward_tokens: int
) -> Measured:
    """Runs the teacher over some thousand positions and holds every choice against what it says.

    `largest` are the 255 largest classes of the learning rows: thresholds and orders of the classes
    come from them, as in a run.
    """
    asked = draft.targets
    learnt = [
        learn_targets(spec, largest, sample)
        for spec in specs(draft)
        if is_asked(spec, asked)
        or not spec.ragged
        or most_entries(largest.logprobs_NK, spec.kind) >= spec.mean_entries
    ]
    tried = [_Tried(spec, ranks) for spec, ranks in learnt]
    students = _Students(asked.num_classes, len(tried))
    curve = _KeptByK(asked.num_classes, draft.config.temperature)
    random = np.random.default_rng(draft.config.seed)
    for logits_nC, states_nD in _pieces(draft, teacher, sample, forward_tokens):
        logp_nC = logits_nC.float().log_softmax(dim=1)
        students.meet(logp_nC, states_nD)
        curve.add(logits_nC)
        bits_n = random.integers(0, 2**64, len(logits_nC), dtype=np.uint64)
        for one in tried:
            students.compare(one, one.add(logits_nC, bits_n), logp_nC)
    return Measured(
        choices=[_choice(one, students, is_asked(one.spec, asked)) for one in tried],
        positions=curve.positions,
        entropy=np.concatenate(curve.entropy),
        kept_mass_by_k=curve.means(),
    )


def _pieces(
    draft: Draft, teacher: Teacher, sample: Sample, forward_tokens: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits [n, C] and final states [n, D] of positions without NaN or infinity."""
    chosen: list[Row] = []
    left = _POSITIONS
    for row in reversed(sample.rows):  # the learning rows come first
        chosen.append(row)
        left -= row.num_positions
        if left <= 0:
            break
    classes = draft.targets.num_classes
    step = max(1, _PIECE_BYTES // (4 * classes))
    layers = (FINAL,) if teacher.trunk is not None else ()
    layout, packed = TASKS[draft.config.task].layout, draft.preprocessing.pack
    for batch in forward_batches(chosen, forward_tokens, packed=packed, layout=layout):
        output = teacher.forward(batch.inputs, layers)
        for part, logits in output.chunks:
            # Where no final state is to be had, an output bias stands for the head.
            states = output.hidden[FINAL][part] if layers else torch.ones_like(logits[:, :1])
            states = states.to(logits.device)
            for start in range(0, len(logits), step):
                logits_nC = logits[start : start + step, :classes]
                good_n = ~logits_nC.isnan().any(dim=1) & logits_nC.amax(dim=1).isfinite()
                good_n &= states[start : start + step].isfinite().all(dim=1)
                if good_n.any():
                    yield logits_nC[good_n], states[start : start + step][good_n]


class _Tried:
    """A kind and size in the making."""

    def __init__(self, spec: TargetSpec, ranks: ClassRanks) -> None:
        self.spec, self.ranks = spec, ranks
        self.targets: list[Target] = []
        self.kept: dict[float, float] = defaultdict(float)
        self.truncation = 0.0
        self.gradients = {name: HeadGradient() for name in STUDENT_KLS}

    def add(self, logits_nC: Tensor, bits_n: np.ndarray) -> Target:
        """Keeps the target of a piece; returns it as a student will read it."""
        spec = self.spec
        target, ratios = _target(logits_nC, spec, bits_n)
        self.targets.append(target)
        for temperature, mass_n in kept_masses(target, spec, ratios).items():
            self.kept[temperature] += float(mass_n.sum(dtype=np.float64))
            if temperature == 1:
                self.truncation -= float(np.log(mass_n.clip(1e-30)).sum(dtype=np.float64))
        decoded: Target = spec.decode(spec.encode(target, self.ranks), len(logits_nC), self.ranks)
        return decoded

    def bytes_per_position(self) -> float:
        whole = _joined(self.targets)
        positions = len(whole.log_tail)
        size = 0
        for start in range(0, positions, MIN_BLOCK_POSITIONS):
            block = whole.at(np.arange(start, min(start + MIN_BLOCK_POSITIONS, positions)))
            for plane in self.spec.encode(block, self.ranks).values():
                size += len(frames.compress(plane, block=0, column=0))
        return size / positions


def _target(
    logits_nC: Tensor, spec: TargetSpec, bits_n: np.ndarray
) -> tuple[Target, Mapping[float, Floats]]:
    """As a run makes it; bits_n, u64, stand for what a run derives from seed, row and position."""
    offset_n = None
    if spec.kind == "sample":
        offset_n = torch.from_numpy((bits_n >> np.uint64(11)) * 2.0**-53).to(logits_nC.device)
    got: Selected = select(logits_nC, spec, None, offset_n)
    ids = got.ids.to("cpu", torch.int32)
    target = Target(
        ids=ids.numpy(),
        logprobs=got.logprobs.cpu().numpy(),
        log_tail=got.log_tail.cpu().numpy(),
        counts=None if got.counts is None else got.counts.to("cpu", torch.int32).numpy(),
        random_bits=bits_n if spec.kind == "sample" else None,
    )
    return target, {t: ratio.cpu().numpy() for t, ratio in got.log_partition_ratio.items()}


def _joined(targets: list[Target]) -> Target:
    first = targets[0]
    return Target(
        ids=np.concatenate([t.ids for t in targets]),
        logprobs=np.concatenate([t.logprobs for t in targets]),
        log_tail=np.concatenate([t.log_tail for t in targets]),
        counts=None if first.counts is None else np.concatenate([t.counts for t in targets]),
        random_bits=None
        if first.random_bits is None
        else np.concatenate([t.random_bits for t in targets]),
    )


class _Students:
    """Two students that do not exist yet: the teacher with noise on its logits."""

    def __init__(self, num_classes: int, num_tried: int) -> None:
        self.num_classes = num_classes
        self.num_gradients = PARTS * len(STUDENT_KLS) * (num_tried + 1)
        self.directions: Directions | None = None
        self.scales: dict[str, float] = {}
        self.whole = {name: HeadGradient() for name in STUDENT_KLS}
        self.kl: dict[str, float] = defaultdict(float)
        self.positions = 0
        self._logq_nC: dict[str, Tensor] = {}
        self._projected_nR = torch.zeros(0)

    def meet(self, logp_nC: Tensor, states_nD: Tensor) -> None:
        """What the students say at a piece, and the whole gradient there."""
        if self.directions is None:
            width = states_nD.shape[1]
            self.directions = Directions(width, self.num_classes, self.num_gradients)
        noise_nC = self.directions.noise(states_nD)
        self._projected_nR = self.directions.project(states_nD)
        for name, wanted in STUDENT_KLS.items():
            if name not in self.scales:
                self.scales[name] = noise_scale(logp_nC, noise_nC, wanted)
            logits_nC = logp_nC + self.scales[name] * noise_nC
            self._logq_nC[name] = logits_nC.log_softmax(dim=1)
            self.kl[name] += mean_kl(logp_nC, logits_nC) * len(logp_nC)
            self.whole[name].add(self._projected_nR, self._logq_nC[name].exp() - logp_nC.exp())
        self.positions += len(logp_nC)

    def compare(self, one: _Tried, target: Target, logp_nC: Tensor) -> None:
        for name, logq_nC in self._logq_nC.items():
            error_nC = errors(logp_nC, logq_nC, target, one.spec)
            one.gradients[name].add(self._projected_nR, error_nC)

    def errors_of(self, one: _Tried) -> dict[str, GradientError]:
        return {
            name: relative(gradient, self.whole[name], self.kl[name] / self.positions)
            for name, gradient in one.gradients.items()
        }


class _KeptByK:
    """Mean kept mass of the k largest classes, for many k, and the entropies."""

    def __init__(self, num_classes: int, temperatures: tuple[float, ...]) -> None:
        most = min(num_classes, MAX_ENTRIES)
        self.spec = TargetSpec(
            kind="topk",
            num_classes=num_classes,
            top_k=most,
            temperatures=tuple(sorted({t for t in temperatures if t != 1})),
        )
        self.ks = sorted({*(round(2 ** (i / 2)) for i in range(16)), most})
        self.ks = [k for k in self.ks if k <= most]
        self.sums = {t: np.zeros(len(self.ks)) for t in (1.0, *self.spec.temperatures)}
        self.entropy: list[Floats] = []
        self.positions = 0

    def add(self, logits_nC: Tensor) -> None:
        got = select(logits_nC, self.spec)
        at = torch.tensor(self.ks, device=logits_nC.device) - 1
        for t, sums in self.sums.items():
            logprobs = got.logprobs
            if t != 1:
                logprobs = logprobs / t - got.log_partition_ratio[t][:, None]
            sums += logprobs.double().exp().cumsum(dim=1)[:, at].sum(dim=0).cpu().numpy()
        self.entropy.append(got.entropy.cpu().numpy())
        self.positions += len(logits_nC)

    def means(self) -> dict[str, dict[str, float]]:
        return {
            f"{t:g}": {
                str(k): float(s / self.positions) for k, s in zip(self.ks, sums, strict=True)
            }
            for t, sums in self.sums.items()
        }


def _choice(one: _Tried, students: _Students, asked: bool) -> Choice:
    spec, positions = one.spec, students.positions
    counts = sum(t.logprobs.size for t in one.targets)
    return Choice(
        kind=spec.kind,
        size=size_of(spec),
        asked=asked,
        bytes_per_position=one.bytes_per_position(),
        entries=counts / positions,
        threshold=spec.threshold if spec.ragged else None,
        kept_mass={f"{t:g}": mass / positions for t, mass in one.kept.items()},
        truncation_kl=None if spec.kind == "sample" else max(0.0, one.truncation / positions),
        gradient_error=students.errors_of(one),
    )
