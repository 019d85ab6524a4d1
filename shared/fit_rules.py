"""The rules of the table of compat.py: what does not fit, where two things need not be equal.

A rule says it in a sentence that names both sides. Those of a student say what to do as well, as
that depends on what was found; of two caches the relation gives the advice, or the rule does.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from shared.format.manifest import Manifest
from shared.tasks import PROBLEM_TYPES, TASKS, TaskName, is_unnamed

_SHOWN_LABELS = 5
NO_LABELS = "its rows have no hard labels, and every metric needs them"
NAME_LABELLED = "Name a cache of labelled rows; a student may well train on this one."


@dataclass(frozen=True, slots=True)
class Side:
    """One of two caches: its manifest, and what a message calls it.

    `layers` are those whose hidden states a loss reads.
    """

    name: str
    manifest: Manifest
    layers: Sequence[int] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """What is known of a student before it is built; None where nothing says, or nothing is fixed.

    `tasks` are those that transformers has a model of this type for; `num_tokens` is the size of
    its vocabulary, and the width of a head over it. `labels` and `problem_type` are those of a head
    that is kept, `decoder_start` is that of weights that are kept. `differing_tokens` says where
    its tokenizer and that of the cache differ.
    """

    name: str
    model_type: str
    tasks: frozenset[TaskName]
    num_tokens: int | None
    tokenizer_hash: str | None = None
    differing_tokens: str = ""
    labels: tuple[str, ...] | None = None
    problem_type: str | None = None  # as transformers calls it
    decoder_start: int | None = None


@dataclass(frozen=True, slots=True)
class Rule:
    """What a relation asks of a field of two caches.

    `find` says what does not fit, or None; without it the field must be equal. A rule holds only
    `when` that is true; `advice` and `whole`, the sentences around what was found, stand in for
    those of the relation.
    """

    find: Callable[[Side, Side], str | None] | None = None
    when: Callable[[Side, Side], bool] = lambda ours, theirs: True
    advice: str = ""
    whole: str = ""


StudentRule: TypeAlias = Callable[[Student, Side], str | None]  # what does not fit, and the advice

SAME, FREE = Rule(), None


# ---- Rules of two caches


def _of_states(ours: Side, theirs: Side) -> bool:
    """Elsewhere no held-out state is looked at."""
    return TASKS[ours.manifest.task].keeps_states


def _ends_in_eos(ours: Side, theirs: Side) -> bool:
    """Whether the end of a text is a token to predict; other rows end as the tokenizer has it."""
    return TASKS[ours.manifest.task].labels == "next"


def _channels(ours: Side, theirs: Side) -> str | None:
    for layer in ours.layers:
        left, right = (side.manifest.hidden.width_of(layer) for side in (ours, theirs))
        if left != right:
            return (
                f"hidden layer {layer} has {left} channels in {ours.name} and {right} in "
                f"{theirs.name} (0: not stored), and only states of equal width have a mean"
            )
    return None


def _positions(ours: Side, theirs: Side) -> str | None:
    every, other_every = ours.manifest.hidden.every, theirs.manifest.hidden.every
    if not ours.layers or every == other_every:
        return None
    return (
        f"which positions have hidden states, hidden_every, is {every} in {ours.name} and "
        f"{other_every} in {theirs.name}, and only states of the same positions have a mean"
    )


def _deepest(ours: Side, theirs: Side) -> str | None:
    (one, width), (other, other_width) = (
        (side.manifest.hidden.deepest, side.manifest.hidden.width_of(side.manifest.hidden.deepest))
        for side in (ours, theirs)
    )
    if (one, width) == (other, other_width):
        return None
    return (
        f"its deepest hidden layer is {other} with {other_width} channels, but that of {ours.name} "
        f"is {one} with {width}"
    )


def _labels(ours: Side, theirs: Side) -> str | None:
    own, others = ours.manifest.labels, theirs.manifest.labels
    if len(own) != len(others):
        return f"it has {len(others):,} labels, but {ours.name} has {len(own):,}"
    for index, one, other in _differing(own, others):
        return f"its label {index} is {other!r}, but that of {ours.name} is {one!r}"
    return None


def _unlabelled(ours: Side, theirs: Side) -> str | None:
    return None if theirs.manifest.labelled else NO_LABELS


def _differing(own: Sequence[str], others: Sequence[str]) -> Iterator[tuple[int, str, str]]:
    for index, (one, other) in enumerate(zip(own, others, strict=True)):
        if one != other:
            yield index, one, other


_MIXED = "--ensemble: {problem}. {advice}"
_LESS = "Leave --hidden-weight out, or cache "
LABELLED = Rule(_unlabelled, advice=NAME_LABELLED)
LABELS = Rule(_labels)
DEEPEST = Rule(_deepest, when=_of_states)
STATES = Rule(when=_of_states)
EOS = Rule(when=_ends_in_eos)
WIDTHS = Rule(_channels, whole=_MIXED, advice=_LESS + "the layer with teachers of equal width.")
EVERY = Rule(_positions, whole=_MIXED, advice=_LESS + "both with the same --hidden-every.")


# ---- Rules of a student and its cache


def has_model(student: Student, cache: Side) -> str | None:
    """A student over a vocabulary is loaded as what it is; what fails then names its class."""
    name = cache.manifest.task
    task = TASKS[name]
    if name in student.tasks:
        return None
    if cache.manifest.layout.has_decoder:
        return (
            f"a model of type {student.model_type} is no encoder-decoder, which {cache.name} was "
            "cached for. Use a T5, BART, Marian or the like."
        )
    if not task.over_vocabulary:
        return (
            f"transformers has no model of type {student.model_type} for {name}, the task of "
            f"{cache.name}. Use a student that {task.auto_class} can load."
        )
    return None


def knows_tokens(student: Student, cache: Side) -> str | None:
    task, num_ids = TASKS[cache.manifest.task], cache.manifest.tokenizer.num_ids
    if task.over_vocabulary or (student.num_tokens or num_ids) >= num_ids:
        return None  # over a vocabulary the classes are compared
    return (
        f"it knows {student.num_tokens:,} tokens, but the rows of {cache.name} are made of "
        f"{num_ids:,}. Use a student with the teacher's tokenizer."
    )


def is_wide_enough(student: Student, cache: Side) -> str | None:
    task, classes = TASKS[cache.manifest.task], cache.manifest.targets.num_classes
    if not task.over_vocabulary or (student.num_tokens or classes) >= classes:
        return None
    return (
        f"its head has {student.num_tokens:,} classes, but {cache.name} was cached over "
        f"{classes:,}. Use a student with the teacher's tokenizer (a wider head is fine), or cache "
        "a teacher with the student's."
    )


def has_problem(student: Student, cache: Side) -> str | None:
    wanted = PROBLEM_TYPES[cache.manifest.problem_type]
    has_type = TASKS[cache.manifest.task].has_problem_type
    if not has_type or student.problem_type in (None, wanted):
        return None
    return (
        f"its head is for {student.problem_type}, but {cache.name} is of {wanted}. Save its body "
        "alone (AutoModel.from_pretrained(...).save_pretrained(...)) for a student with a new "
        "head, or cache with another --problem-type."
    )


def has_labels(student: Student, cache: Side) -> str | None:
    """Labels without names are taken for those of the cache; a new head has none of its own."""
    own, cached = student.labels, cache.manifest.labels
    if own is None:
        return None
    advice = (
        "Its head was trained for other labels. Save its body alone "
        "(AutoModel.from_pretrained(...).save_pretrained(...)) for a student with a new head, or "
        "cache a teacher with the same labels."
    )
    if len(own) != len(cached):
        return (
            f"its head has {len(own):,} labels ({some_labels(own)}), but {cache.name} was cached "
            f"over {len(cached):,} ({some_labels(cached)}). {advice}"
        )
    if is_unnamed(own) or is_unnamed(cached):
        return None
    for index, one, other in _differing(own, cached):
        return (
            f"its label {index} is {one!r}, but in {cache.name} label {index} is {other!r}. "
            f"{advice}"
        )
    return None


def some_labels(labels: Sequence[str]) -> str:
    """The first few names, for a message."""
    dots = ", ..." if len(labels) > _SHOWN_LABELS else ""
    return ", ".join(labels[:_SHOWN_LABELS]) + dots


def reads_tokens(student: Student, cache: Side) -> str | None:
    found, cached = student.tokenizer_hash, cache.manifest.tokenizer.hash
    if found in (None, cached):
        return None
    return (
        f"its tokenizer is not the one of {cache.name} (content hash {found[:12]}, cached "
        f"{cached[:12]}). {student.differing_tokens}The same ids would mean other tokens: use a "
        "student with the teacher's tokenizer, or remove the tokenizer files from a student that "
        "is to learn this one from scratch."
    )


def starts_alike(student: Student, cache: Side) -> str | None:
    own, cached = student.decoder_start, cache.manifest.preprocessing.decoder_start
    if not cache.manifest.layout.has_decoder or own in (None, cached):
        return None
    return (
        f"its decoder starts from token {own}, but the targets of {cache.name} start from "
        f"{cached}. Cache again with a teacher that starts as the student does, or, with hard "
        f"labels only, with --decoder-start {own}."
    )
