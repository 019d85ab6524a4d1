"""The training loss from hidden states and head weight, in chunks of rows, with no [N, V] tensor.

Gradients are computed inside the forward pass, while a chunk's logits are at hand; the backward
pass only multiplies them by the gradient that arrives. What the loss of a chunk of logits is, and
its gradient, is a kernel's matter (kernels/).

Shapes: N positions (n in one chunk), V logit width, C classes (C <= V), D hidden.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from student_train.loss.kernels.base import RowKernel, Wanted
from student_train.loss.kernels.table import choose
from student_train.loss.rows import SoftTarget
from student_train.loss.spec import LossSpec
from student_train.loss.terms import LossOutput, Terms, terms_of, wide

CPU_BUFFER_BYTES = 96 << 20  # 384 rows of 32,000 classes: 1.04 of the time of 512, 0.93 of 256
CUDA_BUFFER_BYTES = 768 << 20  # not measured; leaves the loss below 1 GB
CPU_CACHE_BYTES = 16 << 20
ENOUGH_ROWS = 512  # more only where they are so short that all fit in the cache
MIN_ROWS = 128  # BLAS repacks the weight for each chunk: 64 rows take 1.27 times as long
PARTIAL_ELEMENTS = 16 << 20  # of a bfloat16 weight gradient, before it joins the float32 sum

_Inputs = tuple[Tensor, Tensor, Tensor | None]  # hidden states, weight, bias


def linear_loss(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    *,
    target: SoftTarget | None,
    labels_N: Tensor | None,
    spec: LossSpec,
    num_classes: int,
    soft_scale: float | Tensor = 1.0,
    hard_scale: float | Tensor = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    chunk_rows: int | None = None,
    with_entropy: bool = False,
) -> LossOutput:
    """Soft and hard loss under the head `logit_scale * (h W^T + b)`, with an optional tanh cap.

    A negative label is none. Columns at or beyond `num_classes` count as logits of minus infinity.
    Under autocast the matmuls run in its dtype; logits and the sum of the weight gradient are
    float32 at least.
    """
    head = _Head(num_classes, logit_scale, _matmul_dtype(weight_VD))
    wanted = Wanted(
        spec=spec,
        dtype=wide(head.dtype),
        soft_scale=soft_scale,
        hard_scale=hard_scale,
        with_entropy=with_entropy,
        with_labels=labels_N is not None,
        softcap=softcap,
    )
    terms = terms_of(hidden_ND, target, labels_N, wanted)
    inputs = (hidden_ND, weight_VD, bias_V)
    # Inside the Function autograd is off and its `needs_input_grad` does not know of no_grad.
    needs = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]
    return LossOutput(*_LinearLoss.apply(*inputs, needs, head, terms, chunk_rows))


@dataclass(frozen=True, slots=True)
class _Head:
    num_classes: int
    scale: float
    dtype: torch.dtype  # of the matmuls


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        needs: Sequence[bool],
        head: _Head,
        terms: Terms,
        chunk_rows: int | None,
    ) -> tuple[Tensor, ...]:
        inputs, wanted = (hidden_ND, weight_VD, bias_V), terms.wanted
        gradients = _Gradients.allocate(inputs, needs, head)
        weight_CD = weight_VD[: head.num_classes].to(head.dtype)
        kernel = choose(weight_CD.device, wanted.dtype, wanted.spec)
        chunks = _Chunks.sized(weight_CD, terms, kernel, chunk_rows)
        sums_4 = weight_VD.new_zeros(4, dtype=wanted.dtype)
        with torch.autocast(hidden_ND.device.type, enabled=False):
            for rows, chunk in chunks.over(len(hidden_ND)):
                hidden_nD = chunk.fill(hidden_ND[rows], weight_CD, bias_V, head.scale)
                row_terms, needed = terms.at(rows), gradients.needed
                found = kernel.run(
                    chunk.logits_nC, chunk.buffers, row_terms, wanted, gradient=needed
                )
                sums_4 += torch.stack((found.soft, found.hard, found.agreement, found.entropy))
                if needed:
                    gradients.add(rows, chunk.narrow(found.gradient_nC), hidden_nD, weight_CD)
        ctx.gradients = gradients.finished(inputs)
        soft, hard, agreement, entropy = sums_4.clone().unbind()
        ctx.mark_non_differentiable(soft, hard, agreement, entropy)
        loss = wanted.soft_scale * soft + wanted.hard_scale * hard
        return loss, soft, hard, agreement, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        # Scaled in place, and let go of here: autograd copies a gradient someone else still holds.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError(
                "this loss was differentiated before and its gradients are gone: "
                "compute the loss again instead of backward(retain_graph=True)"
            )
        scaled = [None if grad is None else grad.mul_(grad_loss) for grad in gradients]
        return *scaled, None, None, None, None


@dataclass(slots=True)
class _Gradients:
    """The gradients as they add up; None where none is needed, a frozen head's for instance."""

    hidden_ND: Tensor | None
    weight_VD: Tensor | None
    bias_V: Tensor | None
    scale: float

    @classmethod
    def allocate(cls, inputs: _Inputs, needs: Sequence[bool], head: _Head) -> "_Gradients":
        hidden_ND, weight_VD, bias_V = inputs
        sums = wide(head.dtype)
        return cls(
            torch.empty_like(hidden_ND, dtype=head.dtype) if needs[0] else None,
            torch.zeros_like(weight_VD, dtype=sums) if needs[1] else None,
            torch.zeros_like(bias_V, dtype=sums) if bias_V is not None and needs[2] else None,
            head.scale,
        )

    @property
    def needed(self) -> bool:
        return not (self.hidden_ND is None and self.weight_VD is None and self.bias_V is None)

    def add(self, rows: slice, dz_nC: Tensor, scaled_nD: Tensor, weight_CD: Tensor) -> None:
        """scaled_nD: the hidden states times the logit scale."""
        C, D = weight_CD.shape
        if self.hidden_ND is not None:
            torch.mm(dz_nC, weight_CD, out=self.hidden_ND[rows]).mul_(self.scale)
        if self.bias_V is not None:
            self.bias_V[:C].add_(dz_nC.sum(dim=0, dtype=self.bias_V.dtype), alpha=self.scale)
        if self.weight_VD is None:
            return
        if self.weight_VD.dtype == dz_nC.dtype:
            self.weight_VD[:C].addmm_(dz_nC.t(), scaled_nD)
            return
        step = max(1, PARTIAL_ELEMENTS // D)
        for first in range(0, C, step):
            classes = slice(first, min(C, first + step))
            self.weight_VD[classes] += dz_nC[:, classes].t() @ scaled_nD

    def finished(self, inputs: _Inputs) -> tuple[Tensor | None, ...]:
        gradients = (self.hidden_ND, self.weight_VD, self.bias_V)
        return tuple(
            None if gradient is None or like is None else gradient.to(like.dtype)
            for gradient, like in zip(gradients, inputs, strict=True)
        )


@dataclass(slots=True)
class _Chunk:
    """Memory that one chunk after another uses, [n, C]."""

    logits_nC: Tensor
    buffers: Sequence[Tensor]  # of the kernel
    matmul_nC: Tensor  # in the dtype of the matmuls; `logits_nC` itself where that is wide

    def fill(
        self, states_nD: Tensor, weight_CD: Tensor, bias_V: Tensor | None, scale: float
    ) -> Tensor:
        """Computes the logits before the cap; returns the scaled states that they come from."""
        scaled_nD = (states_nD * scale).to(weight_CD.dtype)
        torch.mm(scaled_nD, weight_CD.t(), out=self.matmul_nC)
        if self.matmul_nC.dtype != self.logits_nC.dtype:
            self.logits_nC.copy_(self.matmul_nC)
        if bias_V is not None:
            self.logits_nC.add_(bias_V[: len(weight_CD)], alpha=scale)
        return scaled_nD

    def narrow(self, gradient_nC: Tensor) -> Tensor:
        """A gradient in the dtype of the matmuls."""
        if self.matmul_nC.dtype == self.logits_nC.dtype:
            return gradient_nC
        return self.matmul_nC.copy_(gradient_nC)


@dataclass(slots=True)
class _Chunks:
    """How many rows a chunk has, and which memory [rows, C] it takes."""

    rows: int
    weight_CD: Tensor
    num_wide: int  # the logits, and the buffers of the kernel
    wide: torch.dtype

    @classmethod
    def sized(
        cls, weight_CD: Tensor, terms: Terms, kernel: RowKernel, rows: int | None
    ) -> "_Chunks":
        """Without `rows` as many as fit the memory that is meant for them."""
        wanted, narrow = terms.wanted, weight_CD.dtype
        num_wide = 1 + kernel.num_buffers(wanted)
        if rows is None:
            one_of_each = num_wide * wanted.dtype.itemsize
            one_of_each += narrow.itemsize if narrow != wanted.dtype else 0
            rows = _auto_rows(len(weight_CD) * one_of_each, weight_CD.device.type)
        return cls(rows, weight_CD, num_wide, wanted.dtype)

    def over(self, N: int) -> Iterator[tuple[slice, _Chunk]]:
        """The rows of each chunk, with the same memory for all of them."""
        narrow, shape = self.weight_CD.dtype, (min(N, self.rows), len(self.weight_CD))
        logits, *buffers = (
            self.weight_CD.new_empty(shape, dtype=self.wide) for _ in range(self.num_wide)
        )
        matmul = logits if narrow == self.wide else self.weight_CD.new_empty(shape)
        for first in range(0, N, self.rows):
            n = min(self.rows, N - first)
            own = [buffer[:n] for buffer in buffers]
            yield slice(first, first + n), _Chunk(logits[:n], own, matmul[:n])


def _auto_rows(row_bytes: int, device_type: str) -> int:
    if device_type == "cpu":
        few_classes = max(ENOUGH_ROWS, CPU_CACHE_BYTES // row_bytes)
        rows = min(CPU_BUFFER_BYTES // row_bytes, few_classes)
    else:
        rows = CUDA_BUFFER_BYTES // row_bytes
    return max(MIN_ROWS, rows // 64 * 64)


def _matmul_dtype(weight_VD: Tensor) -> torch.dtype:
    """The dtype F.linear would take, but for float16, too narrow for gradients as they come."""
    dtype, device_type = weight_VD.dtype, weight_VD.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    return torch.float32 if dtype == torch.float16 else dtype
