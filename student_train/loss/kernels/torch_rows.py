"""The row losses by torch alone: the reference for every other implementation, and their fallback.

One softmax per chunk gives everything: with the entries masked out of the logits it is the
student's distribution over all *other* classes, and each loss is a function of the entries' logits
and of the logsumexp of that rest alone. Autograd differentiates this small function; the gradient
of the chunk's logits is then `d loss / d log_rest * softmax(rest)`, with the gradients at entries
and labels added to it in place.

Shapes: n positions of a chunk, C classes, K entries, J = K + 1 cells (entries, then the rest).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from student_train.loss.kernels.base import RowSums, RowTerms, Wanted
from student_train.loss.rows import (
    LOG_FLOOR,
    MASKED_LOGIT,
    log_cells,
    merge_repeats,
    sampled_rows,
    soft_rows,
    teacher_cells,
)
from student_train.loss.spec import LossSpec


class TorchRows:
    """Works on every device and for every loss, in one buffer, or two where T = 1 comes apart."""

    def fits(self, device: torch.device, dtype: torch.dtype, spec: LossSpec) -> bool:
        """Always."""
        return True

    def num_buffers(self, wanted: Wanted) -> int:
        """One for the softmax, which ends as the gradient; one more for that at T = 1."""
        return 2 if wanted.apart else 1

    def run(
        self,
        logits_nC: Tensor,
        buffers: Sequence[Tensor],
        terms: RowTerms,
        wanted: Wanted,
        *,
        gradient: bool,
    ) -> RowSums:
        """The sums of a chunk; the first buffer becomes the gradient."""
        probs_nC, *others = buffers
        if wanted.softcap is not None:
            logits_nC.div_(wanted.softcap).tanh_().mul_(wanted.softcap)
        whole = _at_one(logits_nC, others, terms, wanted)
        if wanted.spec.temperature != 1:
            logits_nC.div_(wanted.spec.temperature)
        entries = mask_entries(logits_nC, terms)
        log_rest_n, highest_rest_n = _softmax(logits_nC, probs_nC)
        entropy = whole.entropy
        if wanted.with_entropy and not wanted.apart:
            cells_nJ = torch.cat((entries.logits_nK, log_rest_n[:, None]), dim=-1)
            entropy = _entropy_sum(logits_nC, probs_nC, cells_nJ)
        cells = [entries.logits_nK, log_rest_n, whole.label_logit_n1, whole.mean_logit_n]
        soft, hard, slopes = _sums_and_slopes(
            [*cells, *whole.log_all], entries.logprobs_nK, terms, wanted, gradient=gradient
        )
        if gradient:
            chunk = _Chunk(logits_nC, probs_nC, *others)
            _set_gradient(chunk, slopes, entries, terms, wanted)
        return RowSums(soft, hard, agreement(entries, highest_rest_n, terms), entropy, probs_nC)


@dataclass(slots=True)
class _Chunk:
    """The buffers: `probs_nC` is the softmax of the rest and ends as the gradient of the logits."""

    logits_nC: Tensor
    probs_nC: Tensor
    hard_probs_nC: Tensor | None = None  # at T = 1, where it comes apart


@dataclass(slots=True)
class _AtOne:
    """What is read off the logits at T = 1, before they are divided by the temperature."""

    label_logit_n1: Tensor
    mean_logit_n: Tensor
    log_all: list[Tensor]  # the logsumexp over all classes [n], where T = 1 comes apart; else empty
    entropy: Tensor  # 0 where it is not wanted, or where the softmax at T = 1 is still to come


def _at_one(logits_nC: Tensor, others: Sequence[Tensor], terms: RowTerms, wanted: Wanted) -> _AtOne:
    label_logit_n1 = logits_nC.gather(1, terms.labels_n1.clamp_min(0))
    mean_logit_n = mean_logit(logits_nC, wanted.spec)
    log_all, entropy = [], logits_nC.new_zeros(())
    if wanted.apart:
        log_all_n, _ = _softmax(logits_nC, others[0])
        log_all = [log_all_n]
        if wanted.with_entropy:
            entropy = _entropy_sum(logits_nC, others[0], log_all_n[:, None])
    return _AtOne(label_logit_n1, mean_logit_n, log_all, entropy)


def _sums_and_slopes(
    values: Sequence[Tensor],
    logprobs_nK: Tensor,
    terms: RowTerms,
    wanted: Wanted,
    *,
    gradient: bool,
) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
    """Soft and hard sum, and the derivative of the loss by each of the values."""
    with torch.set_grad_enabled(gradient):
        variables = [value.detach().requires_grad_(gradient) for value in values]
        soft, hard = soft_and_hard(variables, logprobs_nK, terms, wanted.spec)
        loss = wanted.soft_scale * soft + wanted.hard_scale * hard
    slopes = torch.autograd.grad(loss, variables) if gradient else ()
    return soft.detach(), hard.detach(), slopes


@dataclass(slots=True)
class Entries:
    """The classes with a probability of the teacher's own."""

    raw_nK: Tensor  # the student's logits at the ids
    logits_nK: Tensor  # the same, minus infinity where there is no entry
    logprobs_nK: Tensor  # the teacher's, repeated ids added up; -inf: no entry
    top_logit_n1: Tensor  # the student's logit of the teacher's most probable class


