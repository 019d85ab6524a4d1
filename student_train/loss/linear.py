"""The training loss from hidden states and head weight, in chunks of rows, with no [N, V] tensor.

Gradients are computed inside the forward pass, while a chunk's logits are at hand; the backward
pass only multiplies them by the gradient that arrives. One softmax per chunk gives everything: with
the entries masked out of the logits it is the student's distribution over all *other* classes, and
each loss is a function of the entries' logits and of the logsumexp of that rest alone. Autograd
differentiates this small function; the gradient of the chunk's logits is then `d loss / d log_rest
* softmax(rest)`, with the gradients at entries and labels added to it in place.

Shapes: N positions (n in one chunk), V logit width, C classes (C <= V), K entries, D hidden.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from student_train.loss.rows import (
    LOG_FLOOR,
    MASKED_LOGIT,
    SoftTarget,
    log_cells,
    merge_repeats,
    prepare_target,
    sampled_rows,
    soft_rows,
    teacher_cells,
)
from student_train.loss.spec import LossSpec

CPU_BUFFER_BYTES = 96 << 20  # 384 rows of 32,000 classes: 1.04 of the time of 512, 0.93 of 256
CUDA_BUFFER_BYTES = 768 << 20  # not measured; leaves the loss below 1 GB
CPU_CACHE_BYTES = 16 << 20
ENOUGH_ROWS = 512  # more only where they are so short that all fit in the cache
MIN_ROWS = 128  # BLAS repacks the weight for each chunk: 64 rows take 1.27 times as long
PARTIAL_ELEMENTS = 16 << 20  # of a bfloat16 weight gradient, before it joins the float32 sum

_Inputs = tuple[Tensor, Tensor, Tensor | None]  # hidden states, weight, bias


@dataclass(slots=True)
class LinearLossOutput:
    """Sums over the positions. Only `loss` can be differentiated, and only once."""

    loss: Tensor  # soft_scale * soft_sum + hard_scale * hard_sum
    soft_sum: Tensor
    hard_sum: Tensor
    agreement: Tensor  # count of positions where no class beats the teacher's most probable one
    student_entropy_sum: Tensor  # nats at T = 1 over all classes; 0 unless asked for


def linear_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    *,
    target: SoftTarget | None,
    labels_N: Tensor | None,
    spec: LossSpec,
    num_classes: int,
    soft_scale: float | Tensor = 1.0,
    hard_scale: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    with_entropy: bool = False,
) -> LinearLossOutput:
    """Soft and hard loss under the head `logit_scale * (h W^T + b)`, with an optional tanh cap.

    A negative label is none. Columns at or beyond `num_classes` count as logits of minus infinity.
    Under autocast the matmuls run in its dtype; logits and the sum of the weight gradient are
    float32 at least.
    """
    head = _Head(num_classes, logit_scale, softcap, _matmul_dtype(weight_VD))
    apart = spec.temperature != 1 and (labels_N is not None or with_entropy)
    wide = _wide(head.dtype)
    weights = _Weights(spec, wide, with_entropy, apart, soft_scale, hard_scale)
    terms = _terms(hidden_ND, target, labels_N, weights)
    inputs = (hidden_ND, weight_VD, bias_V)
    # Inside the Function autograd is off and its `needs_input_grad` does not know of no_grad.
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    return LinearLossOutput(*_LinearLoss.apply(*inputs, needs, head, terms, chunk_rows))


def logits_loss(
    logits_NV: Tensor,
    *,
    target: SoftTarget | None,
    labels_N: Tensor | None,
    spec: LossSpec,
    num_classes: int,
    soft_scale: float | Tensor = 1.0,
    hard_scale: float | Tensor = 1.0,
    with_entropy: bool = False,
) -> LinearLossOutput:
    """The same from a student's own logits by plain autograd: for label spaces and odd heads."""
    wide = _wide(logits_NV.dtype)
    weights = _Weights(spec, wide, with_entropy, False, soft_scale, hard_scale)
    terms = _terms(logits_NV, target, labels_N, weights).at(slice(None))
    logits_NC = logits_NV[:, :num_classes].to(wide).clamp_min(MASKED_LOGIT)
    log_all_N = torch.logsumexp(logits_NC, dim=-1)
    label_logit_N1 = logits_NC.gather(1, terms.labels_n1.clamp_min(0))
    tempered_NC = logits_NC / terms.weights.spec.temperature
    rest_NC = tempered_NC.detach().clone()
    entries = _mask_entries(rest_NC, terms)
    rest_NC = tempered_NC.masked_fill(rest_NC == MASKED_LOGIT, MASKED_LOGIT)
    entry_NK = tempered_NC.gather(1, terms.ids_nK)
    entry_NK = entry_NK.masked_fill(entries.logprobs_nK == -math.inf, MASKED_LOGIT)
    log_rest_N, mean_logit_N = torch.logsumexp(rest_NC, dim=-1), _mean_logit(logits_NC, terms)
    variables = (entry_NK, log_rest_N, label_logit_N1, mean_logit_N, log_all_N)
    soft, hard = _soft_and_hard(variables, entries.logprobs_nK, terms)
    agreement = _agreement(entries, rest_NC.amax(dim=-1), terms)
    entropy = torch.zeros_like(soft)
    if with_entropy:
        entropy = (log_all_N - (logits_NC.softmax(dim=-1) * logits_NC).sum(dim=-1)).sum()
    sums = torch.stack((soft, hard, agreement, entropy)).detach().unbind()
    return LinearLossOutput(soft_scale * soft + hard_scale * hard, *sums)


