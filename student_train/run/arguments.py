"""TrainConfig -> transformers.TrainingArguments: every field is either ours or set by --set."""

import dataclasses
import difflib
import os
from typing import Any

import torch
import yaml
from transformers import TrainingArguments

from shared.errors import ConfigError, Refused
from student_train.config import TrainConfig

_MICRO_BATCH_TOKENS_CPU = 4096  # larger ones leave the CPU's cache and are no faster
_MICRO_BATCH_TOKENS_CUDA = 16384

_TRUE = ("1", "true", "yes", "on", "y", "t")  # as accelerate reads its environment

# Fields that an option of ours decides, or that would break what we promise.
_OWNED = {
    "output_dir": "--out",
    "max_steps": "--max-steps",
    "num_train_epochs": "--epochs",
    "per_device_train_batch_size": "--micro-batch-tokens",
    "gradient_accumulation_steps": "--batch-tokens and --micro-batch-tokens",
    "learning_rate": "--learning-rate",
    "lr_scheduler_type": "--scheduler",
    "warmup_steps": "--warmup-ratio",
    "weight_decay": "--weight-decay",
    "max_grad_norm": "--max-grad-norm",
    "seed": "--seed",
    "bf16": "--dtype",
    "fp16": "--dtype",
    "use_cpu": "--device",
    "eval_strategy": "--eval-every",
    "eval_steps": "--eval-every",
    "save_strategy": "--save-every",
    "save_steps": "--save-every",
    "save_total_limit": "--keep-checkpoints",
    "logging_steps": "--log-every",
    "report_to": "--report-to",
    "metric_for_best_model": "--early-stopping-metric",
    "load_best_model_at_end": "--early-stopping-patience",
    "torch_compile": "--compile",
    "gradient_checkpointing": "--gradient-checkpointing",
    "label_smoothing_factor": "--label-smoothing",
    "ignore_data_skip": "nothing: the order of the data is our own",
    "remove_unused_columns": "nothing: targets are no columns of the model",
    "auto_find_batch_size": "--micro-batch-tokens",
}


def micro_batch_tokens(config: TrainConfig) -> int:
    """Tokens of one forward of one process."""
    if config.micro_batch_tokens != "auto":
        return config.micro_batch_tokens
    auto = _MICRO_BATCH_TOKENS_CUDA if _uses_cuda(config) else _MICRO_BATCH_TOKENS_CPU
    return min(config.recipe.batch_tokens, auto)


def training_arguments(
    config: TrainConfig, *, max_steps: int, accumulation: int
) -> TrainingArguments:
    """The arguments of the Trainer for this run."""
    evaluates = config.validation_cache is not None and config.eval_every > 0
    stops_early = config.early_stopping_patience > 0
    recipe = config.recipe
    save_steps = config.eval_every if stops_early else config.save_every or max_steps
    fields: dict[str, Any] = {
        "output_dir": str(config.out),
        "max_steps": max_steps,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": config.scheduler,
        "warmup_steps": round(recipe.warmup_ratio * max_steps),
        "weight_decay": recipe.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "seed": config.seed,
        "bf16": _mixed_precision(config),
        "use_cpu": not _uses_cuda(config),
        "eval_strategy": "steps" if evaluates else "no",
        "eval_steps": config.eval_every if evaluates else None,
        "save_strategy": "steps",
        "save_steps": save_steps,
        "save_total_limit": config.keep_checkpoints,
        "logging_steps": config.log_every,
        "report_to": config.report_to,
        "load_best_model_at_end": stops_early,
        "metric_for_best_model": config.early_stopping_metric if stops_early else None,
        "greater_is_better": config.early_stopping_metric == "metric" if stops_early else None,
        "ignore_data_skip": True,
        "remove_unused_columns": False,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**fields | _settings(config))


def refuse_what_breaks(config: TrainConfig) -> None:
    """Refuses ways to run that would silently do something else."""
    launched = "WORLD_SIZE" in os.environ or "LOCAL_RANK" in os.environ
    if _uses_cuda(config) and torch.cuda.device_count() > 1 and not launched:
        raise Refused(
            f"{torch.cuda.device_count()} GPUs are visible, but no launcher started this process: "
            "the Trainer would scatter the targets over them wrongly. Start with torchrun "
            "--nproc-per-node N --no-python train-student run ..., or choose one GPU with "
            "CUDA_VISIBLE_DEVICES=0."
        )
    if not _uses_cuda(config) and _wants_fsdp(config):
        raise Refused(
            "FSDP is asked for (--set fsdp, --set fsdp_config or ACCELERATE_USE_FSDP), but this "
            "run trains on the CPU, where the Trainer silently uses DDP instead. Take it away, "
            "train on GPUs, or call fully_shard in a script of your own after "
            "student_train.attach."
        )


def _wants_fsdp(config: TrainConfig) -> bool:
    settings = _settings(config)
    by_environment = os.environ.get("ACCELERATE_USE_FSDP", "false").lower()
    return bool(settings.get("fsdp") or settings.get("fsdp_config")) or by_environment in _TRUE


def _uses_cuda(config: TrainConfig) -> bool:
    return config.device == "auto" and torch.cuda.is_available()


def _mixed_precision(config: TrainConfig) -> bool:
    if config.dtype == "auto":
        return _uses_cuda(config) and torch.cuda.is_bf16_supported()
    return config.dtype == "bfloat16"


def _settings(config: TrainConfig) -> dict[str, Any]:
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    settings: dict[str, Any] = {}
    for pair in config.settings:
        key, equals, text = pair.partition("=")
        key = key.strip().replace("-", "_")
        if not equals:
            raise ConfigError(f"--set {pair}: expected KEY=VALUE")
        if key in _OWNED:
            raise ConfigError(f"--set {key}: use {_OWNED[key]}")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ConfigError(f"--set {key}: TrainingArguments has no such field{hint}")
        try:
            settings[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            problem = " ".join(str(error).split())
            raise ConfigError(f"--set {pair}: {text!r} is no YAML value: {problem}") from None
    return settings
