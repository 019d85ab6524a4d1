"""What the labels of a job are: classes, yes or no for each, or numbers, and their names."""

import json
import logging
from pathlib import Path

from shared.errors import CacheMismatch, ConfigError, CorpusError
from shared.tasks import ProblemType
from teacher_cache.config import CaptureConfig
from teacher_cache.corpus.corpus import Corpus
from teacher_cache.engines.base import Engine
from teacher_cache.engines.loading import labels_of, problem_type_of
from teacher_cache.tasks.base import TeacherTask
from teacher_cache.tasks.table import TEACHER_TASKS

log = logging.getLogger(__name__)


def problem_type_for(config: CaptureConfig, corpus: Corpus) -> ProblemType:
    """As asked, else as the teacher's config says, else as the column of labels looks."""
    if not TEACHER_TASKS[config.task].has_problem_types:
        return "single_label"
    its: ProblemType | None = None
    if config.teacher is not None and config.uses_teacher:
        its = problem_type_of(config.teacher, config.revision)
    asked = config.asked_problem_type
    if asked is None:
        return its or corpus.problem_type
    if its not in (None, asked):
        log.warning(
            "--problem-type %s: the config of %s says %s; its logits are read as asked for",
            *(asked, config.teacher, its),
        )
    return asked


def label_names(
    config: CaptureConfig,
    corpus: Corpus,
    task: TeacherTask,
    engine: Engine | None,
    known: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """The names of the classes: as asked, else the teacher's, else those in the corpus.

    Where the teacher has none, those `known` from the cache of --like come before the corpus's,
    which may lack some, or all.
    """
    if not task.names_classes:
        return ()
    asked = () if config.labels is None else read_labels(config.labels)
    its: tuple[str, ...] = ()
    if engine is not None:
        its = engine.labels
    elif config.teacher is not None and config.uses_teacher:  # `plan` reads no weights
        its = labels_of(config.teacher, config.revision)
    if asked and its and asked != its:
        first = next((pair for pair in zip(asked, its, strict=False) if pair[0] != pair[1]), None)
        raise CacheMismatch(
            f"--labels {config.labels}: {len(asked)} names, where {config.teacher} has {len(its)}"
            + (f"; the first that differ are {first[0]!r} and {first[1]!r}" if first else "")
            + ". Classes are the teacher's: leave --labels out, or set its id2label."
        )
    if its == tuple(f"LABEL_{number}" for number in range(len(its))):
        # The teacher was given no names, the corpus was.
        named = (known, corpus.class_names)
        its = next((names for names in named if len(names) == len(its) and names != its), its)
    labels = asked or its or known or corpus.labels(task.problem_type)
    if len(labels) < task.fewest_labels:
        raise CorpusError(
            f"{config.corpus}: {len(labels)} different labels, expected at least "
            f"{task.fewest_labels}"
        )
    return labels


def read_labels(file: Path) -> tuple[str, ...]:
    """A JSON list of names."""
    try:
        names = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--labels {file}: cannot be read as JSON: {error}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"--labels {file}: expected a list of names")
    if len(set(names)) != len(names):
        raise ConfigError(f"--labels {file}: a name appears twice")
    return tuple(names)
