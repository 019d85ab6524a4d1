"""Answers in windows of a text: which tokens may be chosen, the likeliest span, its text.

What a window is and where its positions are is `shared/format/layouts.py`'s matter.

R or B rows, T tokens of the longest, N positions, C classes, L tokens of the longest answer.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import CorruptCache
from shared.format.layouts import NO_ANSWER
from shared.strict import build


def context_bounds(segments_RS: Tensor) -> Tensor:
    """First token of each row's context, and the token behind its last: int64 [R, 2]."""
    return segments_RS[:, :2].cumsum(dim=1)


def window_logits(
    start_BT: Tensor, end_BT: Tensor, context_B2: Tensor, index_N: Tensor, num_classes: int
) -> Tensor:
    """Logits over the classes at flat positions in B * T: [N, C], -inf where none may be chosen."""
    T = start_BT.shape[1]
    row_N, place_N = index_N // T, index_N % T
    logits_NT = torch.stack((start_BT, end_BT), dim=1)[row_N, place_N]
    token_T = torch.arange(T, device=start_BT.device)
    inside_BT = (token_T >= context_B2[:, :1]) & (token_T < context_B2[:, 1:])
    allowed_BT = inside_BT | (token_T == NO_ANSWER)
    logits_NT = logits_NT.masked_fill(~allowed_BT[row_N], -torch.inf)
    return F.pad(logits_NT, (0, num_classes - T), value=-torch.inf)


@dataclass(frozen=True, slots=True)
class Spans:
    """The likeliest answer in each of B windows, and how likely it is that there is none."""

    first_B: Tensor  # int64, tokens of the context
    last_B: Tensor
    score_B: Tensor  # ln p(start) + ln p(end); -inf: no span has any probability
    null_B: Tensor  # the same of token 0


def best_spans(logp_B2T: Tensor, context_B2: Tensor, max_tokens: int) -> Spans:
    """The likeliest span of 1 to `max_tokens` tokens of the context, the first of equal ones."""
    T = logp_B2T.shape[2]
    token_T = torch.arange(T, device=logp_B2T.device)
    inside_BT = (token_T >= context_B2[:, :1]) & (token_T < context_B2[:, 1:])
    start_BT, end_BT = logp_B2T.masked_fill(~inside_BT[:, None], -torch.inf).unbind(dim=1)
    ends_BTL = F.pad(end_BT, (0, max_tokens - 1), value=-torch.inf).unfold(1, max_tokens, 1)
    end_BT, further_BT = ends_BTL.max(dim=2)
    score_B, first_B = (start_BT + end_BT).max(dim=1)
    last_B = first_B + further_BT.gather(1, first_B[:, None])[:, 0]
    before_B = context_B2[:, 0]
    null_B = logp_B2T[:, :, NO_ANSWER].sum(dim=1)
    return Spans(first_B - before_B, last_B - before_B, score_B, null_B)


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowReference:
    """What an answer in a window is read from and compared with; the `reference` of its row.

    `answers` are those to the question, wherever they stand: none where it has no answer. `text` is
    the window's part of the context. Token t of the context begins sum(steps[: t + 1]) characters
    into it and has `lengths[t]` of them.
    """

    answers: tuple[str, ...]
    text: str
    steps: tuple[int, ...]
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, text: str, offsets: "np.ndarray", answers: tuple[str, ...]) -> "WindowReference":
        """`text` is the whole context, `offsets` [tokens, 2] the characters of the window's."""
        first, last = int(offsets[0, 0]), int(offsets[:, 1].max())
        return cls(
            answers=answers,
            text=text[first:last],
            steps=tuple(np.diff(offsets[:, 0], prepend=first).tolist()),
            lengths=tuple((offsets[:, 1] - offsets[:, 0]).tolist()),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def between(self, first: int, last: int) -> str:
        """The text of the tokens `first` to `last` of the context."""
        start = sum(self.steps[: first + 1])
        end = sum(self.steps[: last + 1]) + self.lengths[last]
        return self.text[start:end].strip()


def reference_of(value: Any, num_tokens: int, where: str) -> WindowReference:
    """A reference from parsed JSON, of a window whose context has so many tokens."""
    found = build(WindowReference, value, where)
    if not len(found.steps) == len(found.lengths) == num_tokens:
        raise CorruptCache(
            f"{where}: found the places of {len(found.steps):,} and {len(found.lengths):,} tokens, "
            f"expected {num_tokens:,}. Run cache-teacher verify CACHE --drop-bad, then run again."
        )
    return found
