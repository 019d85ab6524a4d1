"""The row loss of a chunk of logits, as a protocol: what an implementation gets, and what it gives.

A kernel with code for some device implements `RowKernel` in a file of its own and gets a line in
table.py; tests/student_train/loss/test_kernels.py then holds it against full distributions.

Shapes: n positions of a chunk, C classes, K entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from student_train.loss.spec import LossSpec


@dataclass(frozen=True, slots=True)
class Wanted:
    """What is computed, the same for all positions of a batch.

    The loss is `soft_scale` times the soft losses plus `hard_scale` times the hard ones.
    """

    spec: LossSpec
    dtype: torch.dtype  # of logits and row losses: float32, or float64 where the head is
    soft_scale: float | Tensor
    hard_scale: float | Tensor
    with_entropy: bool  # the student's, at T = 1 over all classes
    with_labels: bool
    softcap: float | None = None  # the logits are `softcap * tanh(logits / softcap)`

    @property
    def apart(self) -> bool:
        """Whether T is not 1, while the hard loss or the entropy need a softmax at T = 1."""
        return self.spec.temperature != 1 and (self.with_labels or self.with_entropy)


@dataclass(frozen=True, slots=True)
class RowTerms:
    """What the positions of a chunk are compared with: temperature and tail are applied already.

    An id may be repeated: its entries are to be added up. A log-probability of -inf is no entry,
    and what its id is says nothing. `sampled`: the entries are ln of the weights of a sample.
    """

    ids_nK: Tensor  # int64
    logprobs_nK: Tensor  # the teacher's
    log_tail_n: Tensor  # of all classes that are no entry, together
    top_ids_n1: Tensor  # int64, the teacher's most probable class; negative: none
    labels_n1: Tensor  # int64; negative: none
    sampled: bool


@dataclass(frozen=True, slots=True)
class RowSums:
    """Sums over the positions of a chunk, and where the gradient of its loss stands."""

    soft: Tensor
    hard: Tensor
    agreement: Tensor  # positions where no class beats the teacher's most probable one
    entropy: Tensor  # of the student, nats; 0 unless it is wanted
    gradient_nC: Tensor  # of the logits before the cap: `logits_nC`, or one of the buffers


class RowKernel(Protocol):
    """One implementation of the row losses. It keeps nothing between two calls."""

    def fits(self, device: torch.device, dtype: torch.dtype, spec: LossSpec) -> bool:
        """Whether it can compute this loss of logits of this dtype on this device."""

    def num_buffers(self, wanted: Wanted) -> int:
        """How many buffers it works in, each like the logits of a chunk."""

    def run(
        self,
        logits_nC: Tensor,
        buffers: Sequence[Tensor],
        terms: RowTerms,
        wanted: Wanted,
        *,
        gradient: bool,
    ) -> RowSums:
        """The sums over a chunk; without `gradient` what stands in `gradient_nC` says nothing.

        logits_nC are those before the cap, in the dtype that is wanted. They and the buffers, whose
        contents say nothing, are free to be overwritten. Autograd is off: nothing returned here
        may be differentiated.
        """
