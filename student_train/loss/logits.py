"""The training loss from a student's own logits: for label spaces, and for odd heads.

Shapes: N positions, V logit width, C classes (C <= V), K entries.
"""

import math

import torch
from torch import Tensor

from student_train.loss.kernels.base import Wanted
from student_train.loss.kernels.torch_rows import (
    agreement,
    mask_entries,
    mean_logit,
    soft_and_hard,
)
from student_train.loss.rows import MASKED_LOGIT, SoftTarget
from student_train.loss.spec import LossSpec
from student_train.loss.terms import LossOutput, terms_of, wide


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
) -> LossOutput:
    """Soft and hard loss as `linear_loss` has them, by plain autograd."""
    wanted = Wanted(
        spec=spec,
        dtype=wide(logits_NV.dtype),
        soft_scale=soft_scale,
        hard_scale=hard_scale,
        with_entropy=with_entropy,
        with_labels=labels_N is not None,
    )
    terms = terms_of(logits_NV, target, labels_N, wanted)
    rows, spec = terms.at(slice(None)), terms.wanted.spec
    logits_NC = logits_NV[:, :num_classes].to(wanted.dtype).clamp_min(MASKED_LOGIT)
    log_all_N = torch.logsumexp(logits_NC, dim=-1)
    label_logit_N1 = logits_NC.gather(1, rows.labels_n1.clamp_min(0))
    tempered_NC = logits_NC / spec.temperature
    rest_NC = tempered_NC.detach().clone()
    entries = mask_entries(rest_NC, rows)
    rest_NC = tempered_NC.masked_fill(rest_NC == MASKED_LOGIT, MASKED_LOGIT)
    entry_NK = tempered_NC.gather(1, rows.ids_nK)
    entry_NK = entry_NK.masked_fill(entries.logprobs_nK == -math.inf, MASKED_LOGIT)
    log_rest_N, mean_logit_N = torch.logsumexp(rest_NC, dim=-1), mean_logit(logits_NC, spec)
    variables = (entry_NK, log_rest_N, label_logit_N1, mean_logit_N, log_all_N)
    soft, hard = soft_and_hard(variables, entries.logprobs_nK, rows, spec)
    agrees = agreement(entries, rest_NC.amax(dim=-1), rows)
    entropy = torch.zeros_like(soft)
    if with_entropy:
        entropy = (log_all_N - (logits_NC.softmax(dim=-1) * logits_NC).sum(dim=-1)).sum()
    sums = torch.stack((soft, hard, agrees, entropy)).detach().unbind()
    return LossOutput(soft_scale * soft + hard_scale * hard, *sums)
