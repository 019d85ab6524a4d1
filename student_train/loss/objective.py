"""What a student is trained on: the terms of its loss, their weights, and their weighted sum.

Pure functions of tensors: where these come from in a student's forward is attachment.py's matter.

Shapes: N positions with a target.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from shared.errors import ConfigError
from shared.targets.base import Kind, TargetKind
from shared.targets.kinds import KINDS
from shared.tasks import Pooling
from student_train.loss.outputs import OF_TOKENS, Outputs
from student_train.loss.rows import SoftTarget, squared_error
from student_train.loss.spec import HiddenLoss, LossSpec
from student_train.loss.terms import LossOutput

Targets = dict[str, Tensor]  # what a batch says besides what the student reads


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What the student is trained on; each weight multiplies the mean of its term.

    The mean is over the positions of the whole step that have what the term is about: targets, a
    hard label, hidden states.
    """

    spec: LossSpec
    num_classes: int
    target_kind: TargetKind = "topk"
    outputs: Outputs = OF_TOKENS  # the form of what the student gives, by its task
    soft_weight: float
    hard_weight: float
    hidden_weight: float = 0.0
    hidden_loss: HiddenLoss = "mse"
    contrastive_temperature: float = 0.05
    layer_pairs: tuple[tuple[int, int], ...] = ()  # (teacher layer, student layer)
    deviations: Mapping[int, Tensor] = field(default_factory=dict)  # teacher layer -> [D]
    with_answers: bool = False  # also `answers.*`, of every position (positions.py)
    pooling: Pooling = "none"  # a row's states become one

    def __post_init__(self) -> None:
        if self.target_kind not in KINDS:
            known = ", ".join(KINDS)
            raise ConfigError(
                f"Objective: target_kind: found {self.target_kind!r}, expected one of {known}. "
                "Give the kind of the cache: cache.manifest.targets.kind."
            )

    @property
    def of_kind(self) -> Kind[Any]:
        """What can be asked of the targets."""
        return KINDS[self.target_kind]

    @property
    def states_alone(self) -> bool:
        """Whether the student has no head, and no loss but that of hidden states."""
        return self.outputs.states_alone

    def with_values(self, values: Mapping[str, float]) -> "Objective":
        """Another objective, with some of `temperature` and the three weights changed."""
        temperature = values.get("temperature", self.spec.temperature)
        return replace(
            self,
            spec=replace(self.spec, temperature=temperature),
            soft_weight=values.get("soft_weight", self.soft_weight),
            hard_weight=values.get("hard_weight", self.hard_weight),
            hidden_weight=values.get("hidden_weight", self.hidden_weight),
        )


def row_arguments(objective: Objective, targets: Targets) -> dict[str, Any]:
    """What the row losses are told however the student's logits come about."""
    target = None
    if "target_ids" in targets:
        target = SoftTarget(
            targets["target_ids"],
            targets["target_logprobs"],
            targets["target_log_tail"],
            targets.get("log_partition_ratio"),
            targets.get("target_counts"),
            objective.target_kind,
        )
    return {
        "target": target,
        "labels_N": targets["labels"],
        "spec": objective.spec,
        "num_classes": objective.num_classes,
        "soft_scale": objective.soft_weight / num_positions(targets),
        "hard_scale": objective.hard_weight / _num_labels(targets),
        "with_entropy": True,
    }


def compared(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `row_arguments` that single positions are compared with."""
    return {name: arguments[name] for name in ("target", "labels_N", "num_classes")}


def row_loss(
    objective: Objective, result: LossOutput, targets: Targets
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of soft targets and hard labels, and the sums over positions that are reported."""
    loss, soft = result.loss, result.soft_sum
    sums = {"hard": result.hard_sum, "student_entropy": result.student_entropy_sum}
    if "target_ids" not in targets:
        return loss, sums
    name = "soft"
    if objective.of_kind.sampled and "entropy" in targets:  # cross-entropy to KL
        soft = soft - targets["entropy"].sum()
        loss = loss + objective.soft_weight * (soft - result.soft_sum) / num_positions(targets)
    elif objective.of_kind.sampled:  # of a mixture, whose entropy nobody knows
        name = "soft_cross_entropy"
    return loss, sums | {name: soft, "agreement": result.agreement}


def value_loss(objective: Objective, numbers_N1: Tensor, targets: Targets) -> dict[str, Tensor]:
    """Squared errors, of the teacher's numbers and of the corpus's; `logits` is [N, 1]."""
    labels_N, answers_N = targets["labels"], numbers_N1[:, 0]
    # NaN is no label; an answer is 0 away from itself.
    hard = squared_error(answers_N, torch.where(labels_N.isnan(), answers_N, labels_N))
    loss, sums = hard * (objective.hard_weight / _num_labels(targets)), {"hard": hard.detach()}
    if "target_values" in targets:
        soft = squared_error(answers_N, targets["target_values"])
        loss = loss + soft * (objective.soft_weight / num_positions(targets))
        sums["soft"] = soft.detach()
    return {"loss": loss, **sums, "logits": numbers_N1.detach()}


def num_positions(targets: Targets) -> Tensor:
    """Positions of the whole optimiser step, at least 1: a step without any has loss 0."""
    return targets["num_positions"].clamp_min(1).to(torch.float32)


def _num_labels(targets: Targets) -> Tensor:
    """Positions with a hard label of the whole optimiser step, at least 1."""
    return targets["num_labels"].clamp_min(1).to(torch.float32)
