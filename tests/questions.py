"""Questions on texts, and what reads them, small enough to be made in a test."""

import json
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import BertConfig, BertForQuestionAnswering, PreTrainedTokenizerFast

from shared.cache import Cache, open_cache
from tests.conftest import WORDS

ANSWERS, OTHERS = (
    WORDS[2:14],
    WORDS[14:],
)  # no articles; a context has words of the first kind in its answer only
MAX_LENGTH, STRIDE = 32, 6
VOCABULARY = 90


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Word pieces between [CLS] and [SEP], with types, as BERT has them."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = [f"{before}{letter}" for before in ("", "##") for letter in ascii_lowercase]
    whole = [*ANSWERS, *OTHERS[::3]]  # the others become several tokens
    tokens = [*special, *letters, *whole][:VOCABULARY]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def bert_config(**changes: Any) -> BertConfig:
    """Two layers of 32 channels over the tokens of `make_tokenizer`, no dropout."""
    options: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return BertConfig(**options | changes)


def make_teacher() -> BertForQuestionAnswering:
    """A random one whose distributions are far from flat, and differ from row to row."""
    torch.manual_seed(0)
    model = BertForQuestionAnswering(bert_config(initializer_range=0.3))
    with torch.no_grad():
        model.qa_outputs.weight.mul_(4)
    return model.eval()


def make_documents(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """4 to 60 words, in them an answer of 1 to 3 others; every fifth question has none."""
    rng = np.random.default_rng(seed)
    documents = []
    for index in range(count):
        words = [OTHERS[i] for i in rng.integers(0, len(OTHERS), rng.integers(4, 61))]
        answer = " ".join(ANSWERS[i] for i in rng.integers(0, len(ANSWERS), rng.integers(1, 4)))
        words[rng.integers(0, len(words))] = answer
        context = " ".join(words)
        question = " ".join(OTHERS[i] for i in rng.integers(0, len(OTHERS), rng.integers(1, 5)))
        document = {"question": question, "context": context, "answers": None}
        if index % 5 != 4:
            place = f" {context} ".index(f" {answer} ")
            document["answers"] = {"text": [answer, "most"], "answer_start": [place, 0]}
        else:
            document["context"] = context.replace(answer, "most")
        documents.append(document)
    return documents


def write_corpus(path: Path, documents: list[dict[str, Any]]) -> Path:
    path.write_text("\n".join(map(json.dumps, documents)) + "\n")
    return path


def write_teacher(folder: Path) -> Path:
    make_teacher().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def capture(out: Path, corpus: Path, **options: Any) -> Cache:
    """A cache of windows of 32 tokens, which share 6."""
    from teacher_cache.config import CaptureConfig
    from teacher_cache.job.run import run

    defaults: dict[str, Any] = {
        "task": "question-answering",
        "corpus": str(corpus),
        "max_length": MAX_LENGTH,
        "stride": STRIDE,
        "shard_tokens": 2000,
        "device": "cpu",
    }
    run(CaptureConfig(out=out, **defaults | options))
    return open_cache(out)
