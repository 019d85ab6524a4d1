"""How the logits of a student become those at the positions: one object for each form of output.

A task names the form of its students (tasks/). A student with a plain linear head over a vocabulary
is never asked for its logits: its loss is computed from the states in front of the head.

Shapes: B rows, T tokens, N positions, V logit width, C classes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shared.windows import window_logits


@dataclass(frozen=True, slots=True)
class Micro:
    """What is known of a micro-batch besides the student's output.

    `position_index` [N] counts what the positions are of: tokens of all rows [B, T], or outputs.
    """

    targets: Mapping[str, Tensor]
    num_tokens: int  # T, of rows with logits of their own
    num_classes: int

    @property
    def position_index(self) -> Tensor:
        return self.targets["position_index"]


@dataclass(frozen=True, slots=True)
class Outputs:
    """One form of output. `logits_at` gives the logits at the positions [N, V].

    It is None where the student has no head, and its hidden states are all that is learnt. Where
    `are_numbers`, the logits [N, 1] are the answer itself, and its loss is the squared error.
    """

    logits_at: Callable[[Any, Micro], Tensor] | None
    are_numbers: bool = False

    @property
    def states_alone(self) -> bool:
        return self.logits_at is None


def _of_tokens(output: Any, micro: Micro) -> Tensor:
    logits: Tensor = output.logits
    return logits.flatten(0, 1).index_select(0, micro.position_index)


def _of_rows(output: Any, micro: Micro) -> Tensor:
    """From logits [B, V]: a position has those of the row it is in."""
    logits: Tensor = output.logits
    return logits.index_select(0, micro.position_index // micro.num_tokens)


def _of_windows(output: Any, micro: Micro) -> Tensor:
    both, context_B2 = (output.start_logits, output.end_logits), micro.targets["context"]
    return window_logits(*both, context_B2, micro.position_index, micro.num_classes)


def _yes_or_no(output: Any, micro: Micro) -> Tensor:
    """From logits [B, L]: a sigmoid of z is the softmax of (0, z)."""
    yes_N1 = _numbers(output, micro)
    return torch.cat([torch.zeros_like(yes_N1), yes_N1], dim=1)


def _numbers(output: Any, micro: Micro) -> Tensor:
    """From logits [B, L], each of which is a position of its own."""
    logits: Tensor = output.logits
    return logits.reshape(-1, 1).index_select(0, micro.position_index)


OF_TOKENS = Outputs(_of_tokens)
OF_ROWS = Outputs(_of_rows)
OF_WINDOWS = Outputs(_of_windows)
YES_OR_NO = Outputs(_yes_or_no)
NUMBERS = Outputs(_numbers, are_numbers=True)
STATES = Outputs(None)
