"""The row that stage one builds, and what the rows of several tasks are put between.

T tokens of a row, P positions with a target.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.errors import CorpusError
from shared.models.tokenizer import end_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LABEL = -1


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """One training example: `input_ids` i32 [T]; `segments` are the lengths of its parts.

    `supervised` i32 [P] are the positions with a target, where they are not all but the last of
    each segment; `labels` i32 [P] their classes, where these are not the next tokens. `reference`
    is what an answer is compared with, where a task has more to compare than labels: any JSON.
    With `of_outputs` position p is output p of the row as a whole, and no token; labels may be
    numbers, f32 [P].
    """

    row_id: int
    input_ids: np.ndarray
    segments: tuple[int, ...]
    supervised: np.ndarray | None = None
    labels: np.ndarray | None = None
    token_type_ids: np.ndarray | None = None
    reference: Any = None
    of_outputs: bool = False

    @property
    def num_positions(self) -> int:
        if self.supervised is not None:
            return len(self.supervised)
        return len(self.input_ids) - len(self.segments)

    def positions(self) -> np.ndarray:
        """Every position with a target, as an index of the row."""
        if self.supervised is not None:
            return self.supervised
        return np.delete(np.arange(len(self.input_ids)), np.cumsum(self.segments) - 1)


@dataclass(frozen=True, slots=True)
class Ends:
    """The tokens a document is put between: BOS only where the tokenizer itself adds one."""

    bos: tuple[int, ...]
    eos: tuple[int, ...]


def document_ends(tokenizer: "PreTrainedTokenizerBase") -> Ends:
    """BOS and EOS of a tokenizer; one without any end-of-text token is refused."""
    eos = end_of_text(tokenizer)
    if eos is None:
        raise CorpusError(
            f"{tokenizer.name_or_path}: this tokenizer has neither an EOS nor a SEP token, so no "
            "document can end. Set eos_token in its tokenizer_config.json."
        )
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return Ends((bos,) if adds_bos else (), (eos,))


def special_ends(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """The special tokens that a tokenizer puts before and behind a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    raise CorpusError(f"{tokenizer.name_or_path}: where it puts special tokens cannot be told")
