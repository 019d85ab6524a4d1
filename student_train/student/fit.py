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

from shared.cache import Cache
from shared.errors import CacheMismatch, ConfigError
from shared.models.limits import most_tokens
from shared.models.tokenizer import content_hash, load_cached_tokenizer
from shared.tasks import TASKS, TaskName
from student_train.architecture import num_blocks
from student_train.config import TrainConfig
from student_train.student.build import has_head, is_from_scratch
from student_train.student.encoder_decoder import (
    check_decoder_start,
    check_lengths,
)
from student_train.tasks.labels import PROBLEM_TYPES, is_unnamed

log = logging.getLogger(__name__)

FEW_KEPT = 0.8  # at T=2 the best 32 keep 62 % of a strong teacher, at T=4 32 %
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")


def check_fit(name: str, config: PretrainedConfig, cache: Cache) -> None:
    """Refuses a student that the targets of the cache do not fit, naming both sides."""
    text_config = config.get_text_config()
    if TASKS[cache.manifest.task].target_space == "labels":
        _check_labels(name, config, cache)
    elif TASKS[cache.manifest.task].target_space == "tokens":
        _check_reads(name, config, cache)
    else:
        _check_vocabulary(name, text_config, cache)
    longest = int(cache.row_tokens.max(initial=0))
    places = _places(config, cache.manifest.task, longest)
    if cache.manifest.layout == "pair":
        _check_pair(name, config, cache, places)
    elif places is not None and longest > places:
        raise CacheMismatch(
            f"{name}: takes {places:,} positions, but the longest row of {cache.path} has "
            f"{longest:,} tokens. Cache again with --max-length {places}, or use another student."
        )
    _check_tokenizer(name, cache)


def _check_pair(name: str, config: PretrainedConfig, cache: Cache, places: int | None) -> None:
    auto: Any = transformers.AutoModelForSeq2SeqLM
    if type(config) not in auto._model_mapping:
        raise CacheMismatch(
            f"{name}: a model of type {config.model_type} is no encoder-decoder, which "
            f"{cache.path} was cached for. Use a T5, BART, Marian or the like."
        )
    if places is not None:
        check_lengths(name, places, cache)
    if not is_from_scratch(name):
        check_decoder_start(name, cache)


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


def _check_vocabulary(name: str, text_config: PretrainedConfig, cache: Cache) -> None:
    classes = cache.manifest.targets.num_classes
    width = getattr(text_config, "vocab_size", None)
    if width is not None and width < classes:
        raise CacheMismatch(
            f"{name}: its head has {width:,} classes, but {cache.path} was cached over "
            f"{classes:,}. "
            "Use a student with the teacher's tokenizer (a wider head is fine), or cache a teacher "
            "with the student's."
        )


def _check_reads(name: str, config: PretrainedConfig, cache: Cache) -> None:
    """The student can be one for the task, and knows every token."""
    manifest, task = cache.manifest, cache.manifest.task
    auto: Any = getattr(transformers, TASKS[task].auto_class)
    if type(config) not in auto._model_mapping:
        raise CacheMismatch(
            f"{name}: transformers has no model of type {config.model_type} for {task}, the task "
            f"of {cache.path}. Use a student that {TASKS[task].auto_class} can load."
        )
    tokens = getattr(config.get_text_config(), "vocab_size", None)
    if tokens is not None and tokens < manifest.tokenizer.num_ids:
        raise CacheMismatch(
            f"{name}: it knows {tokens:,} tokens, but the rows of {cache.path} are made of "
            f"{manifest.tokenizer.num_ids:,}. Use a student with the teacher's tokenizer."
        )


def _check_labels(name: str, config: PretrainedConfig, cache: Cache) -> None:
    """The classes of a student that has a head for the task are those of the cache, in order."""
    manifest, task = cache.manifest, cache.manifest.task
    _check_reads(name, config, cache)
    if not has_head(config, task) or is_from_scratch(name):
        return  # a new head takes the classes of the cache
    wanted = PROBLEM_TYPES[manifest.problem_type]
    if TASKS[task].layout == "row" and config.problem_type not in (None, wanted):
        raise CacheMismatch(
            f"{name}: its head is for {config.problem_type}, but {cache.path} is of {wanted}. Save "
            "its body alone (AutoModel.from_pretrained(...).save_pretrained(...)) for a student "
            "with a new head, or cache with another --problem-type."
        )
    own, cached = [config.id2label[i] for i in range(config.num_labels)], list(manifest.labels)
    advice = (
        "Its head was trained for other labels. Save its body alone "
        "(AutoModel.from_pretrained(...).save_pretrained(...)) for a student with a new head, or "
        "cache a teacher with the same labels."
    )
    if len(own) != len(cached):
        raise CacheMismatch(
            f"{name}: its head has {len(own):,} labels ({_some(own)}), but {cache.path} was cached "
            f"over {len(cached):,} ({_some(cached)}). {advice}"
        )
    if is_unnamed(own) or is_unnamed(cached):
        if own != cached:
            log.warning(
                "%s: its labels are %s, those of %s %s: taken to be the same, in this order",
                *(name, _some(own), cache.path, _some(cached)),
            )
        return
    for index, (ours, theirs) in _differing(own, cached):
        raise CacheMismatch(
            f"{name}: its label {index} is {ours!r}, but in {cache.path} label {index} is "
            f"{theirs!r}. {advice}"
        )


