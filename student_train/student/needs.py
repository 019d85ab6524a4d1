"""Does a cache hold what the loss of a run needs? Asked before any step.

Every refusal names what is missing and the way out.
"""

import logging
from collections.abc import Sequence
from dataclasses import fields, replace

from transformers import PretrainedConfig

from shared.cache import Cache
from shared.errors import CacheMismatch, ConfigError
from shared.tasks import TaskName
from student_train.architecture import num_blocks
from student_train.config import TrainConfig
from student_train.tasks.table import task_named, task_of

log = logging.getLogger(__name__)

FEW_KEPT = 0.8  # at T=2 the best 32 keep 62 % of a strong teacher, at T=4 32 %


def check_metric(config: TrainConfig, held_out: Cache) -> None:
    """Refuses to stop early by a number that evaluation on this cache does not give."""
    metric, manifest = config.early_stopping_metric, held_out.manifest
    if not config.early_stopping_patience:
        return
    if metric == "metric" and not task_of(manifest).has_metric:
        raise CacheMismatch(
            f"--early-stopping-metric metric: {held_out.path} is of {manifest.task}, which has no "
            "metric of its own. Use loss, or kl for the distance to the teacher."
        )
    if metric == "kl" and manifest.targets.numbers:
        raise CacheMismatch(
            f"--early-stopping-metric kl: {held_out.path} holds numbers, not probabilities. Use "
            "loss, which is the mean squared error, or metric."
        )
    if metric == "kl" and not manifest.targets.has_targets:
        raise CacheMismatch(
            f"--early-stopping-metric kl: {held_out.path} holds hard labels only. Use loss, or "
            "hold out rows with the teacher's targets."
        )


def layer_pairs(
    config: TrainConfig, model_config: PretrainedConfig, cache: Cache
) -> tuple[tuple[int, int], ...]:
    """(teacher layer, student layer) for the hidden loss of this student on this cache."""
    if not config.uses_hidden_loss:
        return ()
    return config.layer_pairs(cache.manifest.hidden.layers, num_blocks(model_config))


def check_cache(config: TrainConfig, model_config: PretrainedConfig, cache: Cache) -> None:
    """Refuses a loss that the cache holds nothing for."""
    manifest, task = cache.manifest, task_of(cache.manifest)
    hidden_alone = config.uses_hidden_loss and not manifest.hidden.layers
    if not manifest.targets.has_targets and (config.uses_soft_loss or hidden_alone):
        raise CacheMismatch(
            f"{cache.path}: holds hard labels only (--targets none). Train with --soft-weight 0 "
            "--hard-weight 1, or cache a teacher."
        )
    if config.uses_hidden_loss and not task.has_token_positions:
        raise CacheMismatch(
            f"--hidden-weight: {cache.path} is of {manifest.task}, whose targets are of a row as a "
            "whole; the hidden-state loss is there for tokens only. Leave it out."
        )
    if config.uses_soft_loss and manifest.targets.sampled:
        _check_sample(config, cache)
    if task.outputs.are_numbers:
        _check_regression(config, cache)
    _check_temperatures(config, cache)
    for layer, _ in layer_pairs(config, model_config, cache):
        if layer not in manifest.hidden.layers:
            there = ", ".join(map(str, manifest.hidden.layers)) or "none"
            raise CacheMismatch(
                f"--hidden-map: {cache.path} holds hidden layers {there}, not {layer}. Cache again "
                f"with --hidden-layers {layer}."
            )
    if not (manifest.labelled or config.uses_soft_loss or config.uses_hidden_loss):
        raise CacheMismatch(
            f"--soft-weight 0: {cache.path} has no hard labels, so nothing of it would be learnt. "
            "Leave --soft-weight out, or the cache."
        )
    if cache.num_rows == 0:
        raise CacheMismatch(f"{cache.path}: its committed shards hold no row to train on")


