"""How many tokens a row may have for a model that looks positions up in a table."""

from typing import Any

from torch import nn


def most_tokens(model: Any) -> int | None:
    """Tokens of the longest row a model can take; None where no table of positions ends.

    A table with padding of its own counts from behind it: of the 514 places of a RoBERTa 512 are
    for tokens.
    """
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    words = model.get_input_embeddings()
    tables = (module for module in model.modules() if isinstance(module, nn.Embedding))
    for table in tables:
        if table is not words and table.num_embeddings == places:
            return places if table.padding_idx is None else places - table.padding_idx - 1
    return None
