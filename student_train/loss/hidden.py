"""The arithmetic of the hidden-state losses: pure functions of the states of student and teacher.

Shapes: N positions or S states, R rows, D hidden.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from student_train.loss.rows import MASKED_LOGIT
from student_train.loss.spec import HiddenLoss

MIN_RELATIVE_DEVIATION = 1e-2  # a dead channel counts at most 1e4 times the typical one


def hidden_mse(student_ND: Tensor, teacher_ND: Tensor, deviation_D: Tensor) -> Tensor:
    """Mean over channels, sum over positions, of the squared error of standardised states.

    deviation_D is the teacher's standard deviation per channel; its mean cancels out. Where all
    deviations are 0 (a cache of one position) the states are compared as they are.
    """
    student_ND, teacher_ND = _wide(student_ND), _wide(teacher_ND)
    deviation_D = deviation_D.to(student_ND.dtype)
    typical = deviation_D.square().mean().sqrt()
    floor = torch.where(typical > 0, MIN_RELATIVE_DEVIATION * typical, 1.0)
    error_ND = (student_ND - teacher_ND) / torch.maximum(deviation_D, floor)
    return error_ND.square().mean(dim=-1).sum()


def hidden_cosine(student_ND: Tensor, teacher_ND: Tensor, deviation_D: Tensor) -> Tensor:
    """Sum over positions of 1 - cosine, between the states as they are."""
    similarity_N = F.cosine_similarity(_wide(student_ND), _wide(teacher_ND), dim=-1)
    return (1 - similarity_N).sum()


def hidden_contrastive(
    student_SD: Tensor, teacher_SD: Tensor, row_S: Tensor, num_rows: int, temperature: float
) -> Tensor:
    """Sum over rows of InfoNCE: which teacher row belongs to this student row? In nats.

    A row is the mean of its states; row_S, int64 below num_rows, says which one a state is of, and
    a row without states takes no part. With s_r, t_r the student's and the teacher's rows the loss
    of row r is -log of softmax over r' of cos(s_r, t_r') / temperature, at r' = r (van den Oord et
    al. 2018, equation 4; in distillation Tian et al. 2020, Sun et al. 2020). The negatives are the
    other rows of the micro-batch, so its value depends on which rows come together and on how many:
    other micro-batches are another loss, and one row alone has loss 0.
    """
    student_RD, count_R = _pooled(_wide(student_SD), row_S, num_rows)
    teacher_RD, _ = _pooled(_wide(teacher_SD), row_S, num_rows)
    there_R = count_R > 0
    with torch.autocast(student_SD.device.type, enabled=False):  # bfloat16 is off by 0.1 nats
        similarity_RR = F.normalize(student_RD, dim=-1) @ F.normalize(teacher_RD, dim=-1).T
    logits_RR = (similarity_RR / temperature).masked_fill(~there_R, MASKED_LOGIT)
    loss_R = -logits_RR.log_softmax(dim=-1).diagonal()
    return torch.where(there_R, loss_R, 0.0).sum()


def _pooled(states_SD: Tensor, row_S: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The mean state of each row [R, D], 0 for a row without, and how many states it has [R]."""
    sum_RD = states_SD.new_zeros(num_rows, states_SD.shape[1]).index_add(0, row_S, states_SD)
    count_R = torch.bincount(row_S, minlength=num_rows)
    return sum_RD / count_R.clamp_min(1)[:, None], count_R


PER_STATE: dict[HiddenLoss, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "mse": hidden_mse,
    "cosine": hidden_cosine,
}


def _wide(states: Tensor) -> Tensor:
    """bfloat16 and float16 are widened to float32; float32 and float64 stay."""
    return states if states.dtype == torch.float64 else states.float()
