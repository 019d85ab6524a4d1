"""Tiny encoder-decoders, a tokenizer with an end of text, and a corpus of sources and targets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    MarianConfig,
    PreTrainedTokenizerFast,
    T5Config,
)

from shared.cache import Cache, open_cache
from teacher_cache.config import CaptureConfig
from teacher_cache.job.run import run
from tests.conftest import WORDS

FAMILIES = ("t5", "bart", "marian")
MAX_LENGTH, MAX_TARGET_LENGTH = 24, 12
PAD, END = 0, 1


def make_tokenizer(folder: Path, *, ends: bool = True) -> Any:
    """A token for each word; as in a T5, a text gets `</s>` behind it unless `ends` is False."""
    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*special, *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", END)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return fast


def make_config(family: str, **changes: Any) -> Any:
    """Two blocks in the encoder, three in the decoder, 32 channels, no dropout."""
    tokens = {"vocab_size": 108, "pad_token_id": PAD, "eos_token_id": END}
    tokens |= {"decoder_start_token_id": PAD}
    if family == "t5":
        options = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 3}
        return T5Config(**options | tokens | {"num_heads": 2, "dropout_rate": 0.0} | changes)
    options = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "dropout": 0.0}
    for side in ("encoder", "decoder"):
        options |= {f"{side}_attention_heads": 2, f"{side}_ffn_dim": 64}
    options |= tokens | {"max_position_embeddings": 64, "forced_eos_token_id": None}
    return (BartConfig if family == "bart" else MarianConfig)(**options | changes)


def make_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """Random, with distributions far from flat; a BART has a bias behind its head."""
    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(make_config(family, **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "shared" in name or "lm_head" in name:
                parameter.mul_(3 if family == "t5" else 40)
            elif parameter.dim() == 2 and family != "t5":
                parameter.mul_(6)
        if family == "bart":
            model.final_logits_bias.normal_()
    return model


def make_teachers(folder: Path) -> Path:
    """A folder of each family, with its tokenizer."""
    for family in FAMILIES:
        make_model(family).save_pretrained(folder / family)
        make_tokenizer(folder / family)
    return folder


def make_corpus(path: Path, count: int = 50, seed: int = 0) -> Path:
    """Sources of 1 to 40 words, targets of 1 to 20; every third has two of them."""
    rng = np.random.default_rng(seed)

    def text(most: int) -> str:
        return " ".join(WORDS[i] for i in rng.integers(0, len(WORDS), rng.integers(1, most + 1)))

    rows = []
    for index in range(count):
        targets: list[str] | str = [text(20), text(20)] if index % 3 == 0 else text(20)
        rows.append({"source": text(40), "target": targets})
    rows[4]["source"] = ""
    rows[5]["target"] = None
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def capture(out: Path, corpus: Path, **options: Any) -> Cache:
    """A cache of the corpus in several small shards."""
    defaults: dict[str, Any] = {
        "task": "seq2seq-lm",
        "corpus": str(corpus),
        "max_length": MAX_LENGTH,
        "max_target_length": MAX_TARGET_LENGTH,
        "shard_tokens": 400,
        "device": "cpu",
    }
    run(CaptureConfig(out=out, **defaults | options))
    return open_cache(out)


def sides(row: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What encoder and decoder read of a row, [1, S] and [1, T]: without the last token, which
    nothing follows."""
    source, target = row.input_ids.split(row.segments)
    return source[None], target[None, :-1]
