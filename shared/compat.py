"""What must fit: one table of every manifest field, and what each relation asks of it.

Two caches, or a cache and what is asked of it, stand in one of these relations:

resume    a capture goes on in the folder of a cache; `theirs` is what is asked for now
like      new documents are captured for a cache that exists; `theirs` is what is asked for now
join      a student trains on several caches, one after another
ensemble  a student trains on the mixture of several teachers on the same rows
hold out  `theirs` judges a student that learns from `ours`
student   a student, `ours`, learns from a cache or is judged by it

A cell of the table is `SAME`, `FREE` (the two may differ), or a rule of its own. A new field of the
manifest needs a line here: say of each relation what goes wrong where two caches differ in it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from shared.errors import CacheMismatch
from shared.fit_rules import (
    DEEPEST,
    EOS,
    EVERY,
    FREE,
    LABELLED,
    LABELS,
    NAME_LABELLED,
    NO_LABELS,
    SAME,
    STATES,
    WIDTHS,
    Rule,
    Side,
    Student,
    StudentRule,
    has_labels,
    has_model,
    has_problem,
    is_wide_enough,
    knows_tokens,
    reads_tokens,
    starts_alike,
)

Relation = Literal["resume", "like", "join", "ensemble", "hold out"]


def check(relation: Relation, ours: Side, theirs: Side) -> None:
    """Refuses two caches that do not stand in this relation, naming what differs and the way out.

    Where options are compared, all that differ are named; of two caches the first field is enough.
    """
    frame = _FRAMES[relation]
    found = dict(_problems(relation, ours, theirs))
    if not found:
        return
    problem, rule = next(iter(found.items()))
    if frame.names_all:
        problem = "; ".join(sorted(found))
    whole, advice = rule.whole or frame.whole, rule.advice or frame.advice
    raise CacheMismatch(
        whole.format(ours=ours.name, theirs=theirs.name, problem=problem, advice=advice)
    )


def check_student(student: Student, cache: Side) -> None:
    """Refuses a student that cannot learn from a cache, or be judged by it."""
    for field in FIELDS:
        problem = None if field.student is FREE else field.student(student, cache)
        if problem is not None:
            raise CacheMismatch(f"{student.name}: {problem}")


def check_labelled(cache: Side) -> None:
    """Refuses to judge a student by rows of which nobody knows what would be right."""
    if not cache.manifest.labelled:
        raise CacheMismatch(f"{cache.name}: {NO_LABELS}. {NAME_LABELLED}")


@dataclass(frozen=True, slots=True)
class _Frame:
    """The sentences of a refusal: the whole of it, and what stands for a field that is not equal.

    `path` is where a field stands in the manifest, `name` what a user knows it by.
    """

    whole: str
    unequal: str
    advice: str
    names_all: bool = False


_ASKED = "{path}: the cache has {left!r}, asked for {right!r}"
_BOTH = "{name} is {left!r} in the first and {right!r} in the second"
_FRAMES: Mapping[Relation, _Frame] = {
    "resume": _Frame(
        "{ours}: this folder holds another cache. {problem}. {advice}",
        _ASKED,
        "Choose another --out, or ask for the same thing to go on with this one.",
        names_all=True,
    ),
    "like": _Frame(
        "--like {ours}: the new documents would not train together with it. {problem}. {advice}",
        _ASKED,
        "Ask for the same as that cache, or leave --like out.",
        names_all=True,
    ),
    "join": _Frame(
        "{ours} and {theirs} do not train together: {problem}. {advice}",
        _BOTH,
        "Capture the new documents with cache-teacher run --like the first.",
    ),
    "ensemble": _Frame(
        "--ensemble: {ours} and {theirs} are no two teachers on the same rows: {problem}. {advice}",
        _BOTH,
        "Capture both teachers with the same corpus, tokenizer and options.",
    ),
    "hold out": _Frame(
        "--validation-cache {theirs}: {problem}. {advice}",
        "its {short_name} is {right}, but that of {ours} is {left}",
        "Hold out rows of the same kind, with cache-teacher run --like.",
    ),
}


def _problems(relation: Relation, ours: Side, theirs: Side) -> Iterator[tuple[str, Rule]]:
    """What does not fit, each with the rule that found it, in the order of the table."""
    frame, fields = _FRAMES[relation], (asdict(ours.manifest), asdict(theirs.manifest))
    for field in FIELDS:
        rule = field.rule(relation)
        if rule is FREE or not rule.when(ours, theirs):
            continue
        if rule.find is not None:
            problem = rule.find(ours, theirs)
        else:
            path, left, right = _values(field.path, *fields)
            text = frame.unequal.format(
                path=path.removeprefix("plan.asked_"),
                name=field.name,
                short_name=field.short_name,
                ours=ours.name,
                left=left,
                right=right,
            )
            problem = None if left == right else text
        if problem is not None:
            yield problem, rule


def _values(path: str, ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """A field of two manifests and its path; that of what it is part of, where one has none."""
    left: Any = ours
    right: Any = theirs
    gone: list[str] = []
    for name in path.split("."):
        left, right = left[name], right[name]
        gone.append(name)
        if left is None or right is None:
            break
    return ".".join(gone), left, right


# ---- The table


@dataclass(frozen=True, slots=True)
class Field:
    """A field of the manifest by its path, and what each relation asks of it."""

    path: str
    resume: Rule | None
    like: Rule | None
    join: Rule | None
    ensemble: Rule | None
    hold_out: Rule | None
    student: StudentRule | None = FREE

    @property
    def name(self) -> str:
        """What a user knows it by."""
        return _NAMES.get(self.path, self.path)

    @property
    def short_name(self) -> str:
        """The name behind *its*."""
        return _SHORT_NAMES.get(self.path, self.name.removeprefix("the "))

    def rule(self, relation: Relation) -> Rule | None:
        """What a relation of two caches asks of it."""
        match relation:
            case "resume":
                return self.resume
            case "like":
                return self.like
            case "join":
                return self.join
            case "ensemble":
                return self.ensemble
            case "hold out":
                return self.hold_out


_NAMES = {
    "task": "the task",
    "labelled": "whether rows have hard labels",
    "problem_type": "the problem type",
    "labels": "the names of the classes",
    "targets.kind": "the kind of targets",
    "targets.num_classes": "the number of classes",
    "targets.top_k": "top_k",
    "targets.temperatures": "the stored temperatures",
    "hidden.layers": "the hidden layers",
    "hidden.widths": "the widths of the hidden layers",
    "hidden.every": "which positions have hidden states, hidden_every,",
    "hidden.pooling": "how the states of a row become one, pooling,",
    "preprocessing.decoder_start": "the token that decoders start from",
    "tokenizer.hash": "the tokenizer's content hash",
    "tokenizer.eos_token_id": "the token that ends a text",
    "rows_id": "rows_id (corpus, tokenizer and preprocessing)",
}
_SHORT_NAMES = {"hidden.every": "hidden_every", "hidden.pooling": "pooling"}

# The first field that differs is the one that is named, so what says most stands first. Of what
# decides about rows, an ensemble asks for `rows_id`, which follows from all of it.
# fmt: off
FIELDS: tuple[Field, ...] = (
    #     field                              resume like  join  ensemble  hold out  student
    Field("task",                            SAME, SAME, SAME, SAME,     SAME,     has_model),
    Field("labelled",                        SAME, FREE, FREE, SAME,     LABELLED, FREE),
    Field("targets.kind",                    SAME, SAME, SAME, SAME,     FREE,     FREE),
    Field("problem_type",                    SAME, SAME, SAME, SAME,     SAME,     has_problem),
    Field("targets.num_classes",             SAME, SAME, SAME, SAME,     FREE,     is_wide_enough),
    Field("labels",                          SAME, SAME, SAME, SAME,     LABELS,   has_labels),
    Field("targets.top_k",                   SAME, SAME, SAME, FREE,     FREE),
    Field("targets.temperatures",            SAME, SAME, SAME, FREE,     FREE),
    Field("targets.value_bits",              SAME, SAME, FREE, FREE,     FREE),
    Field("targets.mean_entries",            SAME, SAME, FREE, FREE,     FREE),
    Field("targets.threshold",               FREE, FREE, FREE, FREE,     FREE),  # learnt
    Field("hidden.layers",                   SAME, SAME, SAME, WIDTHS,   DEEPEST),
    Field("hidden.widths",                   SAME, SAME, SAME, WIDTHS,   DEEPEST),
    Field("hidden.codec",                    SAME, SAME, FREE, FREE,     FREE),
    Field("hidden.every",                    SAME, SAME, SAME, EVERY,    STATES),
    Field("hidden.pooling",                  SAME, SAME, SAME, SAME,     STATES),
    Field("preprocessing.decoder_start",     SAME, SAME, SAME, FREE,     SAME,     starts_alike),
    Field("tokenizer.num_ids",               SAME, SAME, FREE, FREE,     FREE,     knows_tokens),
    Field("tokenizer.hash",                  SAME, SAME, SAME, SAME,     SAME,     reads_tokens),
    Field("tokenizer.bos_token_id",          SAME, SAME, FREE, FREE,     FREE),
    Field("tokenizer.eos_token_id",          SAME, SAME, FREE, EOS,      FREE),
    Field("tokenizer.template_hash",         SAME, SAME, FREE, FREE,     FREE),
    Field("rows_id",                         FREE, FREE, FREE, SAME,     FREE),
    Field("teacher.id",                      SAME, SAME, FREE, FREE,     FREE),
    Field("teacher.revision",                SAME, SAME, FREE, FREE,     FREE),
    Field("teacher.config_hash",             SAME, SAME, FREE, FREE,     FREE),
    Field("teacher.weights_digest",          SAME, SAME, FREE, FREE,     FREE),
    Field("teacher.dtype",                   SAME, SAME, FREE, FREE,     FREE),
    Field("teacher.attn_implementation",     SAME, SAME, FREE, FREE,     FREE),
    Field("teacher.parameters",              SAME, SAME, FREE, FREE,     FREE),
    Field("corpus.source",                   SAME, FREE, FREE, FREE,     FREE),
    Field("corpus.fingerprint",              SAME, FREE, FREE, FREE,     FREE),
    Field("corpus.num_documents",            SAME, FREE, FREE, FREE,     FREE),
    Field("preprocessing.split",             SAME, FREE, FREE, FREE,     FREE),
    Field("preprocessing.columns",           SAME, FREE, FREE, FREE,     FREE),
    Field("preprocessing.sample_by",         SAME, FREE, FREE, FREE,     FREE),
    Field("preprocessing.encoding_errors",   SAME, FREE, FREE, FREE,     FREE),
    Field("preprocessing.limit_documents",   SAME, FREE, FREE, FREE,     FREE),
    Field("preprocessing.max_length",        SAME, FREE, FREE, FREE,     FREE),
    Field("preprocessing.pack",              SAME, FREE, FREE, FREE,     FREE),
    Field("preprocessing.mask_copies",       SAME, FREE, FREE, FREE,     FREE),
    Field("preprocessing.mask_share",        SAME, FREE, FREE, FREE,     FREE),
    Field("preprocessing.mask_seed",         SAME, FREE, FREE, FREE,     FREE),
    Field("preprocessing.stride",            SAME, FREE, FREE, FREE,     FREE),
    Field("preprocessing.max_target_length", SAME, FREE, FREE, FREE,     FREE),
    Field("preprocessing.generation.num_beams",      SAME, FREE, FREE, FREE, FREE),
    Field("preprocessing.generation.max_new_tokens", SAME, FREE, FREE, FREE, FREE),
    Field("preprocessing.generation.temperature",    SAME, FREE, FREE, FREE, FREE),
    Field("preprocessing.generation.top_p",          SAME, FREE, FREE, FREE, FREE),
    Field("preprocessing.generation.seed",           SAME, FREE, FREE, FREE, FREE),
    Field("preprocessing.generation.writer",         SAME, FREE, FREE, FREE, FREE),
    Field("seed",                            SAME, FREE, FREE, FREE,     FREE),
    Field("nonfinite",                       SAME, FREE, FREE, FREE,     FREE),
    Field("origin",                          SAME, FREE, FREE, FREE,     FREE),  # repacked, or not
    Field("plan.asked_shard_tokens",         SAME, FREE, FREE, FREE,     FREE),
    Field("plan.asked_forward_tokens",       SAME, FREE, FREE, FREE,     FREE),
    # Found by calibration, or following from what stands above.
    Field("plan.documents_per_shard",        FREE, FREE, FREE, FREE,     FREE),
    Field("plan.num_shards",                 FREE, FREE, FREE, FREE,     FREE),
    Field("plan.estimated_tokens",           FREE, FREE, FREE, FREE,     FREE),
    Field("plan.forward_tokens",             FREE, FREE, FREE, FREE,     FREE),
    Field("plan.chunk_positions",            FREE, FREE, FREE, FREE,     FREE),
    Field("plan.cpu_threads",                FREE, FREE, FREE, FREE,     FREE),
    Field("side_files",                      FREE, FREE, FREE, FREE,     FREE),
    Field("columns",                         FREE, FREE, FREE, FREE,     FREE),
    Field("format_version",                  FREE, FREE, FREE, FREE,     FREE),
)
# fmt: on
