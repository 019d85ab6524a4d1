"""The student: built from a folder or a Hub id, checked against the cache before the first step.

Weights come from safetensors only, and no code that comes with a model is ever run.
"""

import logging
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
)

from shared.cache import Cache
from shared.errors import CacheMismatch, ConfigError, Refused
from shared.tokenizer import content_hash
from student_train.config import TrainConfig

log = logging.getLogger(__name__)

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")


def build_student(name: str, *, seed: int) -> Any:
    """A pretrained student, one with adapters, or fresh weights where there is only config.json."""
    transformers.utils.logging.disable_progress_bar()
    config = load_config(name)
    folder = Path(name)
    if (folder / "adapter_config.json").is_file():
        return _with_saved_adapters(folder, seed=seed)
    if folder.is_dir() and not _has_weights(folder):
        torch.manual_seed(seed)
        log.info("%s: no weights there, training from scratch", name)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    try:
        return AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
        )
    except OSError as error:
        raise Refused(
            f"{name}: no weights in safetensors format could be loaded ({_first_line(error)}). "
            "Convert the model with save_pretrained, or name a folder with only config.json to "
            "train from scratch."
        ) from error


def _with_saved_adapters(folder: Path, *, seed: int) -> Any:
    _require_peft()
    from peft import PeftConfig, PeftModel

    base = build_student(str(PeftConfig.from_pretrained(folder).base_model_name_or_path), seed=seed)
    return PeftModel.from_pretrained(base, folder)


def load_config(name: str) -> PretrainedConfig:
    """The model configuration of a folder or Hub id."""
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise Refused(f"{name}: no such folder")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise Refused(
            f"{name}: no student could be loaded from here ({_first_line(error)}). Expected a Hub "
            "id, "
            "or a folder with config.json and, unless it is to train from scratch, safetensors."
        ) from error


def _has_weights(folder: Path) -> bool:
    patterns = ("*.safetensors", "*.bin", "*.pt", "*.pth")
    return any(any(folder.glob(pattern)) for pattern in patterns)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_fit(name: str, config: PretrainedConfig, cache: Cache) -> None:
    """Refuses a student that the targets of the cache do not fit, naming both sides."""
    manifest = cache.manifest
    classes = manifest.targets.num_classes
    text_config = config.get_text_config()
    width = getattr(text_config, "vocab_size", None)
    if width is not None and width < classes:
        raise CacheMismatch(
            f"{name}: its head has {width:,} classes, but {cache.path} was cached over "
            f"{classes:,}. "
            "Use a student with the teacher's tokenizer (a wider head is fine), or cache a teacher "
            "with the student's."
        )
    longest = int(cache.row_tokens.max(initial=0))
    places = getattr(text_config, "max_position_embeddings", None)
    if places is not None and longest > places:
        raise CacheMismatch(
            f"{name}: takes {places:,} positions, but the longest row of {cache.path} has "
            f"{longest:,} tokens. Cache again with --max-length {places}, or use another student."
        )
    _check_tokenizer(name, cache)


def _check_tokenizer(name: str, cache: Cache) -> None:
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).exists() for file in _TOKENIZER_FILES):
        return  # a student without a tokenizer of its own takes the cache's
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):
        log.warning("%s: no tokenizer could be loaded, the cache's is used", name)
        return
    found, cached = content_hash(tokenizer), cache.manifest.tokenizer.hash
    if found == cached:
        return
    raise CacheMismatch(
        f"{name}: its tokenizer is not the one of {cache.path} (content hash {found[:12]}, cached "
        f"{cached[:12]}). {_token_differences(tokenizer.get_vocab(), cache)}"
        "The same ids would mean other tokens: use a student with the teacher's tokenizer, or "
        "remove the tokenizer files from a student that is to learn this one from scratch."
    )