@dataclass(frozen=True, slots=True)
class _Head:
    num_classes: int
    scale: float
    softcap: float | None
    dtype: torch.dtype  # of the matmuls


@dataclass(frozen=True, slots=True)
class _Weights:
    """How the terms are added up, and what else is asked for."""

    spec: LossSpec
    dtype: torch.dtype  # of logits and row losses
    with_entropy: bool
    apart: bool  # T is not 1, so that hard loss or entropy need a softmax of their own
    soft_scale: float | Tensor
    hard_scale: float | Tensor


@dataclass(frozen=True, slots=True)
class _Terms:
    """What is compared at all positions, as it was cached."""

    target: SoftTarget
    labels_N1: Tensor  # int64; negative: none
    weights: _Weights

    def at(self, rows: slice) -> "_RowTerms":
        """Of a chunk: ragged entries padded, temperature and tail applied."""
        labels_n1, dtype = self.labels_N1[rows], self.weights.dtype
        target = self.target.at(rows)
        prepared = prepare_target(target, labels_n1[:, 0], self.weights.spec)
        return _RowTerms(
            ids_nK=prepared.ids.long(),
            logprobs_nK=prepared.logprobs.to(dtype),
            log_tail_n=prepared.log_tail.to(dtype),
            top_ids_n1=_top_ids(target),
            labels_n1=labels_n1,
            sampled=target.kind == "sample",
            weights=self.weights,
        )


@dataclass(frozen=True, slots=True)
class _RowTerms:
    """What is compared at the positions of a chunk."""

    ids_nK: Tensor  # int64
    logprobs_nK: Tensor
    log_tail_n: Tensor
    top_ids_n1: Tensor  # the teacher's most probable class; negative: none
    labels_n1: Tensor  # int64; negative: none
    sampled: bool
    weights: _Weights


def _terms(
    student: Tensor, target: SoftTarget | None, labels_N: Tensor | None, weights: _Weights
) -> _Terms:
    """No target is one without entries and tail, which any loss takes for 0; likewise no labels."""
    N = len(student)
    if target is None:
        smoothing = weights.spec.label_smoothing
        weights = replace(weights, spec=LossSpec(label_smoothing=smoothing), apart=False)
        empty_N0 = student.new_empty(N, 0, dtype=weights.dtype)
        target = SoftTarget(empty_N0.long(), empty_N0, student.new_full((N,), -math.inf))
    none_N1 = student.new_full((N, 1), -1, dtype=torch.long)
    return _Terms(target, none_N1 if labels_N is None else labels_N.long()[:, None], weights)


