"""The distillation loss inside the student's own forward, put there by hooks.

`attach(student, objective)` adds three hooks to the outermost module: one takes the targets out of
the keyword arguments, one keeps the hidden states in front of the output head and lets a single
position through, and one returns the loss. The module stays what it was, so saving, adapters, DDP
and FSDP work as for any model of `transformers`.

A student of a label space, or one that points at tokens, has no output embeddings: its logits, of
few classes, are taken as they come, and its loss is that of full logits.

Shapes: B rows, T tokens, N positions with a target, K entries, V logit width, C classes, D hidden.
"""

import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial
from transformers.utils import ModelOutput

from shared.errors import Refused
from shared.models.pooling import pooled
from shared.targets.base import TargetKind
from shared.tasks import Pooling
from student_train.architecture import num_blocks
from student_train.loss.linear import linear_loss
from student_train.loss.logits import logits_loss
from student_train.loss.outputs import OF_TOKENS, Micro, Outputs
from student_train.loss.positions import PREFIX, LinearHead, answers_of_logits, answers_of_states
from student_train.loss.rows import PER_STATE, SoftTarget, hidden_contrastive, squared_error
from student_train.loss.spec import HiddenLoss, LossSpec
from student_train.loss.terms import LossOutput

log = logging.getLogger(__name__)

TARGET_KEYS = (
    "position_index",
    "labels",
    "context",
    "target_ids",
    "target_logprobs",
    "target_log_tail",
    "target_counts",
    "target_values",
    "log_partition_ratio",
    "entropy",
    "label_logprob",
    "num_positions",
    "num_labels",
    "num_rows",
    "num_states",
    "hidden_index",
    "hidden_row",
    "row_ids",
)
PROJECTIONS = "distillation_projections"


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

    @property
    def states_alone(self) -> bool:
        """Whether the student has no head, and no loss but that of hidden states."""
        return self.outputs.states_alone

    def with_values(self, values: Mapping[str, float]) -> "Objective":
        """The same with other `temperature`, `soft_weight`, `hard_weight` or `hidden_weight`."""
        temperature = values.get("temperature", self.spec.temperature)
        return replace(
            self,
            spec=replace(self.spec, temperature=temperature),
            soft_weight=values.get("soft_weight", self.soft_weight),
            hard_weight=values.get("hard_weight", self.hard_weight),
            hidden_weight=values.get("hidden_weight", self.hidden_weight),
        )


@dataclass(frozen=True, slots=True)
class Head:
    """How the student's logits come from the states in front of its head."""

    linear: bool
    scale: float = 1.0
    softcap: float | None = None
    offset_V: Tensor | None = None  # added to all logits: the final_logits_bias of BART's family


