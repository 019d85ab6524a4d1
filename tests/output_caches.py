"""Rows with several labels or with numbers: a tokenizer, random teachers, corpora, and captures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from shared.cache import Cache, open_cache
from teacher_cache.config import CaptureConfig
from teacher_cache.job.run import run
from tests.conftest import WORDS

TOPICS = ("cash", "card", "fee", "wait", "lost", "rate", "fraud", "top up")
SCORES = ("warmth", "length")
HF = {"multi_label": "multi_label_classification", "regression": "regression"}
NAMES = {"multi_label": TOPICS, "regression": SCORES[:1]}
DOCUMENTS = 60


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One id for each of the words, with [CLS], [SEP], and two markers of relations."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {word: index for index, word in enumerate([*special, *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    fast.add_special_tokens({"additional_special_tokens": ["[E1]", "[E2]"]})
    return fast


def bert(names: tuple[str, ...], **changes: Any) -> BertConfig:
    options: dict[str, Any] = {
        "vocab_size": len(make_tokenizer()),
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.5,
        "id2label": dict(enumerate(names)),
    }
    return BertConfig(**options | changes)


def save_teacher(folder: Path, names: tuple[str, ...], **changes: Any) -> str:
    """A random teacher with its tokenizer."""
    torch.manual_seed(0)
    BertForSequenceClassification(bert(names, **changes)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def write_corpus(file: Path, problem: str, *, pairs: bool = False, seed: int = 0) -> list[Any]:
    """Texts of 1 to 12 words, so that some rows have fewer tokens than labels; one unlabelled."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for index in range(DOCUMENTS):
        picks = rng.integers(0, len(WORDS), 1 + index % 12)
        row: dict[str, Any] = {"text": " ".join(WORDS[pick] for pick in picks)}
        if pairs:
            row["text_pair"] = WORDS[picks[0]]
        if problem == "multi_label":
            row["labels"] = [name for i, name in enumerate(TOPICS) if (picks % 8 == i).any()]
        else:
            row["score"] = float(picks.mean()) / 7
        rows.append(row)
    rows[7]["labels" if problem == "multi_label" else "score"] = None
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return rows


def capture(out: Path, corpus: Path, **options: Any) -> Cache:
    defaults = {"task": "sequence-classification", "max_length": 24, "device": "cpu"}
    run(CaptureConfig(out=out, corpus=str(corpus), **defaults | {"shard_tokens": 200} | options))
    return open_cache(out)


def live_logits(teacher: str, cache: Cache) -> torch.Tensor:
    """Plain `transformers` over every row alone, [R, L]."""
    model = BertForSequenceClassification.from_pretrained(teacher).eval()
    with torch.no_grad():
        return torch.cat(
            [
                model(
                    row.input_ids[None],
                    token_type_ids=None if row.token_type_ids is None else row.token_type_ids[None],
                ).logits
                for row in cache
            ]
        )
