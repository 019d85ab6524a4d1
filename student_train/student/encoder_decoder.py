"""What is different where the student is an encoder-decoder: its decoder, and how it begins."""

from shared.cache import Cache
from shared.errors import CacheMismatch
from shared.models.decoding import decoder_start_of


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


def check_decoder_start(name: str, cache: Cache) -> None:
    """Refuses a pretrained student whose decoder begins with another token than the rows do."""
    own, cached = decoder_start_of(name), cache.manifest.preprocessing.decoder_start
    if own is not None and own != cached:
        raise CacheMismatch(
            f"{name}: its decoder starts from token {own}, but the targets of {cache.path} start "
            f"from {cached}. Cache again with a teacher that starts as the student does, or, with "
            f"hard labels only, with --decoder-start {own}."
        )
