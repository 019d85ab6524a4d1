"""Which options decide what tokens a document becomes, as the manifest keeps them."""

from typing import TYPE_CHECKING, Any

from shared.errors import CacheMismatch, ConfigError, Refused
from shared.format.manifest import GenerationSpec, Preprocessing
from shared.models.decoding import decoder_start_of
from teacher_cache.config import CaptureConfig
from teacher_cache.corpus.corpus import Corpus
from teacher_cache.engines.base import Engine
from teacher_cache.engines.loading import model_source
from teacher_cache.tasks.base import TeacherTask
from teacher_cache.tasks.rows import document_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def preprocessing_of(
    config: CaptureConfig,
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase",
    task: TeacherTask,
    engine: Engine | None,
) -> Preprocessing:
    """Every option that decides which tokens a document becomes."""
    fields: dict[str, Any] = {
        "split": config.split,
        "columns": tuple(f"{role}={column}" for role, column in corpus.columns.items()),
        "sample_by": config.sample_by,
        "encoding_errors": config.encoding_errors,
        "limit_documents": config.limit_documents,
        "max_length": config.max_length,
        "pack": config.pack,
        "stride": config.stride,
        "max_target_length": config.max_target_length,
        "decoder_start": _decoder_start(config, tokenizer) if task.inputs.pairs else -1,
        "generation": _generation(config, engine) if config.generate else None,
    }
    return Preprocessing(**fields | task.preprocessing(config))


def _generation(config: CaptureConfig, engine: Engine | None) -> GenerationSpec:
    return GenerationSpec(
        num_beams=config.num_beams,
        max_new_tokens=config.max_new_tokens,
        temperature=config.sample_temperature,
        top_p=config.top_p,
        seed=config.seed if config.sample_temperature else 0,
        writer="" if engine is None else engine.writer_hash(),  # `plan` reads no weights
    )


def _decoder_start(config: CaptureConfig, tokenizer: "PreTrainedTokenizerBase") -> int:
    """As the teacher has it; without one as asked, else as T5, Marian and BART choose it."""
    its = None
    if config.teacher is not None:
        its = decoder_start_of(model_source(config.teacher), config.revision)
    asked = None if config.decoder_start == "auto" else config.decoder_start
    if asked is not None and its is not None and asked != its:
        raise CacheMismatch(
            f"--decoder-start {asked}: the decoder of {config.teacher} starts from token {its}. "
            "Leave --decoder-start out."
        )
    if its is None and asked is None and config.uses_teacher:
        raise Refused(
            f"{config.teacher}: neither its generation_config.json nor its config.json has a "
            "decoder_start_token_id, so it cannot be told what its decoder starts from. Say it "
            "with --decoder-start (T5 and Marian: the padding token, BART: the end of a text)."
        )
    known = (its, asked, tokenizer.pad_token_id, tokenizer.bos_token_id)
    start = next((token for token in known if token is not None), document_ends(tokenizer).eos[0])
    num_ids = max(tokenizer.get_vocab().values()) + 1
    if start >= num_ids:
        raise ConfigError(
            f"--decoder-start {start}: the tokenizer has {num_ids:,} tokens, counted from 0"
        )
    return start
