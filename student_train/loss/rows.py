"""The arithmetic of the row losses: soft losses on entries and tail, and what prepares these.

A row loss compares two distributions over the K entries and one last cell, the tail: the student's
log-probabilities come from `log_cells`, the teacher's from `teacher_cells`. Where those come from
(chunks of a head, or full logits) is linear.py's and logits.py's matter. All is pure functions.

Shapes: N positions with a target, K entries of each, E of all, J = K + 1 cells (entries, then
tail).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import ConfigError
from shared.targets.base import Kind, TargetKind
from shared.targets.kinds import KINDS
from student_train.loss.spec import LossSpec, SoftLoss

LOG_FLOOR = -1e4  # stands for log 0: exp gives exactly 0, and 0 * LOG_FLOOR is 0, not NaN
MASKED_LOGIT = -1e30  # stands for a logit of -inf, and is below LOG_FLOOR after any normalisation
MIN_TEMPERED_TAIL = 1e-6  # 1 - sum p of decoded 7-bit values is wrong by about that much
MIN_REVERSE_LOG_TAIL = -14.0  # the smallest tail the codec stores short of exactly 0


@dataclass(slots=True)
class SoftTarget:
    """What the teacher says at N positions, all at T = 1; a log-probability of -inf is no entry.

    With `counts` ids and logprobs are [E], the entries of one position after another. In a
    sample the logprobs are ln of the weights.
    """

    ids: Tensor  # int32 or int64 [N, K]
    logprobs: Tensor  # float32 [N, K]
    log_tail: Tensor  # float32 [N]; -inf where the tail is exactly 0
    log_partition_ratio: Tensor | None = None  # float32 [N]: logsumexp(lp / T), lp over all classes
    counts: Tensor | None = None  # int [N], entries of each position
    kind: TargetKind = "topk"
    most_entries: int | None = None  # of any position: the K of every part; None: each has its own

    def __post_init__(self) -> None:
        """Waits for a GPU here, once, and not again for every chunk of positions."""
        counts = self.counts
        if counts is not None and counts.device.type != "cpu" and self.most_entries is None:
            self.most_entries = int(counts.max()) if len(counts) else 0

    @property
    def of_kind(self) -> Kind[Any]:
        """What can be asked of targets of this kind."""
        return KINDS[self.kind]

    def at(self, rows: slice) -> "SoftTarget":
        """The targets of some positions, [n, K]; missing entries are class 0 with -inf."""
        ratio = self.log_partition_ratio
        part = replace(
            self,
            log_tail=self.log_tail[rows],
            log_partition_ratio=None if ratio is None else ratio[rows],
            counts=None,
            most_entries=None,
        )
        if self.counts is None:
            return replace(part, ids=self.ids[rows], logprobs=self.logprobs[rows])
        counts_n = self.counts[rows].long()
        starts_n = (self.counts.cumsum(0) - self.counts)[rows]
        K = self.most_entries
        if K is None:
            K = int(counts_n.max()) if len(counts_n) else 0
        slots_K = torch.arange(K, device=counts_n.device)
        there_nK = slots_K < counts_n[:, None]
        entry_nK = torch.where(there_nK, starts_n[:, None] + slots_K, 0)
        return replace(
            part,
            ids=torch.where(there_nK, self.ids[entry_nK], 0),
            logprobs=self.logprobs[entry_nK].masked_fill(~there_nK, -math.inf),
        )


def prepare_target(target: SoftTarget, labels_N: Tensor | None, spec: LossSpec) -> SoftTarget:
    """The teacher's entries and tail as the loss sees them: at its temperature, tail handled.

    With `--tail label` the label becomes one more entry; where it repeats one, the two are added
    by `merge_repeats`. A position without a label keeps its tail as a bucket.
    """
    target = _temper(target, spec.temperature)
    if spec.tail == "none":
        return replace(target, log_tail=_no_tail(target.log_tail))
    if spec.tail == "renormalise":
        log_mass_N1 = torch.logsumexp(target.logprobs, dim=-1, keepdim=True)
        logprobs_NK = target.logprobs - log_mass_N1.clamp_min(LOG_FLOOR)
        return replace(target, logprobs=logprobs_NK, log_tail=_no_tail(target.log_tail))
    if spec.tail == "label":
        if labels_N is None:
            raise ConfigError("--tail label needs hard labels, and there are none: use bucket")
        return _tail_to_label(target, labels_N)
    return target


def merge_repeats(logprobs_NK: Tensor, owner_NK: Tensor) -> Tensor:
    """Adds up entries with the same id: all mass goes to one of them, the others become -inf.

    owner_NK, int64: for each entry the slot that stands for its id (its own where unique).
    """
    mass_NK = logprobs_NK.exp()
    merged_NK = torch.zeros_like(mass_NK).scatter_add_(1, owner_NK, mass_NK)
    # An entry that nothing was added to keeps its log-probability to the last bit.
    return torch.where(merged_NK == mass_NK, logprobs_NK, merged_NK.log())


def teacher_cells(logprobs_NK: Tensor, log_tail_N: Tensor) -> Tensor:
    """The teacher's log-probabilities over the J cells, with LOG_FLOOR for what is -inf."""
    return torch.cat((logprobs_NK, log_tail_N[:, None]), dim=-1).clamp_min(LOG_FLOOR)


