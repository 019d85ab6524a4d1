"""A model of `transformers` writes answers with its own `generate`.

B sources of a batch, S tokens of the longest, N new ones.
"""

import copy
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xxhash

from shared.arrays import mixed_bits
from shared.errors import TeacherCacheError
from shared.format.manifest import GenerationSpec, Preprocessing
from shared.models.decoding import caches_all_blocks
from shared.models.tokenizer import end_of_text
from teacher_cache.engines.loading import weights_digest
from teacher_cache.engines.memory import is_out_of_memory
from teacher_cache.engines.teacher import Teacher
from teacher_cache.tasks.inputs import Padded, padded


def write(
    teacher: Teacher, sources: Sequence[list[int]], first_document: int, options: Preprocessing
) -> list[list[int]]:
    """New tokens of each source, up to the first end, which is among them where it was said."""
    spec, device = options.generation, teacher.device
    assert spec is not None  # with --generate there is one
    ids_BS, mask_BS = _read(teacher, sources)
    seed = int(mixed_bits(spec.seed, first_document)[0] >> np.uint64(1))
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            output_BN = teacher.model.generate(
                input_ids=ids_BS.to(device),
                attention_mask=mask_BS.to(device),
                generation_config=_settings(teacher, spec, options),
            )
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TeacherCacheError(
            f"out of memory: writing {spec.max_new_tokens:,} tokens for {len(sources):,} "
            f"sources of up to {ids_BS.shape[1]:,}, from document {first_document}, does not "
            "fit. Start another cache with a smaller --forward-tokens or --max-new-tokens."
        ) from error
    read = 1 if _pairs(teacher) else ids_BS.shape[1]  # a decoder has read its start token
    stops = set(ends(teacher))
    return [_up_to_end(tokens, stops) for tokens in output_BN[:, read:].tolist()]


def _pairs(teacher: Teacher) -> bool:
    return teacher.head.task.inputs.pairs


def _read(teacher: Teacher, sources: Sequence[list[int]]) -> Padded:
    arrays = [np.array(source) for source in sources]
    if _pairs(teacher):
        return padded(arrays)
    # What is written comes right behind, so padding is in front.
    ids_BS, mask_BS = padded([ids[::-1] for ids in arrays])
    return ids_BS.flip(1), mask_BS.flip(1)


def ends(teacher: Teacher) -> list[int]:
    """Tokens that end a text: the teacher's own, else the tokenizer's."""
    own = teacher.model.generation_config.eos_token_id
    if own is None:
        own = end_of_text(teacher.tokenizer)
    return [own] if isinstance(own, int) else list(own or ())


def _up_to_end(tokens: list[int], stops: set[int]) -> list[int]:
    stop = next((place + 1 for place, token in enumerate(tokens) if token in stops), None)
    return tokens[:stop]


def _settings(teacher: Teacher, spec: GenerationSpec, options: Preprocessing) -> Any:
    """The teacher's own settings (a forced first token, a penalty) with what was asked for."""
    settings, fitted = copy.deepcopy(teacher.model.generation_config), teacher.fitted
    pad, stops = teacher.tokenizer.pad_token_id, ends(teacher)
    settings.update(
        max_length=None,
        max_new_tokens=spec.max_new_tokens,
        num_beams=spec.num_beams,
        do_sample=spec.temperature > 0,
        temperature=spec.temperature or None,
        top_p=spec.top_p if spec.temperature else None,
        top_k=0 if spec.temperature else None,
        eos_token_id=stops,
        pad_token_id=stops[0] if pad is None else pad,
        use_cache=caches_all_blocks(teacher.model.config),
        # A head may be wider than there are tokens.
        suppress_tokens=[
            *(settings.suppress_tokens or ()),
            *range(fitted.num_classes, fitted.logit_width),
        ]
        or None,
    )
    if _pairs(teacher):
        settings.decoder_start_token_id = options.decoder_start
    return settings


def writer_hash(teacher: Teacher) -> str:
    """Over the weights, and over the settings by which the teacher writes."""
    settings = teacher.model.generation_config.to_diff_dict()
    settings.pop("transformers_version", None)
    parts = [weights_digest(teacher.model), settings]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode())
