"""What the row losses of a whole batch are told, however the student's logits come about.

Shapes: N positions (n in one chunk), K entries.
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from student_train.loss.kernels.base import RowTerms, Wanted
from student_train.loss.rows import SoftTarget, prepare_target
from student_train.loss.spec import LossSpec


@dataclass(slots=True)
class LossOutput:
    """Sums over the positions. Only `loss` can be differentiated, and only once."""

    loss: Tensor  # soft_scale * soft_sum + hard_scale * hard_sum
    soft_sum: Tensor
    hard_sum: Tensor
    agreement: Tensor  # count of positions where no class beats the teacher's most probable one
    student_entropy_sum: Tensor  # nats at T = 1 over all classes; 0 unless asked for


@dataclass(frozen=True, slots=True)
class Terms:
    """What is compared at all positions, as it was cached."""

    target: SoftTarget
    labels_N1: Tensor  # int64; negative: none
    wanted: Wanted

    def at(self, rows: slice) -> RowTerms:
        """What a chunk is compared with: ragged entries padded, temperature and tail applied."""
        labels_n1, dtype = self.labels_N1[rows], self.wanted.dtype
        target = self.target.at(rows)
        prepared = prepare_target(target, labels_n1[:, 0], self.wanted.spec)
        return RowTerms(
            ids_nK=prepared.ids.long(),
            logprobs_nK=prepared.logprobs.to(dtype),
            log_tail_n=prepared.log_tail.to(dtype),
            top_ids_n1=_top_ids(target),
            labels_n1=labels_n1,
            sampled=target.of_kind.sampled,
        )


def terms_of(
    student: Tensor, target: SoftTarget | None, labels_N: Tensor | None, wanted: Wanted
) -> Terms:
    """No target is one without entries and tail, which any loss takes for 0; likewise no labels.

    student: a tensor [N, anything] on the device of the loss.
    """
    N = len(student)
    if target is None:
        smoothing = wanted.spec.label_smoothing
        wanted = replace(wanted, spec=LossSpec(label_smoothing=smoothing))
        empty_N0 = student.new_empty(N, 0, dtype=wanted.dtype)
        target = SoftTarget(empty_N0.long(), empty_N0, student.new_full((N,), -math.inf))
    none_N1 = student.new_full((N, 1), -1, dtype=torch.long)
    return Terms(target, none_N1 if labels_N is None else labels_N.long()[:, None], wanted)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype that logits and sums have where a head computes in this one."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _top_ids(target: SoftTarget) -> Tensor:
    if not target.ids.shape[1]:
        return target.ids.new_full((len(target.ids), 1), -1, dtype=torch.long)
    top_N1, slot_N1 = target.logprobs.max(dim=-1, keepdim=True)
    return target.ids.gather(1, slot_N1).long().masked_fill(top_N1 == -math.inf, -1)
