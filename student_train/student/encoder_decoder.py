"""What is different where the student is an encoder-decoder: its decoder, and how it begins."""

from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from shared.cache import Cache
from shared.errors import CacheMismatch
from shared.models.tokenizer import end_of_text, load_cached_tokenizer


def num_blocks(config: PretrainedConfig) -> int:
    """Blocks that hidden states come from: those of the decoder, where there is an encoder too."""
    if not config.is_encoder_decoder:
        return int(config.get_text_config().num_hidden_layers)
    of_t5 = config.to_dict().get("num_decoder_layers")
    return int(of_t5 or config.get_text_config(decoder=True).num_hidden_layers)


def trunk_parts(student: Any) -> list[Any]:
    """What stands in front of the head."""
    if student.config.is_encoder_decoder:
        return [student.get_encoder(), student.get_decoder()]
    return [student.get_submodule(student.base_model_prefix)]


def set_tokens(config: PretrainedConfig, cache: Cache) -> None:
    """Padding, end and start of a student from scratch: those of the rows it learns from."""
    tokenizer = load_cached_tokenizer(cache.storage)
    end, pad = end_of_text(tokenizer), tokenizer.pad_token_id
    config.decoder_start_token_id = cache.manifest.preprocessing.decoder_start
    config.eos_token_id = end
    config.pad_token_id = end if pad is None else pad
    config.bos_token_id = tokenizer.bos_token_id


def generation_config(config: PretrainedConfig) -> GenerationConfig:
    """How a student from scratch writes: nothing is forced on it, as some defaults would."""
    return GenerationConfig(
        decoder_start_token_id=config.decoder_start_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.bos_token_id,
    )


def check_lengths(name: str, places: int, cache: Cache) -> None:
    """Refuses a student that takes fewer positions than either side of a row has."""
    # A position is a token of the decoder that is not its last.
    targets = cache.row_positions + 1
    for option, longest in (
        ("--max-length", int((cache.row_tokens - targets).max(initial=0))),
        ("--max-target-length", int(targets.max(initial=0))),
    ):
        if longest > places:
            fits = places - (option == "--max-target-length")
            raise CacheMismatch(
                f"{name}: takes {places:,} positions, but a side of a row of {cache.path} has "
                f"{longest:,} tokens. Cache again with {option} {fits}, or use another student."
            )
