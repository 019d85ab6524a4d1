"""A teacher's logits to targets that are distributions: the classes to keep, and a few sums.

Plain torch, any device, any float dtype in, every sum accumulated in float32; the caller's logits
are never written to. On a CPU no bit depends on how the positions were cut into chunks.

N positions, V logit width, C classes (the first C columns), K entries of each or E of all
positions, G groups of 64 classes.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from shared.format.blocks import Block
from shared.targets.ragged import drawn_logprob
from shared.targets.spec import TargetSpec
from teacher_cache.select.base import PositionTargets, Selected, Selector
from teacher_cache.select.class_sums import LOG2_E, ClassSums, WorkAreas, group_maxima


@dataclass(frozen=True, slots=True)
class Logits:
    """Logits of N positions, and what every kind needs to know of them."""

    logits_NC: Tensor
    maxima_NG: Tensor  # of each group of classes
    shift_N: Tensor  # float32, LOG2_E times the largest logit
    bad_N: Tensor  # bool: NaN or +inf among the logits, or no finite class
    areas: WorkAreas


@dataclass(slots=True)
class Kept:
    """The entries: [N, K], or [E] with the position of each."""

    ids: Tensor
    values: Tensor  # float64, logits
    rows: Tensor | None = None  # int64 [E]
    counts: Tensor | None = None  # int64 [N]
    drawn: Tensor | None = None  # bool [E]

    def spread(self, of_position_N: Tensor) -> Tensor:
        """What holds for a position at each of its entries."""
        return of_position_N[:, None] if self.rows is None else of_position_N[self.rows]

    def sum(self, of_entry: Tensor) -> Tensor:
        """Sums over the entries of each position, [N]."""
        if self.counts is None:
            return of_entry.sum(dim=1)
        return torch.segment_reduce(of_entry, "sum", lengths=self.counts, unsafe=True)


class Distribution(Selector):
    """A kind of targets that keeps a part, or all, of each distribution."""

    @abstractmethod
    def entries(
        self, block: Logits, spec: TargetSpec, offset_N: Tensor | None
    ) -> tuple[Kept, ClassSums]:
        """The entries of each position, and the sums over classes, whose tail leaves them out."""

    def select(
        self,
        logits_NV: Tensor,
        spec: TargetSpec,
        labels_N: Tensor | None = None,
        offset_N: Tensor | None = None,
    ) -> Selected:
        if logits_NV.shape[1] < spec.num_classes:
            raise ValueError(
                f"logits have {logits_NV.shape[1]} columns, the targets {spec.num_classes} classes"
            )
        logits_NC = logits_NV[:, : spec.num_classes]
        areas = WorkAreas.for_logits(logits_NC)
        maxima_NG = group_maxima(logits_NC, areas)
        maximum_N = maxima_NG.amax(dim=1).float()
        bad_N = ~maximum_N.isfinite()
        shift_N = torch.where(bad_N, 0.0, maximum_N * LOG2_E)
        block = Logits(logits_NC, maxima_NG, shift_N, bad_N, areas)
        kept, sums = self.entries(block, spec, offset_N)

        # float64 from here on: a few numbers per position, each rounded once when it is stored
        mass_N = kept.sum(torch.exp2(kept.values * LOG2_E - kept.spread(shift_N))) + sums.tail_N
        log_mass_N = mass_N.log()
        log_partition_N = shift_N.double() / LOG2_E + log_mass_N
        label_logprob = None
        if labels_N is not None:
            label_logprob = (label_values(logits_NC, labels_N) - log_partition_N).float()
        logprobs = (kept.values - kept.spread(log_partition_N)).float()
        if kept.drawn is not None:
            logprobs.masked_fill_(kept.drawn, float(drawn_logprob(spec)))
        return Selected(
            ids=kept.ids,
            logprobs=logprobs,
            counts=kept.counts,
            log_tail=(sums.tail_N.log() - log_mass_N).float(),
            entropy=(log_mass_N - sums.moment_N / LOG2_E / mass_N).clamp_(min=0.0).float(),
            log_partition=log_partition_N.float(),
            bad_N=bad_N,
            label_logprob=label_logprob,
            log_partition_ratio={
                temperature: (sum_N.log() - log_mass_N / temperature).float()
                for temperature, sum_N in sums.tempered_N.items()
            },
        )

    def fill(self, block: Block, kept: PositionTargets) -> None:
        block.target = kept.target
        block.label_logprob = kept.label_logprob
        block.entropy = kept.entropy
        block.log_partition_ratio = dict(kept.log_partition_ratio)


def label_values(logits_NC: Tensor, labels_N: Tensor) -> Tensor:
    """Float64 logit of each label; NaN for a negative label, -inf for one that is no class."""
    num_classes = logits_NC.shape[1]
    values_N = logits_NC.gather(1, labels_N.clamp(0, num_classes - 1)[:, None])[:, 0].double()
    values_N = values_N.masked_fill(labels_N >= num_classes, -math.inf)
    return values_N.masked_fill(labels_N < 0, math.nan)
