"""What an encoder-decoder says of how its decoder begins, and what `generate` makes of it."""

from transformers import AutoConfig, GenerationConfig, PretrainedConfig


def decoder_start_of(name: str, revision: str | None = None) -> int | None:
    """The token its decoder starts from: of its generation settings, else of its config.

    None where neither says, as in a config of a T5 that was never trained. `revision`: of a Hub id.
    """
    try:
        settings = GenerationConfig.from_pretrained(name, revision=revision or "main").to_dict()
    except OSError:  # no generation_config.json there
        settings = {}
    if settings.get("decoder_start_token_id") is None:
        settings = AutoConfig.from_pretrained(name, revision=revision or "main").to_dict()
    start = settings.get("decoder_start_token_id")
    return None if start is None else int(start)


def caches_all_blocks(config: PretrainedConfig) -> bool:
    """Whether `generate` can keep keys and values.

    It makes room for as many blocks as the encoder of a T5 has, and fails where its decoder has
    more (transformers 5.23).
    """
    blocks = config.to_dict().get("num_decoder_layers")
    return blocks is None or blocks <= config.get_text_config(decoder=True).num_hidden_layers
