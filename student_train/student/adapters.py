"""Low-rank adapters on a student, through `peft`: which layers get them, and what is saved."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from shared.errors import ConfigError
from shared.tasks import TaskName
from student_train.config import AdapterSpec
from student_train.tasks.table import task_named


def add_adapters(student: Any, spec: AdapterSpec, task_name: TaskName) -> Any:
    """Adapters on the linear layers of the trunk; everything else is frozen.

    That is all of a language model; for tasks that bring a head what stands behind the trunk is
    trained as it is, and saved with the adapters.
    """
    require_peft()
    from peft import LoraConfig, get_peft_model

    task = task_named(task_name)
    heads = _heads(student) if task.brings_head else None
    _check_targets(student, spec.targets, heads or [])
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=2 * spec.rank if spec.alpha is None else spec.alpha,
        lora_dropout=spec.dropout,
        use_dora=spec.kind == "dora",
        use_rslora=spec.kind == "rslora",
        target_modules=list(spec.targets) or "all-linear",
        exclude_modules=heads,
        modules_to_save=heads,
        task_type=task.peft_type,
    )
    return get_peft_model(student, config)


def _check_targets(student: Any, targets: Sequence[str], heads: Sequence[str]) -> None:
    """Refuses a name that stands for no linear layer: adapters would be missing without a word."""
    layers = [
        name
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not set(name.split(".")) & set(heads)
    ]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise ConfigError(
                f"--lora-targets {target}: no linear layer of the student has this name, or one "
                f"that ends so. There are {known}."
            )


def _heads(student: Any) -> list[str]:
    """Modules with weights behind the trunk, and a pooler: new ones where the body is pretrained.

    What is new must be saved: a frozen layer of random weights would be another one after loading.
    """
    trunk = student.base_model_prefix
    names = [
        name
        for name, module in student.named_children()
        if name != trunk and next(module.parameters(), None) is not None
    ]
    pooler = [name for name, module in getattr(student, trunk).named_children() if name == "pooler"]
    return names + pooler


def require_peft() -> None:
    """Refuses adapters where the library is not installed."""
    if find_spec("peft") is None:
        raise ConfigError("adapters need peft: pip install 'teacher-cache[lora]'")
