"""Encoder-decoders in stage two: a language model that reads a source and writes a target."""

from collections.abc import Iterator
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from shared.cache import Cache
from shared.errors import CacheMismatch
from shared.format.manifest import Manifest
from shared.models.decoding import decoder_start_of
from shared.models.tokenizer import end_of_text, load_cached_tokenizer
from shared.rows import Row
from student_train.data.arrange import PAIRS
from student_train.tasks.base import HardLabels
from student_train.tasks.language import LanguageTask
from student_train.tasks.samples import Reading, Sample, pair_of


class Seq2SeqTask(LanguageTask):
    """The first segment of a row goes to the encoder, the second to the decoder."""

    arrangement = PAIRS
    writes_text = True

    def decoder_start(self, name: str) -> int | None:
        return decoder_start_of(name)

    def check_lengths(self, name: str, places: int, cache: Cache) -> None:
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

    def shape_config(
        self, config: PretrainedConfig, cache: Cache, *, from_scratch: bool, new_head: bool
    ) -> None:
        """Padding, end and start of a student from scratch: those of the rows it learns from."""
        if not from_scratch:
            return
        tokenizer = load_cached_tokenizer(cache.storage)
        end, pad = end_of_text(tokenizer), tokenizer.pad_token_id
        config.decoder_start_token_id = cache.manifest.preprocessing.decoder_start
        config.eos_token_id = end
        config.pad_token_id = end if pad is None else pad
        config.bos_token_id = tokenizer.bos_token_id

    def finish(self, student: Any, *, from_scratch: bool) -> Any:
        """A student from scratch has nothing forced on it as it writes, as some defaults would."""
        if from_scratch:
            config = student.config
            student.generation_config = GenerationConfig(
                decoder_start_token_id=config.decoder_start_token_id,
                eos_token_id=config.eos_token_id,
                pad_token_id=config.pad_token_id,
                bos_token_id=config.bos_token_id,
            )
        return student

    def samples(self, row: Row, number: int, reading: Reading) -> Iterator[Sample]:
        yield pair_of(row, number)

    def hard_labels(self, manifest: Manifest, config: PretrainedConfig) -> HardLabels | None:
        """The decoder is given the target, so that its logits are those of the labels."""
        return HardLabels(self.one_answer_per_row, manifest.labels) if manifest.labelled else None
