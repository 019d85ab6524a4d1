"""Which column of a corpus has which role: as --columns says, else by its usual name."""

import logging
from collections.abc import Mapping, Sequence

from shared.errors import CorpusError
from shared.tasks import TASKS
from teacher_cache.config import CaptureConfig
from teacher_cache.corpus.values import LABEL_ROLES

log = logging.getLogger(__name__)

Way = tuple[str, ...]  # the roles of the columns that make a document together


# Role -> names that are taken for it, in this order, where --columns says nothing.
_NAMES = {
    "messages": ("messages", "conversations", "conversation", "dialogue"),
    "text": ("text", "content", "body", "document", "article", "sentence", "sentence1", "premise"),
    "prompt": ("prompt", "question", "instruction", "input"),
    "completion": ("completion", "answer", "response", "output"),
    "source": ("source", "document", "article", "text", "dialogue", "input", "en"),
    "target": ("target", "summary", "summaries", "translation", "highlights", "output"),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "labels"),
    "text_pair": ("text_pair", "sentence2", "hypothesis"),
    "label": ("label", "labels", "intent", "category", "score"),
    "question": ("question", "query"),
    "context": ("context", "passage", "paragraph", "document"),
    "answers": ("answers",),
}


def columns_of(names: Sequence[str], config: CaptureConfig) -> dict[str, str]:
    """The column of each role, of those with these names: as asked, else by its usual names."""
    ways = _fitting(config, _ways(config), names)
    for way in ways:
        chosen = _chosen(way, names, config.column_of)
        if len(chosen) == len(way):
            if way in TASKS[config.task].unlabelled and not config.unlabelled:
                _say_unlabelled(config, [name for name in names if name not in chosen.values()])
            return chosen
    ways = _ways(config)
    wanted = " or ".join(" and ".join(way) for way in ways)
    roles = _roles(ways)
    example = "text" if "text" in roles else roles[0]
    raise CorpusError(
        f"{config.corpus}: --task {config.task} reads {wanted}, and there are the columns "
        f"{_listed(names)}. Say which is which: --columns {example}={names[0]}"
    )


def _ways(config: CaptureConfig) -> tuple[Way, ...]:
    """The roles a document may consist of; those without labels last, and where a teacher is."""
    task = TASKS[config.task]
    if config.unlabelled:
        return task.unlabelled
    ways = task.sources if config.generate else task.ways
    return ways + task.unlabelled if config.uses_teacher else ways


def _fitting(config: CaptureConfig, ways: tuple[Way, ...], names: Sequence[str]) -> tuple[Way, ...]:
    """The ways that have every role asked for; what --columns cannot mean is refused."""
    asked = config.column_of
    unknown = sorted(set(asked) - set(_roles(ways)))
    if unknown:
        listed = ", ".join(_roles(ways))
        raise CorpusError(
            f"--columns {unknown[0]}=...: --task {config.task} reads the roles {listed}"
        )
    for column in asked.values():
        if column not in names:
            raise CorpusError(f"{config.corpus}: no column {column!r}; there are {_listed(names)}")
    fitting = tuple(way for way in ways if set(asked) <= set(way))
    if not fitting:
        kinds = ", or ".join(" and ".join(way) for way in ways)
        raise CorpusError(
            f"--columns {' '.join(asked)}: a document is {kinds}, not several of them"
        )
    return fitting


def _roles(ways: tuple[Way, ...]) -> list[str]:
    return list(dict.fromkeys(role for way in ways for role in way))


def _chosen(way: Way, names: Sequence[str], asked: Mapping[str, str]) -> dict[str, str]:
    """The columns of these roles, as far as there are any."""
    free = [name for name in names if name not in asked.values()]
    found = {role: asked.get(role) or _usual(role, free) for role in way}
    return {role: column for role, column in found.items() if column is not None}


def _say_unlabelled(config: CaptureConfig, others: Sequence[str]) -> None:
    """A column of labels may only have a name that nobody guesses."""
    role = next(role for role in _roles(TASKS[config.task].ways) if role in LABEL_ROLES)
    advice = f" If it is one of {_listed(others)}: --columns {role}={others[0]}." if others else ""
    log.warning(
        "%s: no column of labels, so students learn from what the teacher says alone.%s",
        config.corpus,
        advice,
    )


def _usual(role: str, names: Sequence[str]) -> str | None:
    return next((name for name in _NAMES[role] if name in names), None)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names)
