"""Targets that are no distribution: numbers of a regression, and none at all.

N positions.
"""

from typing import Any

import torch
from torch import Tensor

from shared.format.blocks import Block
from shared.targets.spec import TargetSpec
from teacher_cache.select.base import PositionTargets, Selected, Selector


class Values(Selector):
    """The outputs of a regression: one entry for each position, `logprobs` being the number."""

    distributions = False
    learns_classes = False

    def select(
        self,
        logits_NV: Tensor,
        spec: TargetSpec,
        labels_N: Tensor | None = None,
        offset_N: Tensor | None = None,
    ) -> Selected:
        values_N1 = logits_NV.float()
        nothing_N = torch.zeros_like(values_N1[:, 0])
        return Selected(
            ids=torch.zeros_like(values_N1, dtype=torch.long),
            logprobs=values_N1,
            counts=None,
            log_tail=nothing_N,
            entropy=nothing_N,
            log_partition=nothing_N,
            bad_N=~values_N1[:, 0].isfinite(),
            label_logprob=None,
            log_partition_ratio={},
        )

    def options_like(self, targets: TargetSpec) -> dict[str, Any]:
        return {"targets": "auto", "top_k": None}

    def fill(self, block: Block, kept: PositionTargets) -> None:
        block.target_values = kept.target.logprobs[:, 0]


class Nothing(Selector):
    """Hard labels only, or hidden states only: a position has no target."""

    has_targets = False
    distributions = False

    def select(
        self,
        logits_NV: Tensor,
        spec: TargetSpec,
        labels_N: Tensor | None = None,
        offset_N: Tensor | None = None,
    ) -> Selected:
        raise ValueError("targets of this kind are never asked of a teacher")

    def fill(self, block: Block, kept: PositionTargets) -> None:
        raise ValueError("a block of this kind has no targets to be filled with")
