"""Does a student fit a cache, and does the cache hold what the loss needs? Asked before any step.

Every refusal names both sides and the way out.
"""

import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PretrainedConfig

from shared import compat
from shared.cache import Cache
from shared.errors import CacheMismatch, ConfigError
from shared.fit_rules import Side, Student, some_labels
from shared.models.limits import most_tokens
from shared.models.tokenizer import content_hash, load_cached_tokenizer
from shared.tasks import TASKS, TaskName, is_unnamed
from student_train.architecture import num_blocks
from student_train.config import TrainConfig
from student_train.student.build import has_head, is_from_scratch
from student_train.student.saved import find_run
from student_train.tasks.table import task_named, task_of

log = logging.getLogger(__name__)

FEW_KEPT = 0.8  # at T=2 the best 32 keep 62 % of a strong teacher, at T=4 32 %
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")


def check_fit(name: str, config: PretrainedConfig, cache: Cache) -> None:
    """Refuses a student that the targets of the cache do not fit, naming both sides."""
    compat.check_student(_known_of(name, config, cache), Side(str(cache.path), cache.manifest))
    longest = int(cache.row_tokens.max(initial=0))
    places = _places(config, cache.manifest.task, longest)
    if places is not None:
        task_of(cache.manifest).check_lengths(name, places, cache)


def _known_of(name: str, config: PretrainedConfig, cache: Cache) -> Student:
    """What the files of a student say of it, next to the cache it is for."""
    manifest, tasks = cache.manifest, _tasks_of(config)
    task = task_of(manifest)
    kept = not is_from_scratch(name)
    keeps_head = kept and manifest.task in tasks and has_head(config, manifest.task)
    labels = task.labels_of_head(config) if keeps_head else None
    if labels is not None:
        _warn_of_unnamed(name, labels, cache)
    tokenizer_hash, differing_tokens = _its_tokenizer(name, cache)
    return Student(
        name=name,
        model_type=config.model_type,
        tasks=tasks,
        num_tokens=getattr(config.get_text_config(), "vocab_size", None),
        tokenizer_hash=tokenizer_hash,
        differing_tokens=differing_tokens,
        labels=labels,
        problem_type=config.problem_type if keeps_head else None,
        decoder_start=task.decoder_start(name) if kept else None,
    )


def _tasks_of(config: PretrainedConfig) -> frozenset[TaskName]:
    """The tasks that transformers has a model of this type for."""

    def loads(auto: Any) -> bool:
        return type(config) in auto._model_mapping

    classes = ((name, getattr(transformers, task.auto_class)) for name, task in TASKS.items())
    return frozenset(name for name, auto in classes if loads(auto))


def _warn_of_unnamed(name: str, own: Sequence[str], cache: Cache) -> None:
    cached = cache.manifest.labels
    alike = len(own) == len(cached) and tuple(own) != cached
    if alike and (is_unnamed(own) or is_unnamed(cached)):
        log.warning(
            "%s: its labels are %s, those of %s %s: taken to be the same, in this order",
            *(name, some_labels(own), cache.path, some_labels(cached)),
        )


def _places(config: PretrainedConfig, task: TaskName, longest: int) -> int | None:
    """Tokens that a row may have; a model is built, without weights, where that may decide."""
    text_config = config.get_text_config()
    places = getattr(text_config, "max_position_embeddings", None)
    padding = getattr(text_config, "pad_token_id", None)
    if places is None or padding is None or not places - padding - 1 < longest <= places:
        return places
    auto: Any = getattr(transformers, TASKS[task].auto_class)
    if type(config) not in auto._model_mapping:
        return places
    with torch.device("meta"):
        most = most_tokens(auto.from_config(config))
    return places if most is None else most


def check_judges(cache: Cache) -> None:
    """Refuses a cache that no student can be judged by: without labels, or without any row."""
    compat.check_labelled(Side(str(cache.path), cache.manifest))
    _check_has_rows(cache)


def check_held_out(cache: Cache, held_out: Cache) -> None:
    """Refuses a held-out cache that asks of a student something else than it learns."""
    compat.check("hold out", *(Side(str(each.path), each.manifest) for each in (cache, held_out)))
    _check_has_rows(held_out, "--validation-cache ")


def _check_has_rows(cache: Cache, option: str = "") -> None:
    if not cache.row_positions.any():
        raise CacheMismatch(
            f"{option}{cache.path}: its {len(cache.commits):,} committed shards hold "
            f"{cache.num_rows:,} rows and no position to evaluate a student on. Name a cache with "
            "rows: of other documents, or of all shards where some are missing."
        )


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


def _its_tokenizer(name: str, cache: Cache) -> tuple[str | None, str]:
    """The content hash of a student's tokenizer, and where its tokens are not those of the cache.

    None for a student without a tokenizer of its own: it takes the cache's.
    """
    try:
        tokenizer = _own_tokenizer(name)
    except (OSError, ValueError):
        log.warning("%s: no tokenizer could be loaded, the cache's is used", name)
        return None, ""
    if tokenizer is None:
        return None, ""
    found = content_hash(tokenizer)
    if found == cache.manifest.tokenizer.hash:
        return found, ""
    return found, _token_differences(tokenizer.get_vocab(), cache)


def _own_tokenizer(name: str) -> Any:
    """The tokenizer a student was made with: beside its weights, or that of the run it is from.

    A checkpoint has none beside it. None where nothing says what the student's ids mean.
    """
    folder = Path(name)
    if not folder.is_dir() or _has_tokenizer(folder):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    run = None if is_from_scratch(name) else find_run(folder)
    if run is None:
        return None
    if _has_tokenizer(run.folder):
        return AutoTokenizer.from_pretrained(run.folder, trust_remote_code=False)
    learnt = run.open_cache()
    return None if learnt is None else load_cached_tokenizer(learnt.storage)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).exists() for file in _TOKENIZER_FILES)


def _token_differences(vocabulary: dict[str, int], cache: Cache) -> str:
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
    """Of what is cut away a student learns only how much it is together, not where it lies."""
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