def log_cells(logits_NK: Tensor, log_rest_N: Tensor) -> Tensor:
    """The student's log-probabilities over the J cells.

    log_rest_N is the logsumexp over all classes that are no entry, so the tail never is a
    difference `1 - sum q` (whose gradient is 75 % off at a tail of 1e-6 in float32).
    """
    cells_NJ = torch.cat((logits_NK, log_rest_N[:, None]), dim=-1)
    return F.log_softmax(cells_NJ, dim=-1).clamp_min(LOG_FLOOR)


def soft_rows(student_NJ: Tensor, teacher_NJ: Tensor, spec: LossSpec) -> Tensor:
    """The soft loss per position in nats, [N], times the power of T that keeps its gradient's size.

    Both arguments are log-probabilities at the temperature of `spec`. T^2 for divergences is
    Hinton et al. 2015, section 2; total variation has a gradient one power of T larger.
    """
    loss = SOFT_LOSSES[spec.soft_loss]
    return loss.rows(student_NJ, teacher_NJ, spec) * spec.temperature**loss.temperature_power


def sampled_rows(student_NJ: Tensor, teacher_NJ: Tensor) -> Tensor:
    """-sum w log q per position, [N], for the weights w of a sample of the teacher's classes.

    Its mean over the draws is the cross-entropy to the whole of the teacher's distribution: KL, but
    for the teacher's entropy. Neither value nor gradient has a bias.
    """
    return -(teacher_NJ.exp() * student_NJ)[:, :-1].sum(dim=-1)


def forward_kl(student_NJ: Tensor, teacher_NJ: Tensor, spec: LossSpec) -> Tensor:
    """KL(teacher || student); a cell the teacher gives nothing adds nothing."""
    return (teacher_NJ.exp() * (teacher_NJ - student_NJ)).sum(dim=-1)


def reverse_kl(student_NJ: Tensor, teacher_NJ: Tensor, spec: LossSpec) -> Tensor:
    """KL(student || teacher), where the teacher's tail is at least e^-14."""
    tail_N1 = teacher_NJ[:, -1:].clamp_min(MIN_REVERSE_LOG_TAIL)
    teacher_NJ = torch.cat((teacher_NJ[:, :-1], tail_N1), dim=-1)
    return (student_NJ.exp() * (student_NJ - teacher_NJ)).sum(dim=-1)


