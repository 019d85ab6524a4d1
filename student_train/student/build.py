"""The student: built from a folder or a Hub id, for the task of its cache.

Weights come from safetensors only, and no code that comes with a model is ever run.
"""

import logging
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PretrainedConfig

from shared.cache import Cache
from shared.errors import ConfigError, Refused
from shared.tasks import TASKS, TaskName
from student_train.student.adapters import require_peft
from student_train.tasks.table import task_of

log = logging.getLogger(__name__)

_DROPOUTS = ("dropout", "dropout_prob", "dropout_rate", "pdrop")


def build_student(name: str, cache: Cache, *, seed: int, dropout: float | None = None) -> Any:
    """A pretrained student, one with adapters, or fresh weights where there is only config.json.

    With `dropout` in place of its own, if it is given. For the task of the cache: on a label space
    its head has the classes of the cache; a student without a head for the task gets a new one.
    """
    transformers.utils.logging.disable_progress_bar()
    config = load_config(name)
    task_name, task, folder = cache.manifest.task, task_of(cache.manifest), Path(name)
    if (folder / "adapter_config.json").is_file():
        return _with_saved_adapters(folder, cache, seed=seed, dropout=dropout)
    if dropout is not None:
        set_dropout(name, config, dropout)
    from_scratch = is_from_scratch(name)
    new_head = task.brings_head and not has_head(config, task_name)
    task.shape_config(config, cache, from_scratch=from_scratch, new_head=new_head)
    torch.manual_seed(seed)
    if from_scratch:
        log.info("%s: no weights there, training from scratch", name)
        auto: Any = getattr(transformers, TASKS[task_name].auto_class)
        return task.finish(auto.from_config(config, dtype=torch.float32), from_scratch=True)
    if new_head:
        log.info("%s: it has no head for %s, a new one is made", name, task_name)
    student = _pretrained(name, config, task_name, new_head=new_head)
    return task.finish(student, from_scratch=False)


def _pretrained(name: str, config: PretrainedConfig, task_name: TaskName, *, new_head: bool) -> Any:
    """The weights of a folder or Hub id, in float32."""
    auto: Any = getattr(transformers, TASKS[task_name].auto_class)
    try:
        # A head for another task may have the same name and another width; nothing else may differ.
        student, loaded = auto.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=new_head,
            output_loading_info=True,
        )
    except OSError as error:
        raise Refused(
            f"{name}: no weights in safetensors format could be loaded ({first_line(error)}). "
            "Convert the model with save_pretrained, or name a folder with only config.json to "
            "train from scratch."
        ) from error
    body = f"{student.base_model_prefix}."
    wrong = sorted(key for key, *_ in loaded["mismatched_keys"] if key.startswith(body))
    if wrong:
        raise Refused(
            f"{name}: the weights of {wrong[0]} have another shape than its config.json says. "
            "Take both from the same model."
        )
    return student


def has_head(config: PretrainedConfig, task_name: TaskName) -> bool:
    """Whether the model was saved as one for this task, so that its labels mean something."""
    auto: Any = getattr(transformers, TASKS[task_name].auto_class)
    return auto._model_mapping[type(config)].__name__ in (config.architectures or ())


def set_dropout(name: str, config: PretrainedConfig, dropout: float) -> None:
    """Every number of the config whose name says that it is the probability of a dropout.

    What is null there follows another one (BERT's classifier) and goes on doing so.
    """
    found = 0
    for each in {id(part): part for part in (config, config.get_text_config())}.values():
        for field, value in each.to_dict().items():
            numeric = isinstance(value, int | float) and not isinstance(value, bool)
            if numeric and field.endswith(_DROPOUTS):
                setattr(each, field, dropout)
                found += 1
    if not found:
        raise ConfigError(
            f"--dropout {dropout:g}: the config of {name} ({config.model_type}) has no dropout to "
            f"set, no number whose name ends in {', '.join(_DROPOUTS)}. Leave the option out."
        )


def _with_saved_adapters(folder: Path, cache: Cache, *, seed: int, dropout: float | None) -> Any:
    require_peft()
    from peft import PeftConfig, PeftModel

    base_name = str(PeftConfig.from_pretrained(folder).base_model_name_or_path)
    base = build_student(base_name, cache, seed=seed, dropout=dropout)
    return PeftModel.from_pretrained(base, folder)


def load_config(name: str) -> PretrainedConfig:
    """The model configuration of a folder or Hub id."""
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise Refused(f"{name}: no such folder")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise Refused(
            f"{name}: no student could be loaded from here ({first_line(error)}). Expected a Hub "
            "id, "
            "or a folder with config.json and, unless it is to train from scratch, safetensors."
        ) from error


def is_from_scratch(name: str) -> bool:
    """Whether this is a folder without weights."""
    return Path(name).is_dir() and not _has_weights(Path(name))


def _has_weights(folder: Path) -> bool:
    patterns = ("*.safetensors", "*.bin", "*.pt", "*.pth")
    return any(any(folder.glob(pattern)) for pattern in patterns)


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