def _check_temperatures(config: TrainConfig, cache: Cache) -> None:
    """Refuses a temperature that targets are not exact at."""
    targets = cache.manifest.targets
    stored = (1.0, *targets.temperatures)
    exact = targets.every_temperature or config.temperature in stored
    if config.uses_soft_loss and not exact:
        listed = ", ".join(f"{temperature:g}" for temperature in stored)
        raise CacheMismatch(
            f"--temperature {config.temperature:g}: {cache.path} is exact at {listed} only. Use "
            f"one of these, or cache again with --temperature {config.temperature:g}."
        )
    if config.temperature_end is not None and not targets.every_temperature:
        raise CacheMismatch(
            f"--temperature-end {config.temperature_end:g}: a schedule passes every temperature "
            f"between {config.temperature:g} and there, and {cache.path} ({targets.kind}) "
            "is exact at those it stores only. Leave it out, or train on a dense cache."
        )


def resolved_weights(config: TrainConfig, task: TaskName, *, labelled: bool) -> TrainConfig:
    """The options with the weights that are the default where a term has nothing to work on.

    Of states there is their own loss alone; where no cache is `labelled` there is no hard loss.
    """
    if task_named(task).outputs.states_alone:
        reason = (
            f"a cache of --task {task} holds hidden states and neither targets nor labels. Leave "
            "it out; the loss is that of --hidden-loss."
        )
        _check_weights(config, ("soft_weight", "hard_weight"), reason)
        hidden_weight = config.hidden_weight or 1.0
        return replace(config, soft_weight=0, hard_weight=0, hidden_weight=hidden_weight)
    if labelled:
        return config
    reason = (
        "no row of these caches has a hard label. Leave it out, or add a cache of labelled rows "
        "with another --cache."
    )
    _check_weights(config, ("hard_weight",), reason)
    if config.label_smoothing:
        raise ConfigError(f"--label-smoothing {config.label_smoothing:g}: {reason}")
    if not (config.uses_soft_loss or config.uses_hidden_loss):
        raise ConfigError(
            "--soft-weight 0: no row of these caches has a hard label, so nothing would be learnt. "
            "Leave it out, or add a cache of labelled rows with another --cache."
        )
    return replace(config, hard_weight=0)


def _check_weights(config: TrainConfig, names: Sequence[str], reason: str) -> None:
    """Refuses a weight that was asked for: another than none and the default."""
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    for name in names:
        value = getattr(config, name)
        if value not in (0, defaults[name]) or getattr(config, f"{name}_end"):
            raise ConfigError(f"--{name.replace('_', '-')} {value:g}: {reason}")


def warn_of_same_rows(config: TrainConfig, caches: Sequence[Cache]) -> None:
    """Two teachers on the same rows, joined: every row is read once for each of them."""
    rows = {cache.manifest.rows_id for cache in caches}
    if len(rows) < len(caches) and not config.ensemble:
        log.warning(
            "--cache: %d caches hold the same rows, each of which is trained on once for each "
            "cache. With --ensemble students learn from the mixture of the teachers instead",
            len(caches) - len(rows) + 1,
        )


def warn_of_lost_mass(config: TrainConfig, cache: Cache) -> None:
    """A student learns how much is cut away of a distribution together, not where it lies."""
    if not (config.uses_soft_loss and cache.manifest.targets.truncated):
        return
    name = "sum_kept_mass" if config.temperature == 1 else f"sum_kept_mass.{config.temperature:g}"
    kept = sum(commit.statistics.get(name, 0.0) for commit in cache.commits)
    share = kept / max(1, sum(commit.positions for commit in cache.commits))
    if share < FEW_KEPT:
        log.warning(
            "%s: its targets keep %.0f %% of the teacher's probability at temperature %g. The hard "
            "loss should go with them; --targets sample, or more entries, keep more",
            *(cache.path, 100 * share, config.temperature),
        )


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


def _check_regression(config: TrainConfig, cache: Cache) -> None:
    """Numbers have one loss, the squared error: nothing of a distribution applies to them."""
    spec = config.loss_spec
    for option, found, allowed in (
        ("--soft-loss", spec.soft_loss, ("forward-kl", "mse")),  # the first is the default
        ("--tail", spec.tail, ("bucket",)),
        ("--temperature", spec.temperature, (1.0,)),
        ("--temperature-end", config.temperature_end, (None,)),
        ("--label-smoothing", spec.label_smoothing, (0.0,)),
    ):
        if found not in allowed:
            raise CacheMismatch(
                f"{option} {found}: {cache.path} is of a regression. Its teacher gave numbers, not "
                "probabilities, and a student learns them by their squared error alone. Leave the "
                "option out."
            )
