"""Texts to rows with masked tokens, as masked language models are trained on (Devlin et al. 2019).

A text is cut into chunks that stand between the tokenizer's special tokens, and each chunk becomes
`mask_copies` rows that differ in what is masked: chunk c as copy k is row c * copies + k of its
document. Which tokens these are, and what stands in their place, are functions of seed, row id and
place alone.

T tokens of a row, n tokens that may be masked, P that are.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from shared.arrays import mixed_bits
from shared.errors import Refused
from shared.format.manifest import Manifest, Preprocessing
from shared.format.schema import ROW_CHUNK_BITS
from shared.rows import Row
from teacher_cache.tasks.base import RowContext, TeacherTask, around
from teacher_cache.tasks.rows import TrainingRow, special_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from teacher_cache.config import CaptureConfig

_TOKENIZE_AT_ONCE = 256  # documents
# Of the chosen tokens 80 % are replaced by the mask, 10 % by any token, 10 % stay what they are.
_MASKED_BELOW, _RANDOM_BELOW = 0.8, 0.9
# What bits are drawn for. Those of a sample of targets are drawn without such a number.
_CHOICE, _FATE, _TOKEN = 1, 2, 3


@dataclass(frozen=True, slots=True)
class Masking:
    """What masking depends on: tokens of the tokenizer, and the options."""

    mask_id: int
    special: np.ndarray  # i64, ids that are never masked
    ordinary: np.ndarray  # i64, all others, which a token may be replaced by
    share: float
    seed: int

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", preprocessing: Preprocessing) -> "Masking":
        """Refuses a tokenizer that has nothing to mask with."""
        if tokenizer.mask_token_id is None:
            raise Refused(
                f"{tokenizer.name_or_path}: this tokenizer has no mask token, which --task "
                "masked-lm needs. Name the teacher's own --tokenizer, or set mask_token in its "
                "tokenizer_config.json."
            )
        special = np.unique(np.array(tokenizer.all_special_ids, np.int64))
        known = np.array(sorted(tokenizer.get_vocab().values()), np.int64)
        return cls(
            mask_id=int(tokenizer.mask_token_id),
            special=special,
            ordinary=np.setdiff1d(known, special),
            share=preprocessing.mask_share,
            seed=preprocessing.mask_seed,
        )

    def apply(self, ids_T: np.ndarray, row_id: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens with some of them masked, i32 [T], and the places of those, ascending [P].

        A rounded share of those that are no special tokens, and at least one; no place where all
        are special.
        """
        open_n = np.flatnonzero(~np.isin(ids_T, self.special))
        if not len(open_n):
            return ids_T, open_n
        count = max(1, int(self.share * len(open_n) + 0.5))
        order_n = np.argsort(self._bits(row_id, open_n, _CHOICE), kind="stable")
        chosen_P = np.sort(open_n[order_n[:count]])
        fate_P = (self._bits(row_id, chosen_P, _FATE) >> np.uint64(11)) * 2.0**-53
        drawn_P = self._bits(row_id, chosen_P, _TOKEN) % np.uint64(len(self.ordinary))
        random_P = self.ordinary[drawn_P.astype(np.int64)]
        replaced_P = np.where(fate_P < _RANDOM_BELOW, random_P, ids_T[chosen_P])
        masked_T = ids_T.copy()
        masked_T[chosen_P] = np.where(fate_P < _MASKED_BELOW, self.mask_id, replaced_P)
        return masked_T, chosen_P

    def _bits(self, row_id: int, places: np.ndarray, purpose: int) -> np.ndarray:
        return mixed_bits(self.seed, row_id, places, purpose)


class MaskedTask(TeacherTask):
    """Tokens that are hidden behind a mask are predicted from both sides."""

    head = "masked-token"
    fills_rows = True

    def build_rows(
        self, documents: Iterable[tuple[int, Any]], context: RowContext, counters: Counter[str]
    ) -> Iterator[TrainingRow]:
        return build(documents, context.tokenizer, context.preprocessing, counters)

    def preprocessing(self, config: "CaptureConfig") -> dict[str, Any]:
        return {
            "mask_copies": config.mask_copies,
            "mask_share": config.mask_share,
            "mask_seed": config.seed,
        }

    def options_like(self, old: Manifest) -> dict[str, Any]:
        if old.task != self.name:
            return {}
        options = old.preprocessing
        return {"mask_copies": options.mask_copies, "mask_share": options.mask_share}

    def shown_around(
        self, row: Row, position: int, tokenizer: "PreTrainedTokenizerBase"
    ) -> dict[str, str]:
        return {"around": around(row, position, tokenizer)}


def build(
    documents: Iterable[tuple[int, str]],
    tokenizer: "PreTrainedTokenizerBase",
    preprocessing: Preprocessing,
    counters: Counter[str],
) -> Iterator[TrainingRow]:
    """Rows of the given (index, text) pairs, in order; what is left out is counted."""
    masking, copies = Masking.of(tokenizer, preprocessing), preprocessing.mask_copies
    for index, chunk, ids_T in chunks(documents, tokenizer, preprocessing.max_length, counters):
        for copy in range(copies):
            row_id = index << ROW_CHUNK_BITS | (chunk * copies + copy)
            masked_T, places_P = masking.apply(ids_T, row_id)
            if not len(places_P):
                counters["rows_without_targets"] += 1
                continue
            yield TrainingRow(
                row_id=row_id,
                input_ids=masked_T,
                segments=(len(masked_T),),
                supervised=places_P.astype(np.int32),
                labels=ids_T[places_P],
            )


def chunks(
    documents: Iterable[tuple[int, str]],
    tokenizer: "PreTrainedTokenizerBase",
    max_length: int,
    counters: Counter[str],
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Document, number of the chunk and its tokens i32 [T], each chunk between special tokens."""
    before, after = special_ends(tokenizer)
    room = max_length - len(before) - len(after)
    if room < 1:
        raise Refused(
            f"--max-length {max_length}: the tokenizer puts {len(before) + len(after)} special "
            "tokens into each row, so no other would fit"
        )
    iterator = iter(documents)
    while some := list(islice(iterator, _TOKENIZE_AT_ONCE)):
        texts = [text for _, text in some]
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        for (index, _), tokens in zip(some, encoded, strict=True):
            counters["documents"] += 1
            counters["empty_documents"] += not tokens
            counters["cut_documents"] += len(tokens) > room
            for chunk, start in enumerate(range(0, len(tokens), room)):
                part = [*before, *tokens[start : start + room], *after]
                yield index, chunk, np.array(part, np.int32)