def jensen_shannon(student_NJ: Tensor, teacher_NJ: Tensor, spec: LossSpec) -> Tensor:
    """b KL(p || m) + (1 - b) KL(q || m) with m = b p + (1 - b) q and b = `jsd_beta`."""
    beta = spec.jsd_beta
    mixed_NJ = torch.logaddexp(teacher_NJ + math.log(beta), student_NJ + math.log1p(-beta))
    teacher_part_NJ = beta * teacher_NJ.exp() * (teacher_NJ - mixed_NJ)
    student_part_NJ = (1 - beta) * student_NJ.exp() * (student_NJ - mixed_NJ)
    return (teacher_part_NJ + student_part_NJ).sum(dim=-1)


def total_variation(student_NJ: Tensor, teacher_NJ: Tensor, spec: LossSpec) -> Tensor:
    """Half the absolute difference of the probabilities, summed over the cells."""
    return (student_NJ.exp() - teacher_NJ.exp()).abs().sum(dim=-1) / 2


def log_mse(student_NJ: Tensor, teacher_NJ: Tensor, spec: LossSpec) -> Tensor:
    """Squared difference of the log-probabilities, averaged over the entries."""
    kept_NK = teacher_NJ[:, :-1] > LOG_FLOOR
    squares_NK = (student_NJ - teacher_NJ)[:, :-1].square() * kept_NK
    return squares_NK.sum(dim=-1) / kept_NK.sum(dim=-1).clamp_min(1)


@dataclass(frozen=True, slots=True)
class RowLoss:
    """A soft loss, and the power of the temperature its value and gradient are multiplied by."""

    rows: Callable[[Tensor, Tensor, LossSpec], Tensor]
    temperature_power: int


SOFT_LOSSES: dict[SoftLoss, RowLoss] = {
    "forward-kl": RowLoss(forward_kl, 2),
    "reverse-kl": RowLoss(reverse_kl, 2),
    "jsd": RowLoss(jensen_shannon, 2),
    "tvd": RowLoss(total_variation, 1),
    "mse": RowLoss(log_mse, 0),
}


def squared_error(numbers_N: Tensor, wanted_N: Tensor) -> Tensor:
    """Summed over the positions: what a regression learns from."""
    return (numbers_N - wanted_N).square().sum()


def _temper(target: SoftTarget, temperature: float) -> SoftTarget:
    """p_T = p^(1/T) over the partition the cache stored for T; a tail of exactly 0 stays 0."""
    if temperature == 1:
        return target
    if target.of_kind.every_temperature:
        logprobs_NC = torch.log_softmax(target.logprobs / temperature, dim=-1)
        return replace(target, logprobs=logprobs_NC)
    if target.log_partition_ratio is None:
        raise ConfigError(
            f"--temperature {temperature}: the cache's log-partition at this temperature is "
            "needed and was not given; use a temperature that the manifest lists"
        )
    logprobs_NK = target.logprobs / temperature - target.log_partition_ratio[:, None]
    log_tail_N = (1 - logprobs_NK.exp().sum(dim=-1)).clamp_min(MIN_TEMPERED_TAIL).log()
    log_tail_N = log_tail_N.masked_fill(target.log_tail == -math.inf, -math.inf)
    return replace(target, logprobs=logprobs_NK, log_tail=log_tail_N)


def _tail_to_label(target: SoftTarget, labels_N: Tensor) -> SoftTarget:
    labelled_N = labels_N >= 0
    label_logprob_N = target.log_tail.masked_fill(~labelled_N, -math.inf)
    return replace(
        target,
        ids=torch.cat((target.ids.long(), labels_N.long().clamp_min(0)[:, None]), dim=-1),
        logprobs=torch.cat((target.logprobs, label_logprob_N[:, None]), dim=-1),
        log_tail=target.log_tail.masked_fill(labelled_N, -math.inf),
    )


def _no_tail(log_tail_N: Tensor) -> Tensor:
    return torch.full_like(log_tail_N, -math.inf)
