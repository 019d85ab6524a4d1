"""Hidden states at the positions, kept by hooks while a model runs.

They are named by layer: n is what block n hands on (counted from 0), -1 the final state after the
last norm, which is what the head reads. So the last block's own output, before the norm, is layer
`num_layers - 1`, not -1.

B rows, T tokens, N positions (flat in B * T), D channels.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from shared.models.pooling import pooled
from shared.tasks import Pooling
from teacher_cache.engines.streamed_head import last_state
from teacher_cache.tasks.inputs import TeacherBatch

FINAL = -1  # the layer after the last norm


@contextmanager
def keeping(
    module: nn.Module, layer: int, batch: TeacherBatch, pooling: Pooling, into: dict[int, Tensor]
) -> Iterator[None]:
    """Keeps a layer's states at the positions, and not the [B, T, D] they are cut from."""
    index_N = batch.position_index

    def hook(_: nn.Module, __: Any, output: Any) -> None:
        state_BTD = last_state(output) if layer == FINAL else _block_state(output)
        if pooling == "none":
            into[layer] = state_BTD.flatten(0, 1)[index_N.to(state_BTD.device)]
        else:
            assert batch.attention_mask is not None  # rows are not packed
            mask_BT = batch.attention_mask.to(state_BTD.device)
            into[layer] = pooled(state_BTD, mask_BT, pooling)

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _block_state(output: Any) -> Tensor:
    """Blocks hand on their state alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def find_blocks(trunk: nn.Module) -> nn.ModuleList:
    """The outermost list of modules, and of several the longest (experts are deeper inside)."""
    lists = [
        (name.count("."), -len(module), module)
        for name, module in trunk.named_modules()
        if isinstance(module, nn.ModuleList)
    ]
    return min(lists, key=lambda entry: entry[:2], default=(0, 0, nn.ModuleList()))[2]
