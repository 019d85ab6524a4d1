"""A student as it lies in a folder, loaded without the cache it learnt from.

That is a run's own folder, one of its checkpoints, or any folder of `save_pretrained`. Adapters are
put on their base model and left unmerged: what this module loads is what was trained. On the CPU,
in float32, from safetensors, and no code that comes with a model is ever run.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from shared.cache import Cache, open_cache
from shared.errors import ConfigError, IncompleteCache, Refused
from shared.models.tokenizer import load_cached_tokenizer
from shared.options import load
from shared.storage.local import LocalStorage
from student_train.config import TrainConfig
from student_train.loss.layers import PROJECTIONS
from student_train.run_files import (
    CONFIG,
    RESULT,
    SNAPSHOT,
    read_options,
    read_result,
    read_snapshot,
)
from student_train.student.adapters import require_peft
from student_train.tasks.table import auto_class_of, task_of

log = logging.getLogger(__name__)

ADAPTERS = "adapter_config.json"
_ADAPTER_WEIGHTS = "adapter_model.safetensors"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.txt")


@dataclass(frozen=True, slots=True)
class Run:
    """What a run says of how its student came to be; `result` is empty before its end."""

    folder: Path
    config: TrainConfig
    cache_ids: tuple[str, ...]
    result: Mapping[str, Any] = field(default_factory=dict)

    def open_cache(self) -> Cache | None:
        """The held-out cache, else the first one it learnt from that is still in its place."""
        held_out = self.config.validation_cache
        for path in (*([] if held_out is None else [held_out]), *self.config.cache_paths):
            try:
                return open_cache(path, allow_partial=True)
            except IncompleteCache:
                log.info("%s: the run names this cache, but it is not here now", path)
        return None


def check_is_student(folder: Path) -> None:
    """Refuses a folder without a model in it, saying what it is instead."""
    weights = any(folder.glob("*.safetensors"))
    if weights and ((folder / "config.json").is_file() or (folder / ADAPTERS).is_file()):
        return
    if not folder.is_dir():
        found = "no such folder"
    elif (folder / "manifest.json").is_file():
        found = "this is a cache, no student"
    elif (folder / CONFIG).is_file():
        there = sorted(path.name for path in folder.glob("checkpoint-*"))
        found = "this run has no model yet. Run train-student run to its end" + (
            f", or name one of its checkpoints ({', '.join(there)})" if there else ""
        )
        raise Refused(f"{folder}: {found}.")
    else:
        found = "no student here: expected config.json and *.safetensors"
    raise Refused(
        f"{folder}: {found}. Name the folder of a finished run of train-student run, of a "
        "checkpoint, or of a model saved by save_pretrained."
    )


def find_run(folder: Path) -> Run | None:
    """The run that a folder or a checkpoint belongs to."""
    for place in (folder, folder.resolve().parent):
        if not (place / CONFIG).is_file():
            continue
        storage = LocalStorage(place)
        read_options(storage)  # refuses a damaged file in its own words
        snapshot = read_snapshot(storage) if storage.exists(SNAPSHOT) else ()
        return Run(
            place,
            load(TrainConfig, {}, place / CONFIG),
            tuple(each.cache_id for each in snapshot),
            read_result(storage) if storage.exists(RESULT) and place == folder else {},
        )
    return None


def load_student(folder: Path, run: Run | None = None, labels: Sequence[str] = ()) -> Any:
    """The model in evaluation mode; with adapters a `PeftModel`.

    A checkpoint of adapters has no config of its own: that of its run is taken, and before the
    run's end `labels` say how many classes the new head has.
    """
    transformers.utils.logging.disable_progress_bar()
    if (folder / ADAPTERS).is_file():
        return _with_adapters(folder, run, labels).eval()
    config = _config(str(folder))
    model = _class_of(config, str(folder)).from_pretrained(
        folder, config=config, dtype=torch.float32, use_safetensors=True
    )
    return model.eval()


def merged(student: Any) -> Any:
    """A plain model of the same function: adapters added into its weights, saved heads in place."""
    if not isinstance(student, transformers.PreTrainedModel):
        student = student.merge_and_unload()
    student.config.architectures = [type(student).__name__]
    if student.can_generate():
        student.config.use_cache = True  # training turns it off
    return student


def saved_parameters(student: Any, cache: Cache) -> int:
    """Parameters of a student as it is saved.

    The projections of hidden states end with training, but for what a task saves beside the model.
    """
    counts = {name: parameter.numel() for name, parameter in student.named_parameters()}
    total = sum(count for name, count in counts.items() if PROJECTIONS not in name.split("."))
    return total + task_of(cache.manifest).parameters_beside(student, cache)


def load_tokenizer(folder: Path, run: Run | None, cache: Cache | None) -> Any:
    """That of the folder, of its run, or of the cache it learnt from."""
    for place in (folder, *([run.folder] if run else [])):
        if any((place / name).is_file() for name in _TOKENIZER_FILES):
            return AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    if cache is not None:
        return load_cached_tokenizer(cache.storage)
    raise Refused(
        f"{folder}: no tokenizer here, nor where its run and its cache would be. Save one there "
        "with tokenizer.save_pretrained(folder), or name the cache with --cache."
    )


def _with_adapters(folder: Path, run: Run | None, labels: Sequence[str]) -> Any:
    require_peft()
    from peft import PeftConfig, PeftModel

    adapters: Any = PeftConfig.from_pretrained(folder)
    base = str(adapters.base_model_name_or_path)
    if adapters.is_prompt_learning:
        raise ConfigError(
            f"{folder}: {adapters.peft_type} adds tokens and no weights, so it cannot be "
            "merged. Serve it through peft."
        )
    if not (folder / _ADAPTER_WEIGHTS).is_file():
        raise Refused(f"{folder}: {_ADAPTER_WEIGHTS} is missing. Save the adapters again.")
    places = (folder, *([] if run is None else [run.folder]))
    own = [place for place in places if (place / "config.json").is_file()]
    config = _config(str(own[0]) if own else base)
    if not own and labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
    model = _base_of(folder, adapters, config)
    return PeftModel.from_pretrained(model, folder)


def _base_of(folder: Path, adapters: Any, config: PretrainedConfig) -> Any:
    """The model below adapters, whose every weight is there or comes with them."""
    base, name = str(adapters.base_model_name_or_path), auto_class_of(str(adapters.task_type))
    model_class = getattr(transformers, name) if name else _class_of(config, str(folder))
    try:
        with _no_load_report():  # what is missing is looked at below
            model, loaded = model_class.from_pretrained(
                base,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # heads that are saved with the adapters
                output_loading_info=True,
            )
    except OSError as error:
        raise Refused(
            f"{folder}: its adapters belong on the weights of {base}, which cannot be loaded in "
            f"safetensors format. Put that model back where it was. {error}"
        ) from error
    brought = set(adapters.modules_to_save or ())
    lacking = {*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])}
    lost = sorted(key for key in lacking if not brought & set(key.split(".")))
    if lost:
        raise Refused(
            f"{folder}: {base} has no weight {lost[0]} of this shape, and the adapters do not "
            "bring it. Put the model that they were trained on back where it was."
        )
    return model


@contextmanager
def _no_load_report() -> Iterator[None]:
    logging_of = transformers.utils.logging
    before = logging_of.get_verbosity()
    logging_of.set_verbosity_error()
    try:
        yield
    finally:
        logging_of.set_verbosity(before)


def _config(name: str) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise Refused(f"{name}: its config.json cannot be used. {error}") from error


def _class_of(config: PretrainedConfig, name: str) -> Any:
    architecture = (config.architectures or ["none"])[0]
    if not hasattr(transformers, architecture):
        raise Refused(
            f"{name}: its config names the architecture {architecture}, which is none of "
            "transformers. Save the model again with save_pretrained."
        )
    return getattr(transformers, architecture)
