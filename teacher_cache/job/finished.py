"""A finished cache is recognised before its teacher is loaded.

To run the same command once more, as a job queue does, is then a matter of seconds and needs no
GPU. All that was asked for is compared with the manifest, and the teacher by its weights: those of
a Hub id are the ones of its commit; those of a folder may have been changed in place, so they are
read from its safetensors, one tensor after another, and hashed as those of the loaded model were.

Nothing here refuses anything. Where it cannot be sure that the same was asked for, the teacher is
loaded as for any other cache, and the comparison that follows says what differs.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig

from shared.cache import committed_shards
from shared.errors import CacheMismatch
from shared.format import manifest_file
from shared.format.manifest import Manifest, TeacherInfo
from shared.storage.base import Storage
from shared.tasks import TASKS
from teacher_cache.config import CaptureConfig
from teacher_cache.engines.loading import config_hash, digest_of, model_source, teacher_id
from teacher_cache.job.calibrate import check_asked
from teacher_cache.job.draft import Draft, resolve


def finished_as_asked(config: CaptureConfig, storage: Storage) -> Draft | None:
    """What was asked for, without its teacher, if all of it is in the cache; else None."""
    if not (storage.exists(manifest_file.MANIFEST) and storage.exists(manifest_file.MANIFEST_HASH)):
        return None
    manifest, _ = manifest_file.read(storage)
    its = manifest.teacher
    if len(committed_shards(storage)) < manifest.plan.num_shards or its is None:
        return None  # a cache without a teacher loads none
    if manifest.preprocessing.generation is not None and its.revision == "local":
        return None  # how it writes stands in another file of its folder
    if not config.uses_teacher or not _is_teacher(config, its):
        return None
    draft = _with_its_teacher(resolve(config, load_teacher=False), manifest)
    try:
        check_asked(draft, manifest, storage)
    except CacheMismatch:
        return None
    return draft


def _with_its_teacher(draft: Draft, manifest: Manifest) -> Draft:
    """A draft that read no weights, with what the manifest says of the same teacher."""
    asked, its = draft.preprocessing, manifest.preprocessing
    if asked.generation is not None and its.generation is not None:
        generation = replace(asked.generation, writer=its.generation.writer)
        asked = replace(asked, generation=generation)
    return replace(draft, teacher_info=manifest.teacher, preprocessing=asked)


def _is_teacher(config: CaptureConfig, its: TeacherInfo) -> bool:
    """Whether the teacher asked for is surely the one that a cache was made with."""
    assert config.teacher is not None  # CaptureConfig refuses targets without a teacher
    source = model_source(config.teacher)
    try:
        settings = AutoConfig.from_pretrained(
            source, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        model = _without_weights(config, settings)
    except (OSError, ValueError, ImportError, NotImplementedError):
        return False  # loading it says what is wrong
    described = (
        teacher_id(config.teacher),
        getattr(settings, "_commit_hash", None) or "local",
        config_hash(model),
        str(model.dtype).removeprefix("torch."),
        model.config._attn_implementation,
    )
    expected = (its.id, its.revision, its.config_hash, its.dtype, its.attn_implementation)
    if described != expected:
        return False
    if its.revision != "local":
        return True
    if (Path(source) / "adapter_config.json").exists():
        return False  # loading it changes what the files hold
    return digest_of(_tensors(Path(source), model)) == its.weights_digest


def _without_weights(config: CaptureConfig, settings: Any) -> Any:
    """The teacher's model with tensors that have a shape and a dtype, but no memory."""
    dtype = settings.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    if dtype is None:
        raise ValueError("the checkpoint decides the dtype")
    attention = config.attn_implementation
    with torch.device("meta"):
        return getattr(transformers, TASKS[config.task].auto_class).from_config(
            settings,
            dtype=dtype,
            attn_implementation=None if attention == "auto" else attention,
            trust_remote_code=config.trust_remote_code,
        )


def _tensors(folder: Path, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The weights as they are once loaded, by name; ends early where one cannot be told.

    A weight that two names share is in the files once, under either.
    """
    places: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            places |= dict.fromkeys(opened.keys(), file)
    wanted = model.state_dict(keep_vars=True)
    for name, tensor in sorted(wanted.items()):
        names = [name, *(other for other, same in wanted.items() if same is tensor)]
        found = next((other for other in names if other in places), None)
        if found is None:
            return
        with safe_open(places[found], "pt") as opened:
            yield name, opened.get_tensor(found).to(tensor.dtype)