def _top_ids(target: SoftTarget) -> Tensor:
    if not target.ids.shape[1]:
        return target.ids.new_full((len(target.ids), 1), -1, dtype=torch.long)
    top_N1, slot_N1 = target.logprobs.max(dim=-1, keepdim=True)
    return target.ids.gather(1, slot_N1).long().masked_fill(top_N1 == -math.inf, -1)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        needs: Sequence[bool],
        head: _Head,
        terms: _Terms,
        chunk_rows: int | None,
    ) -> tuple[Tensor, ...]:
        inputs, C = (hidden_ND, weight_VD, bias_V), head.num_classes
        gradients = _Gradients.allocate(inputs, needs, head)
        weight_CD = weight_VD[:C].to(head.dtype)
        sums_4 = weight_VD.new_zeros(4, dtype=terms.weights.dtype)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for rows, chunk in _chunks(weight_CD, len(hidden_ND), terms, chunk_rows):
                hidden_nD = (hidden_ND[rows] * head.scale).to(head.dtype)
                torch.mm(hidden_nD, weight_CD.t(), out=chunk.matmul_nC)
                chunk.widen()
                if bias_V is not None:
                    chunk.logits_nC.add_(bias_V[:C], alpha=head.scale)
                sums_4 += _chunk_sums(chunk, terms.at(rows), head.softcap, gradients.needed)
                if gradients.needed:
                    gradients.add(rows, chunk.narrow_gradient(), hidden_nD, weight_CD)
        ctx.gradients = gradients.finished(inputs)
        soft, hard, agreement, entropy = sums_4.clone().unbind()
        ctx.mark_non_differentiable(soft, hard, agreement, entropy)
        loss = terms.weights.soft_scale * soft + terms.weights.hard_scale * hard
        return loss, soft, hard, agreement, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place, and let go of here: autograd copies a gradient someone else still holds.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "this loss was differentiated before and its gradients are gone: "
                "compute the loss again instead of backward(retain_graph=True)"
            )
        scaled = [None if grad is None else grad.mul_(grad_loss) for grad in gradients]
        return *scaled, None, None, None, None


