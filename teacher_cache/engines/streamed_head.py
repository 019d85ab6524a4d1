"""A model's logits at chosen positions, a chunk at a time, so that no [B, T, V] tensor exists.

One forward runs the trunk; only one token per row is let through to the head. Then the model is
called again for each chunk of positions, with a trunk that merely hands back hidden states: what
follows the trunk (soft caps, scales, biases, transforms) is always the model's own code, and no
table of families is needed. `find` compares with the model's full logits before it is trusted.

B rows, T tokens, N positions (flat in B * T), n positions of one chunk, V logit width, D hidden.
"""

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from teacher_cache.tasks.inputs import TeacherBatch

# Largest difference between two ways to the same logits, as a share of the largest logit. The trunk
# runs alike in both ways, so this is the rounding of one matrix product of another shape.
SAME_LOGITS = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def model_inputs(model: nn.Module, batch: TeacherBatch) -> dict[str, Any]:
    """Keyword arguments of the model. Without `use_cache=False` packed rows are not kept apart."""
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "return_dict": True}
    if accepts(model, "use_cache"):
        inputs["use_cache"] = False
    if batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask
    if batch.position_ids is not None:
        inputs["position_ids"] = batch.position_ids
    if batch.token_type_ids is not None and accepts(model, "token_type_ids"):
        inputs["token_type_ids"] = batch.token_type_ids
    if batch.decoder_input_ids is not None:
        inputs["decoder_input_ids"] = batch.decoder_input_ids
        inputs["decoder_attention_mask"] = batch.decoder_attention_mask
    return inputs


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's forward names this argument; what it merely swallows has no effect."""
    return name in inspect.signature(model.forward).parameters


@dataclass(frozen=True, slots=True)
class StreamedHead:
    """A model, and the modules that end in a hidden state: the last of them is the trunk."""

    model: nn.Module
    head: nn.Module
    stages: tuple[nn.Module, ...]  # in calling order, none inside another

    @property
    def trunk(self) -> nn.Module:
        return self.stages[-1]

    def run_trunk(self, inputs: Mapping[str, Any]) -> list[ModelOutput]:
        """The output of every stage; the head sees one token per row."""
        outputs: dict[nn.Module, ModelOutput] = {}
        with ExitStack() as hooks:
            hooks.enter_context(_held_back(self.head))
            for stage in self.stages:
                hooks.enter_context(_on_output(stage, outputs.__setitem__))
            self.model(**inputs)
        return [outputs[stage] for stage in self.stages]

    def logits(
        self, inputs: Mapping[str, Any], outputs: list[ModelOutput], states_nD: Tensor
    ) -> Tensor:
        """[n, V] for any n hidden states of the trunk; `inputs` are those the trunk ran on."""
        replies = [*outputs[:-1], _with_last_state(outputs[-1], states_nD[None])]
        with ExitStack() as replaced:
            for stage, reply in zip(self.stages, replies, strict=True):
                replaced.enter_context(_answering(stage, reply))
            return self.model(**inputs).logits[0]


def last_state(output: ModelOutput) -> Tensor:
    """The hidden state after the last norm, as the trunk hands it on: [B, T, D]."""
    return output["last_hidden_state"]


def find(model: nn.Module, inputs: Mapping[str, Any]) -> StreamedHead | None:
    """Runs the model once to see which of its modules end in a hidden state."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None:
        return None
    found: list[nn.Module] = []
    with ExitStack() as hooks:
        hooks.enter_context(_held_back(head))
        for module in model.modules():
            hooks.enter_context(_on_output(module, lambda module, _: found.append(module)))
        model(**inputs)
    inner = {inside for module in found for inside in module.modules() if inside is not module}
    outermost = dict.fromkeys(module for module in found if module not in inner)
    return StreamedHead(model, head, tuple(outermost)) if outermost else None


def agrees(streamed: StreamedHead, inputs: Mapping[str, Any], index_N: Tensor) -> bool:
    """Whether streaming gives the model's own full logits at these flat positions."""
    full_NV = streamed.model(**inputs).logits.flatten(0, 1)[index_N]
    outputs = streamed.run_trunk(inputs)
    states_ND = last_state(outputs[-1]).flatten(0, 1)
    if len(states_ND) != inputs.get("decoder_input_ids", inputs["input_ids"]).numel():
        return False
    chunks = states_ND[index_N.to(states_ND.device)].split(5)  # a size that divides nothing
    streamed_NV = torch.cat([streamed.logits(inputs, outputs, chunk) for chunk in chunks])
    return same_values(streamed_NV, full_NV, SAME_LOGITS[full_NV.dtype])


def same_values(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Equal shape and infinities, and no difference above a share of the largest value."""
    if found.shape != expected.shape or not torch.equal(found.isfinite(), expected.isfinite()):
        return False
    found, expected = found.float().nan_to_num(), expected.float().nan_to_num()
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@contextmanager
def _held_back(head: nn.Module) -> Iterator[None]:
    def first_token_only(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (arguments[0][..., :1, :], *arguments[1:])

    handle = head.register_forward_pre_hook(first_token_only)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _on_output(
    module: nn.Module, report: Callable[[nn.Module, ModelOutput], None]
) -> Iterator[None]:
    """Reports each output of the module that carries a last hidden state."""

    def hook(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, ModelOutput) and "last_hidden_state" in output:
            report(module, output)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _answering(module: nn.Module, reply: ModelOutput) -> Iterator[None]:
    """The module returns `reply` without running; whatever had replaced its forward comes back."""
    attributes = vars(module)
    before = attributes.get("forward")
    attributes["forward"] = lambda *_, **__: reply
    try:
        yield
    finally:
        del attributes["forward"]
        if before is not None:
            attributes["forward"] = before


def _with_last_state(output: ModelOutput, states: Tensor) -> ModelOutput:
    return dataclasses.replace(output, last_hidden_state=states)