def _token_differences(vocabulary: dict[str, int], cache: Cache) -> str:
    from shared.tokenizer import load_cached_tokenizer

    ours = {index: token for token, index in vocabulary.items()}
    theirs = {
        index: token for token, index in load_cached_tokenizer(cache.storage).get_vocab().items()
    }
    differing = [i for i in sorted(ours.keys() | theirs.keys()) if ours.get(i) != theirs.get(i)]
    if not differing:
        return "The tokens are equal; the rules that cut text into them differ. "
    shown = ", ".join(f"{i}: {ours.get(i)!r} / {theirs.get(i)!r}" for i in differing[:5])
    return f"{len(differing):,} ids differ, the first ones (student / cache): {shown}. "


def layer_pairs(
    config: TrainConfig, model_config: PretrainedConfig, cache: Cache
) -> tuple[tuple[int, int], ...]:
    """(teacher layer, student layer) for the hidden loss of this student on this cache."""
    if not config.uses_hidden_loss:
        return ()
    blocks = int(model_config.get_text_config().num_hidden_layers)
    return config.layer_pairs(cache.manifest.hidden.layers, blocks)


def check_cache(config: TrainConfig, model_config: PretrainedConfig, cache: Cache) -> None:
    """Refuses a loss that the cache holds nothing for."""
    manifest = cache.manifest
    if manifest.targets.kind == "none" and (config.uses_soft_loss or config.uses_hidden_loss):
        raise CacheMismatch(
            f"{cache.path}: holds hard labels only (--targets none). Train with --soft-weight 0 "
            "--hard-weight 1, or cache a teacher."
        )
    if config.uses_soft_loss and manifest.targets.kind == "sample":
        _check_sample(config, cache)
    stored = (1.0, *manifest.targets.temperatures)
    exact = manifest.targets.kind == "dense" or config.temperature in stored
    if config.uses_soft_loss and not exact:
        listed = ", ".join(f"{temperature:g}" for temperature in stored)
        raise CacheMismatch(
            f"--temperature {config.temperature:g}: {cache.path} is exact at {listed} only. Use "
            f"one of these, or cache again with --temperature {config.temperature:g}."
        )
    if config.temperature_end is not None and manifest.targets.kind != "dense":
        raise CacheMismatch(
            f"--temperature-end {config.temperature_end:g}: a schedule passes every temperature "
            f"between {config.temperature:g} and there, and {cache.path} ({manifest.targets.kind}) "
            "is exact at those it stores only. Leave it out, or train on a dense cache."
        )
    for layer, _ in layer_pairs(config, model_config, cache):
        if layer not in manifest.hidden.layers:
            there = ", ".join(map(str, manifest.hidden.layers)) or "none"
            raise CacheMismatch(
                f"--hidden-map: {cache.path} holds hidden layers {there}, not {layer}. Cache again "
                f"with --hidden-layers {layer}."
            )
    if cache.num_rows == 0:
        raise CacheMismatch(f"{cache.path}: its committed shards hold no row to train on")


def _check_sample(config: TrainConfig, cache: Cache) -> None:
    """A sample is unbiased for what is linear in the teacher's probabilities, and only for that."""
    spec = config.loss_spec
    for option, found, only in (
        ("--soft-loss", spec.soft_loss, "forward-kl"),
        ("--tail", spec.tail, "bucket"),
        ("--temperature", spec.temperature, 1.0),
    ):
        if found != only:
            raise CacheMismatch(
                f"{option} {found}: {cache.path} holds a sample of each distribution, which is "
                f"right on average for {option} {only} alone: a drawn class stands for many "
                "others, so no other function of its probability means anything. Leave the option "
                "out, or train on adaptive or topk targets."
            )


def add_adapters(student: Any, rank: int) -> Any:
    """LoRA adapters on every linear layer of the trunk; everything else is frozen."""
    _require_peft()
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return get_peft_model(student, config)


def _require_peft() -> None:
    if find_spec("peft") is None:
        raise ConfigError("adapters need peft: pip install 'teacher-cache[lora]'")
