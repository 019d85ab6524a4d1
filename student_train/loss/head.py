"""The student's output head: whether it is linear, and its weights as whole tensors.

Shapes: V logit width.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Head:
    """How the student's logits come from the states in front of its head."""

    linear: bool
    scale: float = 1.0
    softcap: float | None = None
    offset_V: Tensor | None = None  # added to all logits: the final_logits_bias of BART's family


def probe_head(student: nn.Module, head: nn.Module | None, num_classes: int) -> Head:
    """Whether logits are `scale * (h W^T + b)`, by trying; with an optional tanh cap or offset."""
    weight = getattr(head, "weight", None)
    if head is None or not isinstance(weight, Tensor) or _is_adapted(head):
        return _fall_back("its head is no plain linear layer")
    own, plain = _try(student, head, num_classes)
    fitted = float((own * plain).sum() / plain.square().sum().clamp_min(1e-30))
    config: Any = student.config
    cap = getattr(config.get_text_config(), "final_logit_softcapping", None)
    tolerance = (1e-4 if weight.dtype == torch.float32 else 2e-2) * float(own.abs().max())
    for scale, softcap in ((1.0, None), (fitted, None), *([(1.0, cap)] if cap else [])):
        logits = plain * scale if softcap is None else softcap * torch.tanh(plain / softcap)
        if torch.allclose(logits, own, rtol=0, atol=tolerance):
            return Head(linear=True, scale=scale, softcap=softcap)
    offset_V = (own - plain).flatten(0, 1).mean(dim=0)
    if torch.allclose(plain + offset_V, own, rtol=0, atol=tolerance):
        return Head(linear=True, offset_V=offset_V)
    return _fall_back("its logits are no scaled linear function of the states in front of the head")


def _try(student: Any, head: Any, num_classes: int) -> tuple[Tensor, Tensor]:
    """Logits of a few tokens: the student's own, and those of a plain linear head; float32."""
    captured: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, args: captured.append(args[0]))
    training = student.training
    student.eval()
    try:
        ids = torch.arange(1, 5, device=head.weight.device).reshape(1, 4) % num_classes
        decoder = {"decoder_input_ids": ids} if student.config.is_encoder_decoder else {}
        with torch.no_grad():
            own = student(input_ids=ids, **decoder, use_cache=False).logits.float()
            bias = getattr(head, "bias", None)
            plain = nn.functional.linear(captured[0], head.weight, bias).float()
    finally:
        handle.remove()
        student.train(training)
    return own, plain


def whole_weights(head: Any) -> tuple[Tensor, Tensor | None]:
    """Weight [V, D] and bias [V] of a linear head."""
    bias = getattr(head, "bias", None)
    return _whole(head.weight), None if bias is None else _whole(bias)


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


def _is_adapted(head: nn.Module) -> bool:
    return hasattr(head, "lora_A") or hasattr(head, "base_layer")


def _fall_back(reason: str) -> Head:
    log.warning("this student's full logits are computed (slower, more memory): %s", reason)
    return Head(linear=False)
