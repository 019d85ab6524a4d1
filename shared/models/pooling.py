"""One vector for a row: what its hidden states become, in teacher and student alike.

B rows, T tokens, D channels.
"""

import torch
from torch import Tensor

from shared.tasks import Pooling


def pooled(states_BTD: Tensor, mask_BT: Tensor, pooling: Pooling) -> Tensor:
    """[B, D], half types as float32: the mean of a row's states, or the first or last of them.

    Special tokens are tokens, as in sentence-transformers; padding, on the right, is none.
    """
    if states_BTD.dtype != torch.float64:
        states_BTD = states_BTD.float()
    lengths_B = mask_BT.sum(dim=1)
    if pooling == "mean":
        sums_BD = (states_BTD * mask_BT[:, :, None]).sum(dim=1)
        return sums_BD / lengths_B[:, None].clamp_min(1)
    place_B = torch.zeros_like(lengths_B) if pooling == "cls" else lengths_B - 1
    rows_B = torch.arange(len(states_BTD), device=states_BTD.device)
    return states_BTD[rows_B, place_B]