def mask_entries(logits_nC: Tensor, terms: RowTerms) -> Entries:
    """Takes the entries out of the logits, in place, so that a logsumexp over them is the rest's.

    The slot numbers are first written where the entries stand and read back, which names one slot
    for every id, however often it is repeated.
    """
    ids_nK, K = terms.ids_nK, terms.ids_nK.shape[1]
    raw_nK = logits_nC.gather(1, ids_nK)
    top_logit_n1 = logits_nC.gather(1, terms.top_ids_n1.clamp_min(0))
    slots_nK = torch.arange(K, dtype=logits_nC.dtype, device=logits_nC.device).expand_as(ids_nK)
    owner_nK = logits_nC.scatter_(1, ids_nK, slots_nK).gather(1, ids_nK).long()
    logprobs_nK = merge_repeats(terms.logprobs_nK, owner_nK)
    kept_nK = logprobs_nK > -math.inf
    id_kept_nK = kept_nK.gather(1, owner_nK)
    logits_nC.scatter_(1, ids_nK, raw_nK.masked_fill(id_kept_nK, MASKED_LOGIT))
    logits_nK = raw_nK.masked_fill(~kept_nK, MASKED_LOGIT)
    return Entries(raw_nK, logits_nK, logprobs_nK, top_logit_n1)


def mean_logit(logits_nC: Tensor, spec: LossSpec) -> Tensor:
    """Over the classes, [n]: all that label smoothing needs of them. 0 where it is not read."""
    if spec.label_smoothing == 0:
        return logits_nC.new_zeros(len(logits_nC))
    return logits_nC.mean(dim=-1)


