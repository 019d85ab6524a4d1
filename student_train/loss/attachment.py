"""The distillation loss inside the student's own forward, put there by hooks.

`attach(student, objective)` adds three hooks to the outermost module: one takes the targets out of
the keyword arguments, one keeps the hidden states in front of the output head and lets a single
position through, and one returns the loss. The module stays what it was, so saving, adapters, DDP
and FSDP work as for any model of `transformers`.

A student of a label space, or one that points at tokens, has no output embeddings: its logits, of
few classes, are taken as they come, and its loss is that of full logits.

Shapes: B rows, T tokens, N positions with a target, V logit width, C classes, D hidden, S positions
with hidden states.
"""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from shared.errors import Refused
from student_train.loss.head import Head, probe_head, whole_weights
from student_train.loss.layers import States, StudentLayers, without_adapters
from student_train.loss.linear import linear_loss
from student_train.loss.logits import logits_loss
from student_train.loss.objective import (
    Objective,
    Targets,
    compared,
    row_arguments,
    row_loss,
    value_loss,
)
from student_train.loss.outputs import Micro
from student_train.loss.positions import PREFIX, LinearHead, answers_of_logits, answers_of_states
from student_train.loss.terms import LossOutput

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

Sums = dict[str, Tensor]


def attach(student: nn.Module, objective: Objective) -> "Attachment":
    """Makes the student return its distillation loss for batches of a `BatchStream`.

    Called with such a batch it returns a dict: `loss`, and detached sums over positions (`soft`,
    `hard`, `agreement`, `student_entropy`, ...); of a label space also the `logits` at the
    positions [N, C]. Any other call gives the model's usual output.
    Wrap the student in DDP, or shard it with `fully_shard` (FSDP2), after this and not before.
    """
    return Attachment(student, objective)


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
        self._targets: Targets | None = None
        self._states: Tensor | None = None  # in front of the head
        # The newest attachment takes the targets: evaluation in the middle of training is at T = 1.
        self._handles = [
            student.register_forward_pre_hook(self._take_targets, with_kwargs=True, prepend=True),
            student.register_forward_hook(self._return_loss),
        ]
        if not self._of_labels and not objective.states_alone:
            self._handles.append(self.head_module.register_forward_pre_hook(self._hold_back))
        self._layers = StudentLayers(student, objective)
        self._handles += self._layers.handles

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _take_targets(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "position_index" not in kwargs:
            self._targets = None
            return args, kwargs
        names = [name for name in kwargs if name in TARGET_KEYS or name.startswith("hidden.")]
        self._targets = {name: kwargs.pop(name) for name in names}
        self._layers.listen()
        self._mask = kwargs.get("attention_mask")
        if not self._reads_token_types:
            kwargs.pop("token_type_ids", None)
        if self._of_labels:
            self._num_tokens = kwargs["input_ids"].shape[1]
            kwargs["input_ids"] = self._padded(kwargs["input_ids"], kwargs["attention_mask"])
        return args, {**kwargs, "use_cache": False}

    def _padded(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The student's own padding: some take the last other token for the end of a row."""
        pad = self.student.config.get_text_config().pad_token_id
        return ids_BT if pad is None else ids_BT.masked_fill(mask_BT == 0, pad)

    def _hold_back(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if self._targets is None:
            return None
        self._states = args[0]
        return (args[0][:, :1], *args[1:]) if self.head.linear else None

    def _return_loss(self, module: nn.Module, args: Any, output: Any) -> Any:
        if self._targets is None:
            return None
        objective, targets, self._targets = self.objective, self._targets, None
        states, self._states = self._states, None
        layers = self._layers.take()
        if objective.states_alone:
            return self._states_loss({**layers, -1: output["last_hidden_state"]}, targets)
        if objective.outputs.are_numbers:
            return value_loss(objective, self._own_logits(output, targets).float(), targets)
        if self.head.linear:
            assert states is not None  # the head was called: every causal model calls it once
            result, sums = self._loss_of_states(states, targets)
        else:
            result, sums = self._loss_of_logits(output, targets)
        loss, of_rows = row_loss(objective, result, targets)
        sums |= of_rows
        if objective.layer_pairs:
            if states is not None:  # a trunk that no model calls (OPT) ends in front of the head
                layers.setdefault(-1, states)
            weighted, sums["hidden"] = self._hidden_loss(layers, targets)
            loss = loss + weighted
        if "entropy" in targets:
            sums["teacher_entropy"] = targets["entropy"].sum()
        return {"loss": loss, **sums}

    def _loss_of_states(self, states_BTD: Tensor, targets: Targets) -> tuple[LossOutput, Sums]:
        """From the states in front of a linear head, and the answers where these are asked for."""
        head, arguments = self.head, row_arguments(self.objective, targets)
        states_ND = states_BTD.flatten(0, 1).index_select(0, targets["position_index"])
        weight_VD, bias_V = whole_weights(self.head_module)
        if head.offset_V is not None:
            bias_V = head.offset_V if bias_V is None else bias_V + head.offset_V
        arguments |= {"logit_scale": head.scale, "softcap": head.softcap}
        result = linear_loss(states_ND, weight_VD, bias_V, **arguments)
        if not self.objective.with_answers:
            return result, {}
        linear = LinearHead(weight_VD, bias_V, head.scale, head.softcap)
        return result, _named(answers_of_states(states_ND, linear, **compared(arguments)))

    def _loss_of_logits(self, output: Any, targets: Targets) -> tuple[LossOutput, Sums]:
        """From the student's own logits, which of a label space are returned as well."""
        objective, arguments = self.objective, row_arguments(self.objective, targets)
        logits_NV = self._own_logits(output, targets)
        result = logits_loss(logits_NV, **arguments)
        sums: Sums = {}
        if objective.with_answers:
            sums |= _named(answers_of_logits(logits_NV, **compared(arguments)))
        if self._of_labels:
            sums["logits"] = logits_NV[:, : objective.num_classes].detach()
        return result, sums

    def _own_logits(self, output: Any, targets: Targets) -> Tensor:
        """The student's logits at the positions, [N, V]."""
        objective = self.objective
        assert objective.outputs.logits_at is not None  # states alone have a loss of their own
        micro = Micro(targets, self._num_tokens, objective.num_classes)
        return objective.outputs.logits_at(output, micro)

    def _hidden_loss(self, layers: States, targets: Targets) -> tuple[Tensor, Tensor]:
        return self._layers.loss(layers, self._mask, targets, self.objective.hidden_weight)

    def _states_loss(self, layers: States, targets: Targets) -> Sums:
        """The loss of hidden states alone, and the student's vectors of the first pair [S, D]."""
        loss, hidden = self._hidden_loss(layers, targets)
        pair = self.objective.layer_pairs[0]
        with torch.no_grad():
            vectors_SD = self._layers.at(pair, layers, self._mask, targets)
        return {"loss": loss, "hidden": hidden, "vectors": vectors_SD}


def reads_token_types(student: Any) -> bool:
    """Whether the model tells the two texts of a pair apart by `token_type_ids`."""
    model = without_adapters(student)
    types = getattr(model.config.get_text_config(), "type_vocab_size", 0)
    return types > 1 and "token_type_ids" in inspect.signature(model.forward).parameters


def _named(answers: Sums) -> Sums:
    return {PREFIX + name: values for name, values in answers.items()}


def _refuse_shards(student: nn.Module) -> None:
    for name, parameter in student.named_parameters():
        if isinstance(parameter, DTensor):
            raise Refused(
                f"attach: {name} of this student is sharded (fully_shard, FSDP2) already, and "
                "what the loss adds to the student would be left out. Call attach on the whole "
                "student first, then fully_shard."
            )
