"""The table of implementations of the row losses, and which of them is used."""

import torch

from student_train.loss.kernels.base import RowKernel
from student_train.loss.kernels.torch_rows import TorchRows
from student_train.loss.spec import LossSpec

# The first that fits is used; the one that fits everything stands last.
KERNELS: dict[str, RowKernel] = {
    "torch": TorchRows(),
}


def choose(device: torch.device, dtype: torch.dtype, spec: LossSpec) -> RowKernel:
    """The implementation for logits of this dtype on this device."""
    return next(kernel for kernel in KERNELS.values() if kernel.fits(device, dtype, spec))
