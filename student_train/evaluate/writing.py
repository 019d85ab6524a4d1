"""What a student writes for the sources of held-out rows, and how near it is to the references.

B rows of a batch, S tokens of the longest source.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch

from shared.cache import Cache
from shared.errors import CacheMismatch
from shared.models.decoding import caches_all_blocks
from shared.models.tokenizer import end_of_text, load_cached_tokenizer
from shared.rows import references
from student_train.metrics.texts import chrf, sentence_chrf, text_numbers
from student_train.tasks.table import STUDENT_TASKS, task_of

_SHOWN = 3  # best and worst texts that are kept
_SHOWN_LETTERS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Writing:
    """How many rows to write for, spread over the cache, and how."""

    rows: int
    num_beams: int = 1
    max_new_tokens: int = 128
    batch_tokens: int = 8192


@dataclass(frozen=True, slots=True)
class HeldOutSource:
    """A held-out row: what the encoder reads, i64 [S], and what an answer is compared with.

    `target_ids` are what the row has as its answer, behind the decoder's start.
    """

    row_id: int
    input_ids: np.ndarray
    target_ids: np.ndarray
    references: tuple[str, ...]


def check_writes(cache: Cache) -> None:
    """Refuses a cache whose rows have no source of their own."""
    if not task_of(cache.manifest).writes_text:
        known = ", ".join(name for name, task in STUDENT_TASKS.items() if task.writes_text)
        raise CacheMismatch(
            f"{cache.path}: is of {cache.manifest.task}, where a student writes no text to be "
            f"scored: that is there for {known}. Leave generation out."
        )


def written_numbers(student: Any, cache: Cache, writing: Writing) -> dict[str, Any]:
    """The metrics of texts.py, and the texts that are best and worst by chrF.

    `teacher_chrf` where the teacher wrote the targets of the rows itself.
    """
    check_writes(cache)
    sources = [source for source in sources_of(cache, writing.rows) if source.references]
    if not sources:
        raise CacheMismatch(f"{cache.path}: none of its rows has a reference to compare with")
    texts = write(student, cache, sources, writing)
    of_rows = [source.references for source in sources]
    numbers = text_numbers(texts, of_rows) | {"written_rows": len(texts)}
    if cache.manifest.preprocessing.generation is not None:
        tokenizer = load_cached_tokenizer(cache.storage)
        of_teacher = [text_of(source.target_ids.tolist(), tokenizer) for source in sources]
        numbers["teacher_chrf"] = chrf(of_teacher, of_rows)
    return numbers | {"texts": _shown(cache, sources, texts)}


def sources_of(cache: Cache, count: int) -> list[HeldOutSource]:
    """Rows spread over the cache, always the same ones."""
    chosen = np.unique(np.linspace(0, cache.num_rows - 1, count).astype(np.int64))
    starts = np.concatenate([[0], np.cumsum(cache.block_rows)])
    blocks = np.searchsorted(starts, chosen, "right") - 1
    found = []
    for number, some in groupby(zip(blocks.tolist(), chosen.tolist(), strict=True), lambda p: p[0]):
        block = cache.read_block(number, targets=False)
        assert block.segments is not None  # a pair has two
        begins = np.cumsum(block.num_tokens) - block.num_tokens
        texts, sizes = references(block), block.segments[::2]
        for row in (row - int(starts[number]) for _, row in some):
            ids = block.input_ids[begins[row] : begins[row] + block.num_tokens[row]]
            source, target = np.split(ids.astype(np.int64), [sizes[row]])
            found.append(
                HeldOutSource(int(block.row_ids[row]), source, target[1:], tuple(texts[row]))
            )
    return found


def write(
    student: Any, cache: Cache, sources: Sequence[HeldOutSource], writing: Writing
) -> list[str]:
    """A text for each source, in their order."""
    tokenizer = load_cached_tokenizer(cache.storage)
    end, pad = end_of_text(tokenizer), tokenizer.pad_token_id
    places = getattr(student.config.get_text_config(), "max_position_embeddings", None)
    # The start token takes a place too.
    longest = writing.max_new_tokens if places is None else min(writing.max_new_tokens, places - 1)
    training, device = student.training, next(student.parameters()).device
    student.eval()
    texts = [""] * len(sources)
    try:
        for chosen in _batches(sources, writing.batch_tokens // writing.num_beams, longest):
            ids_BS, mask_BS = _padded([sources[index].input_ids for index in chosen])
            with torch.no_grad():
                written = student.generate(
                    input_ids=ids_BS.to(device),
                    attention_mask=mask_BS.to(device),
                    num_beams=writing.num_beams,
                    max_new_tokens=longest,
                    do_sample=False,
                    use_cache=caches_all_blocks(student.config),
                    decoder_start_token_id=cache.manifest.preprocessing.decoder_start,
                    eos_token_id=end,
                    pad_token_id=end if pad is None else pad,
                )
            for index, tokens in zip(chosen, written[:, 1:].tolist(), strict=True):
                texts[index] = text_of(tokens, tokenizer)
    finally:
        student.train(training)
    return texts


def text_of(tokens: Sequence[int], tokenizer: Any) -> str:
    """The text up to the first end token."""
    tokens, end = list(tokens), end_of_text(tokenizer)
    if end in tokens:
        tokens = tokens[: tokens.index(end)]
    return str(tokenizer.decode(tokens, skip_special_tokens=True)).strip()


def _batches(
    sources: Sequence[HeldOutSource], batch_tokens: int, longest: int
) -> Iterator[list[int]]:
    """Indices of sources of similar length, longest first."""
    order = sorted(range(len(sources)), key=lambda index: (-len(sources[index].input_ids), index))
    while order:
        count = max(1, batch_tokens // (len(sources[order[0]].input_ids) + longest))
        yield order[:count]
        order = order[count:]


def _padded(sequences: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    lengths_B = torch.tensor([len(sequence) for sequence in sequences])
    ids_BS = torch.zeros(len(sequences), int(lengths_B.max()), dtype=torch.int64)
    for line, sequence in enumerate(sequences):
        ids_BS[line, : len(sequence)] = torch.from_numpy(sequence)
    return ids_BS, (torch.arange(ids_BS.shape[1]) < lengths_B[:, None]).long()


def _shown(
    cache: Cache, sources: Sequence[HeldOutSource], texts: Sequence[str]
) -> list[dict[str, Any]]:
    """The best and the worst texts by their own chrF."""
    tokenizer = load_cached_tokenizer(cache.storage)
    scores = [
        sentence_chrf(text, source.references) for text, source in zip(texts, sources, strict=True)
    ]
    order = sorted(range(len(texts)), key=lambda index: (-scores[index], index))
    chosen = dict.fromkeys([*order[:_SHOWN], *order[-_SHOWN:]])
    return [
        {
            "row_id": sources[index].row_id,
            "chrf": round(scores[index], 2),
            "source": text_of_source(sources[index], tokenizer),
            "text": texts[index][:_SHOWN_LETTERS],
            "reference": sources[index].references[0][:_SHOWN_LETTERS],
        }
        for index in chosen
    ]


def text_of_source(source: HeldOutSource, tokenizer: Any) -> str:
    """The source as text, cut to what a reader wants to see."""
    text = str(tokenizer.decode(source.input_ids.tolist(), skip_special_tokens=True))
    return text[:_SHOWN_LETTERS]