@dataclass(slots=True)
class _Gradients:
    """The gradients as they add up; None where none is needed, a frozen head's for instance."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None
    scale: float

    @classmethod
    def allocate(cls, inputs: _Inputs, needs: Sequence[bool], head: _Head) -> "_Gradients":
        hidden_ND, weight_VD, bias_V = inputs
        wide = _wide(head.dtype)
        return cls(
            torch.empty_like(hidden_ND, dtype=head.dtype) if needs[0] else None,
            torch.zeros_like(weight_VD, dtype=wide) if needs[1] else None,
            torch.zeros_like(bias_V, dtype=wide) if bias_V is not None and needs[2] else None,
            head.scale,
        )

    @property
    def needed(self) -> bool:
        return not (self.hidden_ND is None and self.weight_VD is None and self.bias_V is None)

    def add(self, rows: slice, dz_nC: Tensor, scaled_nD: Tensor, weight_CD: Tensor) -> None:
        """scaled_nD: the hidden states times the logit scale."""
        C, D = weight_CD.shape
        if self.hidden_ND is not None:
            torch.mm(dz_nC, weight_CD, out=self.hidden_ND[rows]).mul_(self.scale)
        if self.bias_V is not None:
            self.bias_V[:C].add_(dz_nC.sum(dim=0, dtype=self.bias_V.dtype), alpha=self.scale)
        if self.weight_VD is None:
            return
        if self.weight_VD.dtype == dz_nC.dtype:
            self.weight_VD[:C].addmm_(dz_nC.t(), scaled_nD)
            return
        step = max(1, PARTIAL_ELEMENTS // D)
        for first in range(0, C, step):
            classes = slice(first, min(C, first + step))
            self.weight_VD[classes] += dz_nC[:, classes].t() @ scaled_nD

    def finished(self, inputs: _Inputs) -> tuple[Tensor | None, ...]:
        gradients = (self.hidden_ND, self.weight_VD, self.bias_V)
        return tuple(
            None if gradient is None or like is None else gradient.to(like.dtype)
            for gradient, like in zip(gradients, inputs, strict=True)
        )


@dataclass(slots=True)
class _Chunk:
    """Buffers that one chunk after another uses; `probs_nC` ends as the gradient of the logits."""

    logits_nC: Tensor
    probs_nC: Tensor
    hard_probs_nC: Tensor  # at T = 1; `probs_nC` itself where that is not needed
    matmul_nC: Tensor  # in the dtype of the matmuls; `logits_nC` itself where that is wide

    def widen(self) -> None:
        if self.matmul_nC.dtype != self.logits_nC.dtype:
            self.logits_nC.copy_(self.matmul_nC)

    def narrow_gradient(self) -> Tensor:
        if self.matmul_nC.dtype == self.logits_nC.dtype:
            return self.probs_nC
        return self.matmul_nC.copy_(self.probs_nC)


def _chunks(
    weight_CD: Tensor, N: int, terms: _Terms, chunk_rows: int | None
) -> Iterator[tuple[slice, _Chunk]]:
    C, narrow = len(weight_CD), weight_CD.dtype
    wide, apart = terms.weights.dtype, terms.weights.apart
    dtypes = [wide] * (3 if apart else 2) + [narrow] * (narrow != wide)
    if chunk_rows is None:
        row_bytes = C * sum(dtype.itemsize for dtype in dtypes)
        chunk_rows = _auto_rows(row_bytes, weight_CD.device.type)
    buffers = [weight_CD.new_empty(min(N, chunk_rows), C, dtype=dtype) for dtype in dtypes]
    for first in range(0, N, chunk_rows):
        n = min(chunk_rows, N - first)
        logits_nC, probs_nC, *others = (buffer[:n] for buffer in buffers)
        hard_probs_nC = others[0] if apart else probs_nC
        matmul_nC = others[-1] if narrow != wide else logits_nC
        yield slice(first, first + n), _Chunk(logits_nC, probs_nC, hard_probs_nC, matmul_nC)


def _auto_rows(row_bytes: int, device_type: str) -> int:
    if device_type == "cpu":
        few_classes = max(ENOUGH_ROWS, CPU_CACHE_BYTES // row_bytes)
        rows = min(CPU_BUFFER_BYTES // row_bytes, few_classes)
    else:
        rows = CUDA_BUFFER_BYTES // row_bytes
    return max(MIN_ROWS, rows // 64 * 64)


@dataclass(slots=True)
class _Entries:
    raw_nK: Tensor  # the student's logits at the ids
    logits_nK: Tensor  # the same, minus infinity where there is no entry
    logprobs_nK: Tensor  # the teacher's, repeated ids added up; -inf: no entry
    top_logit_n1: Tensor  # the student's logit of the teacher's most probable class


def _mask_entries(logits_nC: Tensor, terms: _RowTerms) -> _Entries:
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
    return _Entries(raw_nK, logits_nK, logprobs_nK, top_logit_n1)


def _chunk_sums(chunk: _Chunk, terms: _RowTerms, softcap: float | None, gradient: bool) -> Tensor:
    """Soft, hard, agreement and entropy sums; turns `probs_nC` into the gradient of the logits."""
    logits_nC = chunk.logits_nC
    if softcap is not None:
        logits_nC.div_(softcap).tanh_().mul_(softcap)
    label_logit_n1 = logits_nC.gather(1, terms.labels_n1.clamp_min(0))
    mean_logit_n = _mean_logit(logits_nC, terms)
    log_all, entropy = [], logits_nC.new_zeros(())
    if terms.weights.apart:
        log_all_n, _ = _softmax(logits_nC, chunk.hard_probs_nC)
        log_all = [log_all_n]
        if terms.weights.with_entropy:
            entropy = _entropy_sum(logits_nC, chunk.hard_probs_nC, log_all_n[:, None])
    if terms.weights.spec.temperature != 1:
        logits_nC.div_(terms.weights.spec.temperature)
    entries = _mask_entries(logits_nC, terms)
    log_rest_n, highest_rest_n = _softmax(logits_nC, chunk.probs_nC)
    if terms.weights.with_entropy and not terms.weights.apart:
        cells_nJ = torch.cat((entries.logits_nK, log_rest_n[:, None]), dim=-1)
        entropy = _entropy_sum(logits_nC, chunk.probs_nC, cells_nJ)
    with torch.set_grad_enabled(gradient):
        variables = [entries.logits_nK, log_rest_n, label_logit_n1, mean_logit_n, *log_all]
        variables = [variable.detach().requires_grad_(gradient) for variable in variables]
        soft, hard = _soft_and_hard(variables, entries.logprobs_nK, terms)
        loss = terms.weights.soft_scale * soft + terms.weights.hard_scale * hard
    if gradient:
        slopes = torch.autograd.grad(loss, variables)
        _set_logits_gradient(chunk, slopes, entries, terms, softcap)
    agreement = _agreement(entries, highest_rest_n, terms)
    return torch.stack((soft.detach(), hard.detach(), agreement, entropy))


def _mean_logit(logits_nC: Tensor, terms: _RowTerms) -> Tensor:
    """Over the classes, [n]: all that label smoothing needs of them. 0 where it is not read."""
    if terms.weights.spec.label_smoothing == 0:
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


def _soft_and_hard(
    variables: Sequence[Tensor], logprobs_nK: Tensor, terms: _RowTerms
) -> tuple[Tensor, Tensor]:
    """The two sums over a chunk, as functions of what `_chunk_sums` differentiates them by."""
    entry_nK, log_rest_n, label_logit_n1, mean_logit_n, *log_all = variables
    student_nJ = log_cells(entry_nK, log_rest_n)
    teacher_nJ = teacher_cells(logprobs_nK, terms.log_tail_n)
    if terms.sampled:
        soft_n = sampled_rows(student_nJ, teacher_nJ)
    else:
        soft_n = soft_rows(student_nJ, teacher_nJ, terms.weights.spec)
    cells_nJ = torch.cat((entry_nK, log_rest_n[:, None]), dim=-1)
    log_all_n = log_all[0] if log_all else torch.logsumexp(cells_nJ, dim=-1)
    return soft_n.sum(), _hard_sum(label_logit_n1, mean_logit_n, log_all_n, terms)


def _hard_sum(
    label_logit_n1: Tensor, mean_logit_n: Tensor, log_all_n: Tensor, terms: _RowTerms
) -> Tensor:
    smoothing = terms.weights.spec.label_smoothing
    logprob_n1 = (label_logit_n1 - log_all_n[:, None]).clamp_min(LOG_FLOOR)
    mean_logprob_n1 = (mean_logit_n - log_all_n).clamp_min(LOG_FLOOR)[:, None]
    smooth_n1 = (1 - smoothing) * logprob_n1 + smoothing * mean_logprob_n1
    return -smooth_n1.masked_fill(terms.labels_n1 < 0, 0.0).sum()


def _set_logits_gradient(
    chunk: _Chunk,
    slopes: Sequence[Tensor],
    entries: _Entries,
    terms: _RowTerms,
    softcap: float | None,
) -> None:
    entry_nK, log_rest_n, label_logit_n1, mean_logit_n, *log_all = slopes
    T = terms.weights.spec.temperature
    gradient_nC = chunk.probs_nC.mul_(log_rest_n[:, None] / T)
    gradient_nC.scatter_add_(1, terms.ids_nK, entry_nK / T)
    if log_all:
        gradient_nC.addcmul_(chunk.hard_probs_nC, log_all[0][:, None])
    gradient_nC.scatter_add_(1, terms.labels_n1.clamp_min(0), label_logit_n1)
    if terms.weights.spec.label_smoothing:
        gradient_nC.add_(mean_logit_n[:, None], alpha=1 / gradient_nC.shape[1])
    if softcap is not None:  # d cap tanh(z / cap) / dz = 1 - (capped / cap)^2
        ratio_nC = chunk.logits_nC.scatter_(1, terms.ids_nK, entries.raw_nK).mul_(T / softcap)
        gradient_nC.addcmul_(gradient_nC, ratio_nC.square_(), value=-1)


def _agreement(entries: _Entries, highest_rest_n: Tensor, terms: _RowTerms) -> Tensor:
    """A count in the dtype of the logits, to be stacked with the other sums."""
    rivals_nJ = torch.cat((entries.logits_nK, highest_rest_n[:, None]), dim=-1)
    agrees_n1 = entries.top_logit_n1 >= rivals_nJ.amax(dim=-1, keepdim=True)
    return (agrees_n1 & (terms.top_ids_n1 >= 0)).sum(dtype=highest_rest_n.dtype)


def _matmul_dtype(weight_VD: Tensor) -> torch.dtype:
    """As F.linear would have it; float16 has not the range for gradients that are not scaled up."""
    dtype, device_type = weight_VD.dtype, weight_VD.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    return torch.float32 if dtype == torch.float16 else dtype


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