def _softmax(logits_nC: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Logsumexp and maximum per row, [n]; the softmax itself goes to `out`.

    On a CPU this one kernel is faster than exp, sum and division in turn. Its largest probability
    is 1 / sum exp(logit - maximum), which gives the logsumexp to the last digit.
    """
    highest_n = logits_nC.amax(dim=-1)
    largest_n = torch.softmax(logits_nC, dim=-1, out=out).amax(dim=-1)
    return highest_n - largest_n.log(), highest_n


def _entropy_sum(logits_nC: Tensor, probs_nC: Tensor, cells_nJ: Tensor) -> Tensor:
    """Logsumexp minus expected logit; the last cell is all classes of the softmax `probs_nC`."""
    share_nJ = cells_nJ.softmax(dim=-1)
    expected_n = (share_nJ * cells_nJ.clamp_min(MASKED_LOGIT))[:, :-1].sum(dim=-1)  # 0 * -inf: NaN
    pieces = zip(logits_nC.split(32), probs_nC.split(32), strict=True)  # a product stays in cache
    inner_n = torch.cat([(z.clamp_min(MASKED_LOGIT) * p).sum(dim=-1) for z, p in pieces])
    expected_n += share_nJ[:, -1] * inner_n
    return (torch.logsumexp(cells_nJ, dim=-1) - expected_n).sum()


def soft_and_hard(
    variables: Sequence[Tensor], logprobs_nK: Tensor, terms: RowTerms, spec: LossSpec
) -> tuple[Tensor, Tensor]:
    """The two sums over a chunk, as functions of a few numbers for each position.

    The variables: the entries' logits [n, K] and the logsumexp of the rest [n], both divided by T;
    the label's logit [n, 1] and the mean one [n]; and the logsumexp of all classes [n], which may
    be left out where T is 1.
    """
    entry_nK, log_rest_n, label_logit_n1, mean_logit_n, *log_all = variables
    student_nJ = log_cells(entry_nK, log_rest_n)
    teacher_nJ = teacher_cells(logprobs_nK, terms.log_tail_n)
    if terms.sampled:
        soft_n = sampled_rows(student_nJ, teacher_nJ)
    else:
        soft_n = soft_rows(student_nJ, teacher_nJ, spec)
    cells_nJ = torch.cat((entry_nK, log_rest_n[:, None]), dim=-1)
    log_all_n = log_all[0] if log_all else torch.logsumexp(cells_nJ, dim=-1)
    return soft_n.sum(), _hard_sum(label_logit_n1, mean_logit_n, log_all_n, terms, spec)


def _hard_sum(
    label_logit_n1: Tensor,
    mean_logit_n: Tensor,
    log_all_n: Tensor,
    terms: RowTerms,
    spec: LossSpec,
) -> Tensor:
    smoothing = spec.label_smoothing
    logprob_n1 = (label_logit_n1 - log_all_n[:, None]).clamp_min(LOG_FLOOR)
    mean_logprob_n1 = (mean_logit_n - log_all_n).clamp_min(LOG_FLOOR)[:, None]
    smooth_n1 = (1 - smoothing) * logprob_n1 + smoothing * mean_logprob_n1
    return -smooth_n1.masked_fill(terms.labels_n1 < 0, 0.0).sum()


def _set_gradient(
    chunk: _Chunk, slopes: Sequence[Tensor], entries: Entries, terms: RowTerms, wanted: Wanted
) -> None:
    """Turns `probs_nC` into the gradient of the logits before the cap."""
    entry_nK, log_rest_n, label_logit_n1, mean_logit_n, *log_all = slopes
    T, softcap = wanted.spec.temperature, wanted.softcap
    gradient_nC = chunk.probs_nC.mul_(log_rest_n[:, None] / T)
    gradient_nC.scatter_add_(1, terms.ids_nK, entry_nK / T)
    if chunk.hard_probs_nC is not None:
        gradient_nC.addcmul_(chunk.hard_probs_nC, log_all[0][:, None])
    gradient_nC.scatter_add_(1, terms.labels_n1.clamp_min(0), label_logit_n1)
    if wanted.spec.label_smoothing:
        gradient_nC.add_(mean_logit_n[:, None], alpha=1 / gradient_nC.shape[1])
    if softcap is not None:  # d cap tanh(z / cap) / dz = 1 - (capped / cap)^2
        ratio_nC = chunk.logits_nC.scatter_(1, terms.ids_nK, entries.raw_nK).mul_(T / softcap)
        gradient_nC.addcmul_(gradient_nC, ratio_nC.square_(), value=-1)


def agreement(entries: Entries, highest_rest_n: Tensor, terms: RowTerms) -> Tensor:
    """A count in the dtype of the logits, to be stacked with the other sums."""
    rivals_nJ = torch.cat((entries.logits_nK, highest_rest_n[:, None]), dim=-1)
    agrees_n1 = entries.top_logit_n1 >= rivals_nJ.amax(dim=-1, keepdim=True)
    return (agrees_n1 & (terms.top_ids_n1 >= 0)).sum(dtype=highest_rest_n.dtype)
