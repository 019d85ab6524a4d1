"""Kinds that keep the same number of classes at every position: the largest ones, or all.

N positions, C classes, K entries of each, G groups of 64 classes.
"""

from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from shared.errors import ConfigError
from shared.targets.base import TargetKind
from shared.targets.record import Target
from shared.targets.spec import TargetSpec
from teacher_cache.select.base import asked_temperatures
from teacher_cache.select.class_sums import ClassSums, sum_classes
from teacher_cache.select.distributions import Distribution, Kept, Logits
from teacher_cache.select.fewer import largest_of
from teacher_cache.select.ragged_entries import GROUP

if TYPE_CHECKING:
    from teacher_cache.config import CaptureConfig


# Of the groups that the first of two stages may choose: above it one stage is faster on a CPU, at
# 640 to 32,000 classes alike. At half of the groups one takes a third longer, below that twice.
TWO_STAGES_SHARE = 0.75
COMPARED_KS = (8, 16, 32, 64, 128)
COMPARED_CLASSES = 2048  # all of more are compared only where they are asked for
NO_CLASS = torch.iinfo(torch.int64).min  # sorts below the key of every class


class Equal(Distribution):
    """Entries whose ids and logits are found before anything is summed up."""

    @abstractmethod
    def best(self, block: Logits, spec: TargetSpec) -> tuple[Tensor, Tensor]:
        """Ids and float64 logits of the entries, [N, K] each."""

    def entries(
        self, block: Logits, spec: TargetSpec, offset_N: Tensor | None
    ) -> tuple[Kept, ClassSums]:
        ids_NK, values_NK = self.best(block, spec)

        def leave_out(some: slice, weights_NC: Tensor) -> None:
            weights_NC.scatter_(1, ids_NK[some], 0.0)

        sums = sum_classes(
            block.logits_NC, block.shift_N, leave_out, spec.temperatures, block.areas
        )
        return Kept(ids_NK, values_NK), sums


class TopK(Equal):
    """Exactly the best classes: larger logit first, then smaller id."""

    bytes_by_entries: ClassVar = {8: 18.0, 16: 31.0, 32: 56.0, 64: 104.0, 128: 196.0}

    def best(self, block: Logits, spec: TargetSpec) -> tuple[Tensor, Tensor]:
        return best_classes(block.logits_NC, block.maxima_NG, spec.num_entries)

    def spec(
        self, kind: TargetKind, num_classes: int, top_k: int, config: "CaptureConfig"
    ) -> TargetSpec:
        if top_k > num_classes:
            raise ConfigError(
                f"--top-k {top_k} exceeds the teacher's {num_classes} classes; "
                f"use --top-k {num_classes} to keep them all"
            )
        return TargetSpec(
            kind=kind,
            num_classes=num_classes,
            top_k=top_k,
            value_bits=config.value_bits,
            temperatures=asked_temperatures(config),
        )

    def options_like(self, targets: TargetSpec) -> dict[str, Any]:
        return {
            "targets": targets.kind,
            "top_k": targets.top_k,
            "value_bits": targets.value_bits,
        }

    def compared(
        self, kind: TargetKind, asked: TargetSpec, config: "CaptureConfig"
    ) -> list[TargetSpec]:
        ks = {*COMPARED_KS, *([asked.top_k] if asked.kind == kind else [])}
        classes = asked.num_classes
        return [self.spec(kind, classes, k, config) for k in sorted(ks) if k <= classes]

    def most_entries_of(self, spec: TargetSpec) -> int:
        return spec.num_entries

    def kept_share(
        self, ids_NK: Tensor, logprobs_NK: Tensor, spec: TargetSpec
    ) -> tuple[Tensor, Tensor]:
        ids_NK = ids_NK[:, : spec.num_entries]
        return ids_NK, torch.ones_like(ids_NK, dtype=torch.float32)

    def fewer(self, target: Target, spec: TargetSpec) -> Target:
        return largest_of(target, spec.num_entries)


class Dense(Equal):
    """Every class, so that there is no tail and every temperature is exact."""

    def spec(
        self, kind: TargetKind, num_classes: int, top_k: int, config: "CaptureConfig"
    ) -> TargetSpec:
        return TargetSpec(kind=kind, num_classes=num_classes, top_k=1, value_bits=16)

    def compared(
        self, kind: TargetKind, asked: TargetSpec, config: "CaptureConfig"
    ) -> list[TargetSpec]:
        if asked.kind != kind and asked.num_classes > COMPARED_CLASSES:
            return []
        return [self.spec(kind, asked.num_classes, 1, config)]

    def best(self, block: Logits, spec: TargetSpec) -> tuple[Tensor, Tensor]:
        every_C = torch.arange(spec.num_classes, device=block.logits_NC.device)
        return every_C.expand(block.logits_NC.shape), block.logits_NC.double()


def best_classes(logits_NC: Tensor, maxima_NG: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Ids and float64 logits of the k best classes, best first.

    Proof that two stages are exact: order classes by (larger logit, smaller id) and groups of
    consecutive classes by their best class, which is (larger maximum, smaller group); were one of
    the k best in a group outside the k best groups, each of those k groups would hold a better one.
    """
    num_classes, num_groups = logits_NC.shape[1], maxima_NG.shape[1]
    candidates_NM = torch.arange(num_classes, device=logits_NC.device).expand_as(logits_NC)
    if k <= TWO_STAGES_SHARE * num_groups:
        groups_NG = torch.arange(num_groups, device=logits_NC.device)
        best_NK = _keys(maxima_NG, groups_NG).topk(k, dim=1, sorted=False).indices
        lanes = torch.arange(GROUP, device=logits_NC.device)
        candidates_NM = (best_NK[:, :, None] * GROUP + lanes).flatten(1)
    inside_NM = candidates_NM < num_classes
    values_NM = logits_NC.gather(1, candidates_NM.clamp(max=num_classes - 1))
    keys_NM = torch.where(inside_NM, _keys(values_NM, candidates_NM), NO_CLASS)
    places_NK = keys_NM.topk(k, dim=1).indices
    return candidates_NM.gather(1, places_NK), values_NM.gather(1, places_NK).double()


def _keys(values: Tensor, ids: Tensor) -> Tensor:
    """Unique int64 keys: the order of (larger value, smaller id); ids below 2^32.

    The bits of a float32, as an integer, already ascend for positive numbers; flipping all but the
    sign of negative ones makes them ascend too. Adding 0 turns -0 into +0, which it equals.
    """
    bits = (values.float() + 0.0).view(torch.int32)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32) - ids