class Attachment:
    """The hooks on one student; `detach` takes them off again."""

    def __init__(self, student: Any, objective: Objective) -> None:
        _refuse_shards(student)
        self.student, self.objective = student, objective
        self.head_module: Any = student.get_output_embeddings()
        if objective.states_alone or self.head_module is None:
            self.head = Head(linear=False)
        else:
            self.head = probe_head(student, self.head_module, objective.num_classes)
        self._of_labels = self.head_module is None and not objective.states_alone
        self._mask: Tensor | None = None  # i64 [B, T] of the micro-batch
        self._reads_token_types = reads_token_types(student)
        self._num_tokens = 0  # T of the micro-batch
        self._targets: dict[str, Tensor] | None = None
        self._states: Tensor | None = None
        self._layers: dict[int, Tensor] = {}
        # The newest attachment takes the targets: evaluation in the middle of training is at T = 1.
        self._handles = [
            student.register_forward_pre_hook(self._take_targets, with_kwargs=True, prepend=True),
            student.register_forward_hook(self._return_loss),
        ]
        if not self._of_labels and not objective.states_alone:
            self._handles.append(self.head_module.register_forward_pre_hook(self._hold_back))
        for _, layer in objective.layer_pairs:
            if layer == -1 and objective.states_alone:
                continue  # the student's own output
            if layer != -1:
                block = _blocks(student)[layer]
                self._handles.append(block.register_forward_hook(self._keeper(layer)))
            elif _config(student).is_encoder_decoder:  # a T5 scales its states for the head
                decoder = student.get_decoder()
                self._handles.append(decoder.register_forward_hook(self._keeper(layer)))
            else:
                trunk = _whole_model(student).base_model
                self._handles.append(trunk.register_forward_hook(self._keep_final))
        if objective.layer_pairs and not hasattr(student, PROJECTIONS):
            setattr(student, PROJECTIONS, self._projections())

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _projections(self) -> nn.ModuleDict:
        """A linear map for each pair of layers of different width, student to teacher."""
        width = _hidden_width(self.student)
        maps: dict[str, nn.Module] = {}
        for teacher_layer, student_layer in self.objective.layer_pairs:
            wanted = len(self.objective.deviations[teacher_layer])
            if wanted != width:
                name = projection_name(teacher_layer, student_layer)
                maps[name] = nn.Linear(width, wanted, bias=False)
        return nn.ModuleDict(maps)

    def _take_targets(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "position_index" not in kwargs:
            self._targets = None
            return args, kwargs
        names = [name for name in kwargs if name in TARGET_KEYS or name.startswith("hidden.")]
        self._targets = {name: kwargs.pop(name) for name in names}
        self._mask = kwargs.get("attention_mask")
        if not self._reads_token_types:
            kwargs.pop("token_type_ids", None)
        if self._of_labels:
            self._num_tokens = kwargs["input_ids"].shape[1]
            kwargs["input_ids"] = self._padded(kwargs["input_ids"], kwargs["attention_mask"])
        return args, {**kwargs, "use_cache": False}

    def _padded(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The student's own padding: some take the last other token for the end of a row."""
        pad = _config(self.student).get_text_config().pad_token_id
        return ids_BT if pad is None else ids_BT.masked_fill(mask_BT == 0, pad)

    def _hold_back(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._targets is None:
            return None
        self._states = args[0]
        return (args[0][:, :1], *args[1:]) if self.head.linear else None

    def _keeper(self, layer: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            if self._targets is not None:
                ended = isinstance(output, ModelOutput)  # after the last norm
                self._layers[layer] = output[0] if ended or isinstance(output, tuple) else output

        return keep

    def _keep_final(self, module: nn.Module, args: Any, output: Any) -> None:
        """The final state, which a masked language model transforms before its head."""
        if self._targets is not None:
            self._layers[-1] = output["last_hidden_state"]

    def _return_loss(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._targets is None:
            return None
        objective, targets, self._targets = self.objective, self._targets, None
        states, self._states = self._states, None
        layers, self._layers = self._layers, {}
        if objective.states_alone:
            return self._states_loss({**layers, -1: output["last_hidden_state"]}, targets)
        if objective.outputs.are_numbers:
            return self._value_loss(output, targets)
        sums: dict[str, Tensor] = {}
        common = self._common(targets)
        if self.head.linear:
            assert states is not None  # the head was called: every causal model calls it once
            states_ND = states.flatten(0, 1).index_select(0, targets["position_index"])
            result = self._head_loss(states_ND, common)
            if objective.with_answers:
                answers = answers_of_states(states_ND, self._linear_head(), **_compared(common))
                sums |= {PREFIX + name: values for name, values in answers.items()}
        else:
            logits_NV = self._own_logits(output, targets)
            result = logits_loss(logits_NV, **common)
            if objective.with_answers:
                answers = answers_of_logits(logits_NV, **_compared(common))
                sums |= {PREFIX + name: values for name, values in answers.items()}
            if self._of_labels:
                sums["logits"] = logits_NV[:, : objective.num_classes].detach()
        loss = result.loss
        sums["hard"] = result.hard_sum
        sums["student_entropy"] = result.student_entropy_sum
        if "target_ids" in targets:
            name, soft = "soft", result.soft_sum
            if objective.target_kind == "sample" and "entropy" in targets:  # cross-entropy to KL
                soft = soft - targets["entropy"].sum()
                loss = loss + objective.soft_weight * (soft - result.soft_sum) / _count(targets)
            elif objective.target_kind == "sample":  # of a mixture, whose entropy nobody knows
                name = "soft_cross_entropy"
            sums |= {name: soft, "agreement": result.agreement}
        if objective.layer_pairs:
            if states is not None:  # a trunk that no model calls (OPT) ends in front of the head
                layers.setdefault(-1, states)
            hidden, count = self._hidden_sum(layers, targets), self._hidden_count(targets)
            # A mean times all positions, as the other sums are: those are what it is divided by.
            sums["hidden"] = hidden.detach() * (_count(targets) / count)
            loss = loss + hidden * (objective.hidden_weight / count)
        if "entropy" in targets:
            sums["teacher_entropy"] = targets["entropy"].sum()
        return {"loss": loss, **sums}

    def _states_loss(
        self, layers: dict[int, Tensor], targets: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The loss of hidden states alone, and the student's vectors of the first pair [S, D]."""
        hidden, count = self._hidden_sum(layers, targets), self._hidden_count(targets)
        with torch.no_grad():
            vectors_SD = self._student_states(layers, targets, *self.objective.layer_pairs[0])
        return {
            "loss": hidden * (self.objective.hidden_weight / count),
            "hidden": hidden.detach() * (_count(targets) / count),
            "vectors": vectors_SD,
        }

    def _own_logits(self, output: Any, targets: dict[str, Tensor]) -> Tensor:
        """The student's logits at the positions, [N, V]."""
        objective = self.objective
        assert objective.outputs.logits_at is not None  # states alone have a loss of their own
        micro = Micro(targets, self._num_tokens, objective.num_classes)
        return objective.outputs.logits_at(output, micro)

    def _value_loss(self, output: Any, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """Squared errors, of the teacher's numbers and of the corpus's; `logits` is [N, 1]."""
        objective, count = self.objective, _count(targets)
        numbers_N1 = self._own_logits(output, targets).float()
        labels_N, answers_N = targets["labels"], numbers_N1[:, 0]
        # NaN is no label; an answer is 0 away from itself.
        hard = squared_error(answers_N, torch.where(labels_N.isnan(), answers_N, labels_N))
        loss, sums = hard * (objective.hard_weight / _labels(targets)), {"hard": hard.detach()}
        if "target_values" in targets:
            soft = squared_error(numbers_N1[:, 0], targets["target_values"])
            loss, sums["soft"] = loss + soft * (objective.soft_weight / count), soft.detach()
        return {"loss": loss, **sums, "logits": numbers_N1.detach()}

    def _common(self, targets: dict[str, Tensor]) -> dict[str, Any]:
        """What the loss is told however the student's logits come about."""
        objective, count = self.objective, _count(targets)
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
            "soft_scale": objective.soft_weight / count,
            "hard_scale": objective.hard_weight / _labels(targets),
            "with_entropy": True,
        }

    def _head_loss(self, states_ND: Tensor, common: dict[str, Any]) -> LossOutput:
        bias = getattr(self.head_module, "bias", None)
        weight, bias = _whole(self.head_module.weight), None if bias is None else _whole(bias)
        if self.head.offset_V is not None:
            bias = self.head.offset_V if bias is None else bias + self.head.offset_V
        scale, softcap = self.head.scale, self.head.softcap
        return linear_loss(states_ND, weight, bias, logit_scale=scale, softcap=softcap, **common)

    def _linear_head(self) -> LinearHead:
        bias = getattr(self.head_module, "bias", None)
        weight, bias = _whole(self.head_module.weight), None if bias is None else _whole(bias)
        return LinearHead(weight, bias, self.head.scale, self.head.softcap)

    def _hidden_count(self, targets: dict[str, Tensor]) -> Tensor:
        """States or, for a loss of whole rows, rows of the whole optimiser step; at least 1."""
        per_row = self.objective.hidden_loss == "contrastive"
        return targets["num_rows" if per_row else "num_states"].clamp_min(1).to(torch.float32)

    def _hidden_sum(self, layers: dict[int, Tensor], targets: dict[str, Tensor]) -> Tensor:
        total = torch.zeros((), device=targets["hidden_index"].device)
        for pair in self.objective.layer_pairs:
            states_SD = self._student_states(layers, targets, *pair)
            total = total + self._distance(states_SD, pair[0], targets)
        return total

    def _student_states(
        self,
        layers: dict[int, Tensor],
        targets: dict[str, Tensor],
        teacher_layer: int,
        student_layer: int,
    ) -> Tensor:
        """The student's states where the teacher's are, pooled and of the teacher's width."""
        projections: nn.ModuleDict = getattr(self.student, PROJECTIONS)
        pooling, states_BTD = self.objective.pooling, layers[student_layer]
        if pooling == "none":
            states_SD = states_BTD.flatten(0, 1).index_select(0, targets["hidden_index"])
        else:
            assert self._mask is not None  # rows are not packed
            pooled_BD = pooled(states_BTD, self._mask, pooling)
            states_SD = pooled_BD.index_select(0, targets["hidden_row"])
        name = projection_name(teacher_layer, student_layer)
        return projections[name](states_SD) if name in projections else states_SD

    def _distance(self, states_SD: Tensor, layer: int, targets: dict[str, Tensor]) -> Tensor:
        objective, teacher_SD = self.objective, targets[f"hidden.{layer}"]
        if objective.hidden_loss == "contrastive":
            row_S, rows = targets["hidden_row"], len(targets["row_ids"])
            temperature = objective.contrastive_temperature
            return hidden_contrastive(states_SD, teacher_SD, row_S, rows, temperature)
        deviation_D = objective.deviations[layer].to(states_SD.device)
        return PER_STATE[objective.hidden_loss](states_SD, teacher_SD, deviation_D)


def attach(student: nn.Module, objective: Objective) -> Attachment:
    """Makes the student return its distillation loss for batches of a `BatchStream`.

    Called with such a batch it returns a dict: `loss`, and detached sums over positions (`soft`,
    `hard`, `agreement`, `student_entropy`, ...); of a label space also the `logits` at the
    positions [N, C]. Any other call gives the model's usual output.
    Wrap the student in DDP, or shard it with `fully_shard` (FSDP2), after this and not before.
    """
    return Attachment(student, objective)


def _compared(common: dict[str, Any]) -> dict[str, Any]:
    """Of what the loss is told, what single positions are compared with."""
    return {name: common[name] for name in ("target", "labels_N", "num_classes")}


def projection_name(teacher_layer: int, student_layer: int) -> str:
    """A name that may be one of a module."""
    return f"{teacher_layer}_{student_layer}".replace("-", "m")


def _count(targets: dict[str, Tensor]) -> Tensor:
    """Positions of the whole optimiser step, at least 1: a step without any has loss 0."""
    return targets["num_positions"].clamp_min(1).to(torch.float32)


def _labels(targets: dict[str, Tensor]) -> Tensor:
    """Positions with a hard label of the whole optimiser step, at least 1."""
    return targets["num_labels"].clamp_min(1).to(torch.float32)


def probe_head(student: nn.Module, head: nn.Module | None, num_classes: int) -> Head:
    """Whether logits are `scale * (h W^T + b)`, by trying; with an optional tanh cap or offset."""
    weight = getattr(head, "weight", None)
    if head is None or not isinstance(weight, Tensor) or _is_adapted(head):
        return _fall_back("its head is no plain linear layer")
    captured: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    training = student.training
    student.eval()
    try:
        ids = torch.arange(1, 5, device=weight.device).reshape(1, 4) % num_classes
        decoder = {"decoder_input_ids": ids} if _config(student).is_encoder_decoder else {}
        with torch.no_grad():
            own = student(input_ids=ids, **decoder, use_cache=False).logits.float()
            bias = getattr(head, "bias", None)
            plain = nn.functional.linear(captured[0], weight, bias).float()
    finally:
        handle.remove()
        student.train(training)
    fitted = float((own * plain).sum() / plain.square().sum().clamp_min(1e-30))
    cap = getattr(_config(student).get_text_config(), "final_logit_softcapping", None)
    tolerance = (1e-4 if weight.dtype == torch.float32 else 2e-2) * float(own.abs().max())
    for scale, softcap in ((1.0, None), (fitted, None), *([(1.0, cap)] if cap else [])):
        logits = plain * scale if softcap is None else softcap * torch.tanh(plain / softcap)
        if torch.allclose(logits, own, rtol=0, atol=tolerance):
            return Head(linear=True, scale=scale, softcap=softcap)
    offset_V = (own - plain).flatten(0, 1).mean(dim=0)
    if torch.allclose(plain + offset_V, own, rtol=0, atol=tolerance):
        return Head(linear=True, offset_V=offset_V)
    return _fall_back("its logits are no scaled linear function of the states in front of the head")


def reads_token_types(student: Any) -> bool:
    """Whether the model tells the two texts of a pair apart by `token_type_ids`."""
    model = _whole_model(student)
    types = getattr(model.config.get_text_config(), "type_vocab_size", 0)
    return types > 1 and "token_type_ids" in inspect.signature(model.forward).parameters


def _refuse_shards(student: nn.Module) -> None:
    for name, parameter in student.named_parameters():
        if isinstance(parameter, DTensor):
            raise Refused(
                f"attach: {name} of this student is sharded (fully_shard, FSDP2) already, and "
                "what the loss adds to the student would be left out. Call attach on the whole "
                "student first, then fully_shard."
            )


def _whole(parameter: Tensor) -> Tensor:
    """A parameter as one tensor, also where FSDP2 keeps a shard of it on each rank.

    The loss runs after the head's own forward, when a head that was sharded as a group of its own
    is in shards again. Its gradient does not pass through the hooks of FSDP2, so it is averaged
    over the ranks here, as those do it.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    whole: Tensor = parameter.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if whole.requires_grad:
        whole.register_hook(lambda gradient: gradient / mesh.size())
    return whole


def _whole_model(student: Any) -> Any:
    """The model of `transformers`, also inside adapters."""
    return student.get_base_model() if hasattr(student, "peft_config") else student


def _is_adapted(head: nn.Module) -> bool:
    return hasattr(head, "lora_A") or hasattr(head, "base_layer")


def _fall_back(reason: str) -> Head:
    log.warning("this student's full logits are computed (slower, more memory): %s", reason)
    return Head(linear=False)


def _config(student: nn.Module) -> Any:
    return student.config


def _hidden_width(student: nn.Module) -> int:
    return int(_config(student).get_text_config().hidden_size)


def _blocks(student: nn.Module) -> nn.ModuleList:
    """The list of blocks: the longest ModuleList whose length is the number of layers."""
    wanted = num_blocks(_config(student))
    decoders = _config(student).is_encoder_decoder
    trunk: Any = student
    for module in (trunk.get_decoder() if decoders else trunk).modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise Refused(
        f"--hidden-map: no list of {wanted} blocks was found in {type(student).__name__}, which "
        "may run one block several times. Learn from the final state alone: --hidden-map -1:-1."
    )
