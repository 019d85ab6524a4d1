"""Does a student fit a cache? Asked before any step; each refusal names both sides and the way out.

Whether the cache holds what the loss needs is asked in needs.py.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoTokenizer, PretrainedConfig

from shared import compat
from shared.cache import Cache
from shared.errors import CacheMismatch
from shared.fit_rules import Side, Student, some_labels
from shared.models.limits import most_tokens
from shared.models.tokenizer import content_hash, load_cached_tokenizer
from shared.tasks import TASKS, TaskName, is_unnamed
from student_train.student.build import has_head, is_from_scratch
from student_train.student.saved import find_run
from student_train.tasks.table import task_of

log = logging.getLogger(__name__)

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
