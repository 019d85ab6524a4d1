"""What a student answers at every position: its loss, its choice and how sure it is, one by one.

The losses of training are sums; a report asks which positions they come from. Pure functions of
tensors, over the head in chunks of positions, so that no [N, V] tensor is ever there.

Shapes: N positions (n in one chunk), V logit width, C classes (C <= V), K entries, J cells, D
hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from student_train.loss.rows import MASKED_LOGIT, SoftTarget, log_cells, soft_rows, teacher_cells
from student_train.loss.spec import LossSpec

PREFIX = "answers."  # of their names in what an attached student returns

_CHUNK_ELEMENTS = 1 << 24  # of float32 logits: 64 MiB, a few times over


@dataclass(frozen=True, slots=True)
class LinearHead:
    """Logits `scale * (h W^T + b)` with an optional tanh cap."""

    weight_VD: Tensor
    bias_V: Tensor | None
    scale: float
    softcap: float | None

    def logits(self, states_nD: Tensor, num_classes: int) -> Tensor:
        """float32 at least, [n, C]."""
        bias = None if self.bias_V is None else self.bias_V[:num_classes]
        logits_nC = F.linear(states_nD, self.weight_VD[:num_classes], bias) * self.scale
        logits_nC = logits_nC.to(torch.promote_types(logits_nC.dtype, torch.float32))
        if self.softcap is None:
            return logits_nC
        return self.softcap * torch.tanh(logits_nC / self.softcap)


def answers_of_states(
    states_ND: Tensor,
    head: LinearHead,
    target: SoftTarget | None,
    labels_N: Tensor,
    num_classes: int,
) -> dict[str, Tensor]:
    """What `answers_of_logits` gives, from the hidden states in front of a linear head."""
    return _in_chunks(
        lambda rows: head.logits(states_ND[rows], num_classes), target, labels_N, num_classes
    )


def answers_of_logits(
    logits_NV: Tensor, target: SoftTarget | None, labels_N: Tensor, num_classes: int
) -> dict[str, Tensor]:
    """What the student answers at each position, [N]:

    `loss`: -ln of the probability of the label, nats, 0 where there is no label (a negative one);
    `student`, `probability`: the most probable class and how probable it is, at T = 1;
    with a target that gives probabilities (not a sample) also `teacher` and
    `teacher_probability`, and `kl`: KL(teacher || student) over its entries and one cell for all
    other classes, nats.
    """
    wide = torch.promote_types(logits_NV.dtype, torch.float32)
    return _in_chunks(
        lambda rows: logits_NV[rows, :num_classes].to(wide), target, labels_N, num_classes
    )


def _in_chunks(
    logits_of: Callable[[slice], Tensor],
    target: SoftTarget | None,
    labels_N: Tensor,
    num_classes: int,
) -> dict[str, Tensor]:
    size = max(64, _CHUNK_ELEMENTS // num_classes)
    parts = []
    for first in range(0, max(1, len(labels_N)), size):  # one empty chunk where there is nothing
        rows = slice(first, first + size)
        logits_nC = logits_of(rows).detach().clamp_min(MASKED_LOGIT)
        part = _of_student(logits_nC, labels_N[rows])
        if target is not None and not target.of_kind.sampled:
            part |= _of_teacher(logits_nC, target.at(rows))
        parts.append(part)
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _of_student(logits_nC: Tensor, labels_n: Tensor) -> dict[str, Tensor]:
    """Equal logits leave the choice to the smaller class."""
    log_all_n = torch.logsumexp(logits_nC, dim=-1)
    best_n, student_n = logits_nC.max(dim=-1)
    label_logit_n = logits_nC.gather(1, labels_n.clamp_min(0)[:, None])[:, 0]
    loss_n = (log_all_n - label_logit_n).masked_fill(labels_n < 0, 0.0)
    return {"loss": loss_n, "student": student_n, "probability": (best_n - log_all_n).exp()}


def _of_teacher(logits_nC: Tensor, target: SoftTarget) -> dict[str, Tensor]:
    ids_nK, kept_nK = target.ids.long(), target.logprobs > -torch.inf
    # Missing entries are written as class 0, which may be an entry of its own.
    kept_nC = torch.zeros_like(logits_nC).scatter_add_(1, ids_nK, kept_nK.to(logits_nC.dtype)) > 0
    log_rest_n = torch.logsumexp(logits_nC.masked_fill(kept_nC, MASKED_LOGIT), dim=-1)
    entry_nK = logits_nC.gather(1, ids_nK).masked_fill(~kept_nK, MASKED_LOGIT)
    student_nJ = log_cells(entry_nK, log_rest_n)
    kl_n = soft_rows(student_nJ, teacher_cells(target.logprobs, target.log_tail), LossSpec())
    best_n, slot_n = target.logprobs.max(dim=-1)
    teacher_n = ids_nK.gather(1, slot_n[:, None])[:, 0]
    return {"kl": kl_n, "teacher": teacher_n, "teacher_probability": best_n.exp()}
