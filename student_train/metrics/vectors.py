"""How alike two models find the same rows to each other: pure functions of pooled vectors.

R rows with a pooled vector, D channels, P pairs of rows.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_RANKED_ROWS = 500  # 124,750 pairs


def nearest_agreement(ours_RD: Tensor, theirs_RD: Tensor) -> float:
    """Share of rows whose nearest other row, by cosine, is the same for both."""
    nearest = []
    for vectors_RD in (ours_RD, theirs_RD):
        unit_RD = F.normalize(vectors_RD.double(), dim=-1)
        nearest.append((unit_RD @ unit_RD.T).fill_diagonal_(-torch.inf).argmax(dim=1))
    return float((nearest[0] == nearest[1]).double().mean())


def similarity_correlation(ours_RD: Tensor, theirs_RD: Tensor) -> float:
    """Spearman's rank correlation of the cosines of all pairs of the first 500 rows."""
    ours_P, theirs_P = (_pair_ranks(rows[:_RANKED_ROWS]) for rows in (ours_RD, theirs_RD))
    return float(np.corrcoef(ours_P, theirs_P)[0, 1])


def _pair_ranks(vectors_RD: Tensor) -> np.ndarray:
    unit_RD = F.normalize(vectors_RD.double(), dim=-1)
    one, other = torch.triu_indices(len(unit_RD), len(unit_RD), 1)
    return _ranks((unit_RD @ unit_RD.T)[one, other].numpy())


def _ranks(values_P: np.ndarray) -> np.ndarray:
    """The ranks by size, from 0; equal values share the mean of their ranks."""
    _, group_P, count_G = np.unique(values_P, return_inverse=True, return_counts=True)
    last_G = np.cumsum(count_G)
    return ((last_G - count_G + last_G - 1) / 2)[group_P]
