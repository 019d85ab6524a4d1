"""Rows against tokenizing and slicing one document at a time; packed rows against unpacked ones."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from shared.errors import CorpusError
from shared.format.manifest import Preprocessing
from teacher_cache.tasks.causal import build
from teacher_cache.tasks.rows import TrainingRow

EOS, BOS = 0, 1
WORDS = 40
VOCABULARY = {"<end>": EOS, "<begin>": BOS} | {f"w{i}": i + 2 for i in range(WORDS)}


def word_tokenizer(*, adds_bos: bool = False, **special: str) -> PreTrainedTokenizerBase:
    """One token a word, so that a test can count; ids of the words are 2 and up."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<begin> $A", special_tokens=[("<begin>", BOS)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return word_tokenizer(eos_token="<end>", bos_token="<begin>")


def text_of(length: int, first: int = 0) -> str:
    return " ".join(f"w{(first + i) % WORDS}" for i in range(length))


def rows_of(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int = 8,
    pack: bool = False,
    counters: Counter[str] | None = None,
) -> list[TrainingRow]:
    preprocessing = Preprocessing(
        split="train",
        columns=(),
        sample_by="line",
        encoding_errors="strict",
        limit_documents=0,
        max_length=max_length,
        pack=pack,
    )
    counters = Counter() if counters is None else counters
    return list(build(enumerate(texts), tokenizer, preprocessing, counters))


def test_a_document_is_its_tokens_and_an_eos_that_is_predicted(tokenizer):
    (row,) = rows_of(["w3 w1 w2"], tokenizer)
    assert row.input_ids.tolist() == [5, 3, 4, EOS]
    assert row.input_ids.dtype == np.int32
    assert row.num_positions == 3  # the last one, after w2, predicts the EOS


@pytest.mark.parametrize(
    ("adds_bos", "special", "expected"),
    [
        (False, {"eos_token": "<end>"}, [2, EOS]),
        (False, {"eos_token": "<end>", "bos_token": "<begin>"}, [2, EOS]),
        (True, {"eos_token": "<end>", "bos_token": "<begin>"}, [BOS, 2, EOS]),
        (False, {"sep_token": "<end>"}, [2, EOS]),
    ],
    ids=["no BOS", "BOS not added", "BOS added", "SEP for EOS"],
)
def test_bos_only_where_the_tokenizer_adds_one(adds_bos, special, expected):
    (row,) = rows_of(["w0"], word_tokenizer(adds_bos=adds_bos, **special))
    assert row.input_ids.tolist() == expected


def test_a_tokenizer_without_an_end_is_refused_with_the_way_out():
    with pytest.raises(CorpusError, match=r"neither an EOS nor a SEP token.*Set eos_token in"):
        rows_of(["w0"], word_tokenizer())


@pytest.mark.parametrize("length", range(1, 26))
def test_chunks_are_slices_and_have_one_position_less_than_tokens(tokenizer, length):
    counters: Counter[str] = Counter()
    rows = rows_of([text_of(length)], tokenizer, max_length=8, counters=counters)
    ids = [*tokenizer(text_of(length))["input_ids"], EOS]
    slices = [ids[start : start + 8] for start in range(0, len(ids), 8)]
    assert [row.input_ids.tolist() for row in rows] == [part for part in slices if len(part) > 1]
    assert sum(row.num_positions for row in rows) == len(ids) - len(slices)
    assert [row.segments for row in rows] == [(len(row.input_ids),) for row in rows]
    assert counters == Counter(
        documents=1, cut_documents=len(ids) > 8, lone_tokens=len(slices[-1]) == 1
    )


def test_a_chunk_begins_without_a_second_bos():
    tokenizer = word_tokenizer(adds_bos=True, eos_token="<end>", bos_token="<begin>")
    rows = rows_of([text_of(10)], tokenizer, max_length=6)
    assert [row.input_ids.tolist() for row in rows] == [
        [BOS, 2, 3, 4, 5, 6],
        [7, 8, 9, 10, 11, EOS],
    ]


def test_empty_documents_are_counted_and_give_no_row(tokenizer):
    counters: Counter[str] = Counter()
    rows = rows_of(["", "w0", "  \t "], tokenizer, counters=counters)
    assert [row.row_id >> 24 for row in rows] == [1]
    assert (counters["documents"], counters["empty_documents"]) == (3, 2)


def test_row_ids_name_document_and_chunk(tokenizer):
    rows = rows_of([text_of(20), "", text_of(3)], tokenizer, max_length=8)
    assert [row.row_id for row in rows] == [0, 1, 2, 2 << 24]


def test_many_documents_are_rows_in_the_order_of_the_corpus(tokenizer):
    texts = [text_of(1 + i % 5, first=i) for i in range(600)]  # tokenized 256 at a time
    alone = [rows_of([text], tokenizer)[0].input_ids.tolist() for text in texts]
    assert [row.input_ids.tolist() for row in rows_of(texts, tokenizer)] == alone


def test_a_real_tokenizer_gives_back_the_text(tokenizer_dir: Path, corpus_file: Path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    texts = corpus_file.read_text().splitlines()[:20]
    rows = rows_of(texts, tokenizer, max_length=4096)
    decoded = [tokenizer.decode(row.input_ids) for row in rows]
    assert decoded == [text + "<|end|>" for text in texts if text]


def random_texts(seed: int, count: int, longest: int) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, longest, (count,), generator=generator).tolist()
    return [text_of(length, first=7 * i) for i, length in enumerate(lengths)]


def segments_of(row: TrainingRow) -> list[tuple[int, ...]]:
    ends = np.cumsum(row.segments)
    return [tuple(part.tolist()) for part in np.split(row.input_ids, ends[:-1])]


@pytest.mark.parametrize(("count", "longest"), [(0, 1), (1, 5), (300, 6), (300, 40), (100, 90)])
def test_packing_keeps_every_chunk_exactly_once(tokenizer, count, longest):
    texts = random_texts(count, count, longest)
    alone = rows_of(texts, tokenizer, max_length=32)
    packed = rows_of(texts, tokenizer, max_length=32, pack=True)
    parts = Counter(part for row in packed for part in segments_of(row))
    assert parts == Counter(tuple(row.input_ids.tolist()) for row in alone)
    assert all(sum(row.segments) == len(row.input_ids) <= 32 for row in packed)
    assert sum(r.num_positions for r in packed) == sum(r.num_positions for r in alone)


def test_packing_counts_as_the_unpacked_rows_do(tokenizer):
    counts = []
    for pack in (False, True):
        counters: Counter[str] = Counter()
        rows_of(random_texts(1, 200, 70), tokenizer, pack=pack, counters=counters)
        counts.append(counters)
    assert counts[0] == counts[1]
    assert counts[0]["lone_tokens"] > 0


def test_a_packed_row_is_named_after_its_first_segment_and_no_name_repeats(tokenizer):
    texts = random_texts(2, 300, 40)
    alone = {row.row_id: tuple(row.input_ids) for row in rows_of(texts, tokenizer, max_length=32)}
    packed = rows_of(texts, tokenizer, max_length=32, pack=True)
    assert all(alone[row.row_id] == segments_of(row)[0] for row in packed)
    assert len({row.row_id for row in packed}) == len(packed)


def test_packing_is_deterministic(tokenizer):
    texts = random_texts(3, 300, 20)
    first, second = (rows_of(texts, tokenizer, max_length=32, pack=True) for _ in range(2))
    assert [(r.row_id, r.segments) for r in first] == [(r.row_id, r.segments) for r in second]


def next_fit(lengths: Sequence[int], max_length: int) -> int:
    rows, used = 0, max_length
    for length in lengths:
        if used + length > max_length:
            rows, used = rows + 1, 0
        used += length
    return rows


@pytest.mark.parametrize("longest", [6, 20, 31])
def test_packing_needs_no_more_rows_than_filling_one_after_another(tokenizer, longest):
    texts = random_texts(longest, 400, longest)
    lengths = [len(row.input_ids) for row in rows_of(texts, tokenizer, max_length=32)]
    packed = rows_of(texts, tokenizer, max_length=32, pack=True)
    assert len(packed) <= next_fit(lengths, 32)
    # best fit over 32 open rows: every such mix that was tried fills rows to 93 % and more
    assert sum(lengths) >= 0.9 * 32 * len(packed)
