"""Rows that are windows of a text with a question before it: the layout of question answering.

Such a row has three parts, whose lengths are its `segments`: what stands before the context
(special tokens and the question), the context's tokens, and what stands behind it, where anything
does. Its positions are two, 0 and 1: the start of the answer and its end. The classes of both are
the tokens of the row, and of these only token 0 (no answer in this window) and the context may be
chosen; the others have probability 0.

R or B rows, T tokens of the longest, N positions, C classes, L tokens of the longest answer.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared.errors import CorruptCache
from shared.format import manifest as manifests

if TYPE_CHECKING:
    from shared.format.blocks import Block

PLACES = (0, 1)  # the positions of a row: start and end
NO_ANSWER = 0  # the token that says so


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
    """Of all spans of 1 to `max_tokens` tokens of the context the likeliest, the first of equal."""
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
    found = manifests.build(WindowReference, value, where)
    if not len(found.steps) == len(found.lengths) == num_tokens:
        raise CorruptCache(
            f"{where}: found the places of {len(found.steps):,} and {len(found.lengths):,} tokens, "
            f"expected {num_tokens:,}. Run cache-teacher verify CACHE --drop-bad, then run again."
        )
    return found


def bounds_of(block: "Block") -> np.ndarray:
    """As context_bounds, of the rows of a block that `check` let pass: i32 [R, 2]."""
    assert block.segments is not None  # a cache of windows has them
    assert block.num_segments is not None
    first = np.cumsum(block.num_segments) - block.num_segments
    before = block.segments[first]
    return np.stack((before, before + block.segments[first + 1]), axis=1).astype(np.int32)


def check(block: "Block", num_classes: int) -> None:
    """Whether rows are laid out as windows; that segments add up was checked before."""
    assert block.num_segments is not None  # `manifest` refuses a cache of windows without
    assert block.labels is not None
    rows = len(block.row_ids)
    parts = (block.num_segments >= 2) & (block.num_segments <= 3)
    places = np.array_equal(block.positions, np.tile(PLACES, rows))
    if not (parts.all() and places and (block.num_positions == len(PLACES)).all()):
        raise _no_windows("two or three parts, and the positions 0 and 1")
    if block.num_tokens.max(initial=0) > num_classes:
        raise _no_windows(f"at most {num_classes} tokens")
    first, behind = np.repeat(bounds_of(block), len(PLACES), axis=0).T
    inside = (block.labels >= first) & (block.labels < behind)
    if not (inside | (block.labels == NO_ANSWER)).all():
        raise _no_windows("labels that are tokens of the context, or 0")


def _no_windows(expected: str) -> CorruptCache:
    return CorruptCache(
        f"segments, positions, labels: expected of each row {expected}. "
        "Run cache-teacher verify CACHE --drop-bad, then run again."
    )
