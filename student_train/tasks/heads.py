"""Tasks whose students have a head of their own, behind a body that may have none."""

from transformers import PretrainedConfig

from shared.cache import Cache
from shared.models.tokenizer import load_cached_tokenizer
from student_train.tasks.base import StudentTask


class HeadedTask(StudentTask):
    """A student without a head for the task gets a new one, as wide as its answers are many."""

    brings_head = True

    def shape_config(
        self, config: PretrainedConfig, cache: Cache, *, from_scratch: bool, new_head: bool
    ) -> None:
        self.shape_head(config, cache, is_new=from_scratch or new_head)
        _set_padding(config, cache, keep_own=not from_scratch)

    def shape_head(self, config: PretrainedConfig, cache: Cache, *, is_new: bool) -> None:
        """Sets what the config says of the answers; those of a head that is kept mostly stay."""
        raise NotImplementedError


def _set_padding(config: PretrainedConfig, cache: Cache, *, keep_own: bool) -> None:
    """A decoder takes the last token that is no padding for the whole row, so it must know it.

    Pretrained ones keep theirs; a tokenizer without padding pads with the end of a text.
    """
    text_config = config.get_text_config()
    own = text_config.pad_token_id
    if keep_own and own is not None and 0 <= own < text_config.vocab_size:
        return
    tokenizer = load_cached_tokenizer(cache.storage)
    known = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None]
    text_config.pad_token_id = known[0] if known else 0
