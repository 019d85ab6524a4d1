"""Which errors say that a device has no memory left."""

import torch

# What torch says in a plain RuntimeError: on a CPU, and where cuBLAS finds no room for itself.
_SAID = ("DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether less work at once may succeed."""
    return isinstance(error, torch.OutOfMemoryError) or any(said in str(error) for said in _SAID)
