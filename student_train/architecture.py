"""What a model of `transformers` is made of: its blocks, and what stands in front of its head."""

from typing import Any

from transformers import PretrainedConfig


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
