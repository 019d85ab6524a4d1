"""What a tokenizer is: a hash of its content, so that equal names never hide different tokens."""

import json
from typing import TYPE_CHECKING

import xxhash

from shared.errors import CorruptCache
from shared.format.manifest import TokenizerInfo
from shared.storage.base import Storage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def describe(tokenizer: "PreTrainedTokenizerBase") -> TokenizerInfo:
    """Content hash, number of ids and special tokens of a tokenizer."""
    return TokenizerInfo(
        hash=content_hash(tokenizer),
        num_ids=max(tokenizer.get_vocab().values()) + 1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        template_hash=xxhash.xxh3_128_hexdigest(_template(tokenizer)),
    )


def end_of_text(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """The token that a text ends with: EOS, else SEP; None where there is neither."""
    eos = tokenizer.eos_token_id
    return tokenizer.sep_token_id if eos is None else eos


def load_cached_tokenizer(storage: Storage) -> "PreTrainedTokenizerBase":
    """The tokenizer that a cache carries; no network, no code from the cache."""
    from transformers import AutoTokenizer

    folder, where = str(storage.local("tokenizer")), storage.where("tokenizer")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise CorruptCache(
            f"{where}: no tokenizer can be loaded from these files ({error!r}); restore them from "
            "a copy."
        ) from error


def content_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """xxh3_128 over the canonical `tokenizer.json`, less the settings a call may change.

    A tokenizer without one (not a fast tokenizer) is hashed by its vocabulary.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    content.pop("truncation", None)
    content.pop("padding", None)
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())


def _template(tokenizer: "PreTrainedTokenizerBase") -> bytes:
    return json.dumps(getattr(tokenizer, "chat_template", None), sort_keys=True).encode()