def _differing(own: Sequence[str], cached: Sequence[str]) -> list[tuple[int, tuple[str, str]]]:
    pairs = enumerate(zip(own, cached, strict=True))
    return [(index, pair) for index, pair in pairs if pair[0] != pair[1]]


def _some(labels: list[str]) -> str:
    return ", ".join(labels[:5]) + (", ..." if len(labels) > 5 else "")


def check_labelled(cache: Cache, option: str = "") -> None:
    """Refuses to judge a student by rows of which nobody knows what would be right."""
    if not cache.manifest.labelled:
        raise CacheMismatch(
            f"{option}{cache.path}: its rows have no hard labels, and every metric needs them. "
            "Name a cache of labelled rows; a student may well train on this one."
        )


def check_same_labels(cache: Cache, held_out: Cache) -> None:
    """Refuses a held-out cache whose classes are not those that the student learns."""
    check_labelled(held_out, "--validation-cache ")
    ours, theirs = cache.manifest, held_out.manifest
    advice = "Hold out rows of the same kind, with cache-teacher run --like."
    if ours.task != theirs.task:
        raise CacheMismatch(
            f"--validation-cache {held_out.path}: its task is {theirs.task}, but that of "
            f"{cache.path} is {ours.task}. {advice}"
        )
    if ours.problem_type != theirs.problem_type:
        raise CacheMismatch(
            f"--validation-cache {held_out.path}: its problem type is {theirs.problem_type}, but "
            f"that of {cache.path} is {ours.problem_type}. {advice}"
        )
    if len(ours.labels) != len(theirs.labels):
        raise CacheMismatch(
            f"--validation-cache {held_out.path}: it has {len(theirs.labels):,} labels, but "
            f"{cache.path} has {len(ours.labels):,}. {advice}"
        )
    for index, (one, other) in _differing(ours.labels, theirs.labels):
        raise CacheMismatch(
            f"--validation-cache {held_out.path}: its label {index} is {other!r}, but that of "
            f"{cache.path} is {one!r}. {advice}"
        )


def check_metric(config: TrainConfig, held_out: Cache) -> None:
    """Refuses to stop early by a number that evaluation on this cache does not give."""
    metric, manifest = config.early_stopping_metric, held_out.manifest
    if not config.early_stopping_patience:
        return
    if metric == "metric" and TASKS[manifest.task].target_space == "vocabulary":
        raise CacheMismatch(
            f"--early-stopping-metric metric: {held_out.path} is of {manifest.task}, which has no "
            "metric of its own. Use loss, or kl for the distance to the teacher."
        )
    if metric == "kl" and manifest.targets.kind == "values":
        raise CacheMismatch(
            f"--early-stopping-metric kl: {held_out.path} holds numbers, not probabilities. Use "
            "loss, which is the mean squared error, or metric."
        )
    if metric == "kl" and manifest.targets.kind == "none":
        raise CacheMismatch(
            f"--early-stopping-metric kl: {held_out.path} holds hard labels only. Use loss, or "
            "hold out rows with the teacher's targets."
        )


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
    manifest = cache.manifest
    hidden_alone = config.uses_hidden_loss and not manifest.hidden.layers
    if manifest.targets.kind == "none" and (config.uses_soft_loss or hidden_alone):
        raise CacheMismatch(
            f"{cache.path}: holds hard labels only (--targets none). Train with --soft-weight 0 "
            "--hard-weight 1, or cache a teacher."
        )
    if config.uses_hidden_loss and manifest.layout in ("row", "outputs", "window"):
        raise CacheMismatch(
            f"--hidden-weight: {cache.path} is of {manifest.task}, whose targets are of a row as a "
            "whole; the hidden-state loss is there for tokens only. Leave it out."
        )
    if config.uses_soft_loss and manifest.targets.kind == "sample":
        _check_sample(config, cache)
    if manifest.problem_type == "regression":
        _check_regression(config, cache)
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
    if not (manifest.labelled or config.uses_soft_loss or config.uses_hidden_loss):
        raise CacheMismatch(
            f"--soft-weight 0: {cache.path} has no hard labels, so nothing of it would be learnt. "
            "Leave --soft-weight out, or the cache."
        )
    if cache.num_rows == 0:
        raise CacheMismatch(f"{cache.path}: its committed shards hold no row to train on")


def resolved_weights(config: TrainConfig, task: TaskName, *, labelled: bool) -> TrainConfig:
    """The options with the weights that are the default where a term has nothing to work on.

    Of states there is their own loss alone; where no cache is `labelled` there is no hard loss.
    """
    if TASKS[task].target_space == "states":
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
    if not config.uses_soft_loss or cache.manifest.targets.kind not in ("topk", "adaptive"):
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
