"""A model and its tokenizer from a folder or a Hub id; their hashes; what a config alone says."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
import xxhash
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer

from shared.errors import ConfigError, Refused
from shared.tasks import TASKS, ProblemType
from teacher_cache.tasks.base import TeacherTask

DTYPES = ("auto", "float32", "bfloat16", "float16")
# What a config says of how it was loaded, not of the model.
UNHASHED = {"transformers_version", "_name_or_path", "dtype", "use_cache", "return_dict"}


# As a config of `transformers` names them.
PROBLEM_TYPES: dict[str, ProblemType] = {
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
    "regression": "regression",
}


def load_model(
    teacher: str,
    task: TeacherTask,
    *,
    revision: str | None,
    dtype: str,
    device_map: str | dict[str, str],
    attn_implementation: str | None,
    trust_remote_code: bool,
) -> Any:
    """The model of this task, with all of its weights from the checkpoint."""
    source = model_source(teacher)
    try:
        auto_class = getattr(transformers, TASKS[task.name].auto_class)
        model, report = auto_class.from_pretrained(
            source,
            revision=revision,
            trust_remote_code=trust_remote_code,
            dtype=dtype,
            device_map=device_map,
            attn_implementation=attn_implementation,
            output_loading_info=True,
        )
    except (OSError, ValueError, ImportError) as error:
        raise Refused(f"{teacher}: cannot be loaded for {task.name}. {error}") from error
    missing = sorted(map(str, {*report["missing_keys"], *report["mismatched_keys"]}))
    if not task.predicts and missing and all(name.startswith("pooler.") for name in missing):
        model.pooler, missing = None, []  # saved with another head, and read by nothing here
    if missing:
        raise Refused(
            f"{teacher}: the checkpoint lacks {len(missing)} weights of {type(model).__name__} "
            f"({', '.join(missing[:3])}), which would stay random. "
            f"Name a checkpoint that was saved with its head for {task.name}."
        )
    return model


def load_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """From a folder or a Hub id; refuses what transformers makes up where the files are missing."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            _folder_or_id(name), revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise Refused(
            f"{name}: no tokenizer can be loaded; save one there with "
            f"tokenizer.save_pretrained(folder), or name one with --tokenizer. {error}"
        ) from error
    if not tokenizer.get_vocab().keys() - set(tokenizer.all_special_tokens):
        raise Refused(
            f"{name}: its tokenizer knows special tokens only, so its files are probably missing; "
            "save them there with tokenizer.save_pretrained(folder), or name another --tokenizer."
        )
    return tokenizer


def logit_width_of(teacher: str, revision: str | None = None) -> int:
    """V, the width of a language model's logits."""
    return int(_text_config(teacher, revision).vocab_size)


def labels_of(teacher: str, revision: str | None = None) -> tuple[str, ...]:
    """The names of the classes."""
    config = _config(teacher, revision)
    return tuple(str(config.id2label[number]) for number in range(config.num_labels))


def problem_type_of(teacher: str, revision: str | None = None) -> ProblemType | None:
    """What its outputs are; None where it says nothing."""
    config = _config(teacher, revision)
    if config.problem_type is not None:
        return PROBLEM_TYPES[config.problem_type]
    return "regression" if config.num_labels == 1 else None


def hidden_width_of(teacher: str, revision: str | None = None) -> int:
    """D, the channels of a hidden state."""
    return int(_text_config(teacher, revision).hidden_size)


def _text_config(teacher: str, revision: str | None) -> Any:
    return _config(teacher, revision).get_text_config()


def _config(teacher: str, revision: str | None) -> Any:
    try:
        return AutoConfig.from_pretrained(model_source(teacher), revision=revision)
    except (OSError, ValueError, ImportError) as error:
        raise Refused(f"{teacher}: its config cannot be read. {error}") from error


def weights_digest(model: nn.Module) -> str:
    """xxh3_128 over name, dtype, shape and bytes of all weights as loaded, in order of name."""
    return digest_of(sorted(model.state_dict().items()))


def digest_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """xxh3_128 over name, dtype, shape and bytes of named tensors, one after another."""
    digest = xxhash.xxh3_128()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(data.numpy().data)
    return digest.hexdigest()


def config_hash(model: Any) -> str:
    """xxh3_128 over those settings of the model's config that differ from its defaults."""
    fields = {k: v for k, v in model.config.to_diff_dict().items() if k not in UNHASHED}
    return xxhash.xxh3_128(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()


def placement(device: str) -> str | dict[str, str]:
    """The `device_map` of from_pretrained."""
    if device == "balanced":
        return device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(
            f"device={device}: expected auto, balanced, cpu, or cuda with or without a number."
        ) from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={device}: torch {torch.__version__} sees no CUDA device.")
    return {"": device}


def _folder_or_id(name: str) -> str:
    """A missing folder would be taken for a Hub id, and its error would speak of the network."""
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise Refused(f"{name}: no such folder. Name a folder with a saved model, or a Hub id.")
    return name


def model_source(teacher: str) -> str:
    """Folder or Hub id; a folder without a model is refused."""
    source = _folder_or_id(teacher)
    path = Path(source)
    if path.is_dir() and not (path / "config.json").is_file():
        raise Refused(f"{teacher}: no config.json here. Name a folder saved by transformers.")
    return source


def teacher_id(name: str) -> str:
    """The Hub id, or the name of the folder without where it lies."""
    folder = Path(name)
    return folder.resolve().name if folder.is_dir() else name
