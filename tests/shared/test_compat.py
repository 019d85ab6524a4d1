"""The table of what must fit: every field of the manifest, in every relation two things stand in.

What is refused is written out here once more, as sets of fields: reasoned, not read from the table.
"""

from collections.abc import Iterator
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any, get_args, get_type_hints

import pytest

from shared import compat
from shared.errors import CacheMismatch
from shared.fit_rules import Side, Student
from shared.format.manifest import GenerationSpec, HiddenSpec, Manifest, TokenizerInfo
from shared.targets.spec import TargetSpec
from shared.tasks import TASKS, TaskName
from tests.shared.format.test_manifest import make_manifest


def leaves(kind: Any, prefix: str = "") -> Iterator[str]:
    """Paths of all fields of a dataclass that hold no dataclass themselves."""
    for name, hint in get_type_hints(kind).items():
        inner = next((each for each in (hint, *get_args(hint)) if is_dataclass(each)), None)
        if name in {field.name for field in fields(kind)}:
            yield from leaves(inner, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]


LEAVES = list(leaves(Manifest))


def changed(manifest: Manifest, path: str, value: Any) -> Manifest:
    """The manifest with another value at a path."""

    def put(part: Any, names: list[str]) -> Any:
        first, *rest = names
        return replace(part, **{first: put(getattr(part, first), rest) if rest else value})

    return put(manifest, path.split("."))


# ---- Manifests to change, and another value of each field

WRITTEN = GenerationSpec(
    num_beams=1, max_new_tokens=16, temperature=0.0, top_p=1.0, seed=0, writer="aa"
)


def with_all_fields(**changes: Any) -> Manifest:
    """A manifest whose teacher wrote the targets, so that no field is missing."""
    manifest = make_manifest(**changes)
    return replace(
        manifest, preprocessing=replace(manifest.preprocessing, decoder_start=0, generation=WRITTEN)
    )


def text_manifest() -> Manifest:
    return with_all_fields(task="seq2seq-lm")


def labels_manifest() -> Manifest:
    return with_all_fields(
        task="sequence-classification",
        labels=("bad", "good"),
        targets=TargetSpec(kind="topk", num_classes=2, top_k=2),
    )


def states_manifest() -> Manifest:
    return with_all_fields(
        task="feature-extraction",
        targets=TargetSpec(kind="none", num_classes=300, top_k=1),
        hidden=HiddenSpec(layers=(-1, 3), widths=(32, 32), codec="bf16", pooling="mean"),
    )


MANIFESTS = {"text": text_manifest, "labels": labels_manifest, "states": states_manifest}

OTHER: dict[str, Any] = {
    "format_version": 2,
    "task": "masked-lm",
    "teacher.id": "someone/else",
    "teacher.revision": "def",
    "teacher.config_hash": "d2",
    "teacher.weights_digest": "e2",
    "teacher.dtype": "float32",
    "teacher.attn_implementation": "eager",
    "teacher.parameters": 13,
    "tokenizer.hash": "a2",
    "tokenizer.num_ids": 301,
    "tokenizer.bos_token_id": 1,
    "tokenizer.eos_token_id": 7,
    "tokenizer.template_hash": "b2",
    "corpus.source": "other.txt",
    "corpus.fingerprint": "c2",
    "corpus.num_documents": 10,
    "preprocessing.split": "test",
    "preprocessing.columns": ("text=body",),
    "preprocessing.sample_by": "paragraph",
    "preprocessing.encoding_errors": "replace",
    "preprocessing.limit_documents": 5,
    "preprocessing.max_length": 32,
    "preprocessing.pack": True,
    "preprocessing.mask_copies": 2,
    "preprocessing.mask_share": 0.15,
    "preprocessing.mask_seed": 3,
    "preprocessing.stride": 64,
    "preprocessing.max_target_length": 99,
    "preprocessing.decoder_start": 5,
    "preprocessing.generation.num_beams": 4,
    "preprocessing.generation.max_new_tokens": 17,
    "preprocessing.generation.temperature": 0.5,
    "preprocessing.generation.top_p": 0.9,
    "preprocessing.generation.seed": 1,
    "preprocessing.generation.writer": "bb",
    "rows_id": "f2",
    "targets.kind": "dense",
    "targets.num_classes": 301,
    "targets.top_k": 3,
    "targets.value_bits": 8,
    "targets.temperatures": (3.0,),
    "targets.mean_entries": 9.0,
    "targets.threshold": 0.01,
    "hidden.layers": (1, 3),
    "hidden.widths": (64, 64),
    "hidden.codec": "fp8",
    "hidden.every": 4,
    "hidden.pooling": "cls",
    "columns": ("row_ids",),
    "plan.documents_per_shard": 4,
    "plan.num_shards": 4,
    "plan.estimated_tokens": 101,
    "plan.forward_tokens": 65,
    "plan.chunk_positions": 17,
    "plan.cpu_threads": 2,
    "plan.asked_shard_tokens": 1_000_000,
    "plan.asked_forward_tokens": 128,
    "seed": 1,
    "nonfinite": "drop",
    "origin": {"cache_id": "99"},
    "side_files": {"tokenizer/tokenizer.json": "00fe"},
    "labels": ("bad", "fair"),
    "problem_type": "multi_label",
    "labelled": False,
}

# ---- What must be refused

PREPROCESSING = {path for path in LEAVES if path.startswith("preprocessing.")}
TEACHER = {path for path in LEAVES if path.startswith("teacher.")}
TOKENIZER = {
    *("tokenizer.hash", "tokenizer.num_ids", "tokenizer.template_hash"),
    *("tokenizer.bos_token_id", "tokenizer.eos_token_id"),
}
HIDDEN = {"hidden.layers", "hidden.widths", "hidden.codec", "hidden.every", "hidden.pooling"}
CLASSES = {"targets.num_classes", "labels", "problem_type"}  # what one class means

REFUSED: dict[str, set[str]] = {
    # Everything that was asked for; what calibration found is taken over, and the rest follows.
    "resume": {
        *{"task", "seed", "nonfinite", "origin", "labelled"},
        *{"plan.asked_shard_tokens", "plan.asked_forward_tokens"},
        *{"corpus.source", "corpus.fingerprint", "corpus.num_documents"},
        *{"targets.kind", "targets.top_k", "targets.value_bits", "targets.temperatures"},
        *{"targets.mean_entries"},
        *(TEACHER | TOKENIZER | PREPROCESSING | HIDDEN | CLASSES),
    },
    # What the teacher learnt is taken over, and both must join: other rows, and nothing else.
    "like": {
        *{"task", "preprocessing.decoder_start"},
        *{"targets.kind", "targets.top_k", "targets.value_bits", "targets.temperatures"},
        *{"targets.mean_entries"},
        *(TEACHER | TOKENIZER | HIDDEN | CLASSES),
    },
    # A batch has rows of both, and one loss: their columns have one shape and one meaning.
    "join": {
        *{"task", "tokenizer.hash", "preprocessing.decoder_start"},
        *{"targets.kind", "targets.top_k", "targets.temperatures"},
        *{"hidden.layers", "hidden.widths", "hidden.every", "hidden.pooling"},
        *CLASSES,
    },
    # The same rows, token by token, and something to take a mean of.
    "ensemble": {
        *{"task", "tokenizer.hash", "rows_id", "labelled", "targets.kind", "hidden.pooling"},
        *CLASSES,
    },
    # One student answers both: the same tokens in, the same classes out, and a right answer.
    "hold out": {
        *{"task", "tokenizer.hash", "preprocessing.decoder_start"},
        *{"labels", "problem_type", "labelled"},
    },
}
# Besides, of some tasks or losses alone.
REFUSED_OF_LAYERS = {
    "hidden.layers",
    "hidden.widths",
    "hidden.every",
}  # an ensemble that reads them
REFUSED_OF_NEXT_TOKENS = {"tokenizer.eos_token_id"}  # an ensemble: the last token of every text
REFUSED_OF_STATES = {"hidden.layers", "hidden.widths", "hidden.every", "hidden.pooling"}  # held out


def expected(relation: str, manifest: Manifest, layers: tuple[int, ...]) -> set[str]:
    found = set(REFUSED[relation])
    if relation == "ensemble" and layers:
        found |= REFUSED_OF_LAYERS
    if relation == "ensemble" and manifest.task == "seq2seq-lm":
        found |= REFUSED_OF_NEXT_TOKENS
    if relation == "hold out" and manifest.task == "feature-extraction":
        found |= REFUSED_OF_STATES
    return found


ADVICE = {
    "resume": "Choose another --out, or ask for the same thing to go on with this one.",
    "like": "Ask for the same as that cache, or leave --like out.",
    "join": "Capture the new documents with cache-teacher run --like the first.",
    "ensemble": "Capture both teachers with the same corpus, tokenizer and options.",
    "hold out": "Hold out rows of the same kind, with cache-teacher run --like.",
}
OWN_ADVICE = {
    ("hold out", "labelled"): "Name a cache of labelled rows",
    ("ensemble", "hidden.layers"): "Leave --hidden-weight out, or cache the layer with teachers of",
    ("ensemble", "hidden.widths"): "Leave --hidden-weight out, or cache the layer with teachers of",
    ("ensemble", "hidden.every"): "Leave --hidden-weight out, or cache both with the same",
}
# How a user knows a field, where options are not compared by their path.
NAMES = {
    "task": "task",
    "tokenizer.hash": "tokenizer's content hash",
    "tokenizer.eos_token_id": "the token that ends a text",
    "rows_id": "rows_id (corpus, tokenizer and preprocessing)",
    "labelled": "hard labels",
    "problem_type": "problem type",
    "targets.num_classes": "the number of classes",
    "targets.kind": "the kind of targets",
    "targets.top_k": "top_k",
    "targets.temperatures": "the stored temperatures",
    "hidden.layers": "hidden layer",
    "hidden.widths": "hidden layer",
    "hidden.every": "hidden_every",
    "hidden.pooling": "pooling",
    "preprocessing.decoder_start": "token that decoders start from",
}


def refusal(relation: Any, ours: Manifest, theirs: Manifest, layers: tuple[int, ...]) -> str:
    """The message, empty where there is none."""
    try:
        compat.check(relation, Side("ONE", ours, layers), Side("OTHER", theirs, layers))
    except CacheMismatch as error:
        return str(error)
    return ""


def test_every_field_of_the_manifest_stands_in_the_table_once():
    paths = [field.path for field in compat.FIELDS]
    assert sorted(paths) == sorted(LEAVES)
    assert sorted(OTHER) == sorted(LEAVES)


CASES = [
    *(("text", relation, ()) for relation in REFUSED),
    *(("labels", relation, ()) for relation in REFUSED),
    *(("states", relation, ()) for relation in REFUSED),
    ("text", "ensemble", (-1,)),
]


@pytest.mark.parametrize("path", LEAVES)
@pytest.mark.parametrize(("kind", "relation", "layers"), CASES)
def test_another_value_is_refused_where_it_matters(kind, relation, layers, path):
    ours = MANIFESTS[kind]()
    value = OTHER[path]
    if path == "labels" and kind != "labels":
        value = ("bad", "good")
    if path == "targets.kind" and kind == "states":
        value = "topk"
    theirs = changed(ours, path, value)
    assert refusal(relation, ours, ours, layers) == ""
    message = refusal(relation, ours, theirs, layers)
    assert bool(message) == (path in expected(relation, ours, layers)), message
    if not message:
        return
    assert OWN_ADVICE.get((relation, path), ADVICE[relation]) in message
    if relation in ("resume", "like"):
        name = path.removeprefix("plan.asked_")
        left, right = (_value(each, path) for each in (ours, theirs))
        assert f"{name}: the cache has {left!r}, asked for {right!r}" in message
        assert message.count("the cache has") == 1
        return
    assert NAMES.get(path, path.rpartition(".")[2]) in message or path == "labels"
    for shown in _shown(relation, path, ours, theirs):
        assert shown in message


def _value(manifest: Manifest, path: str) -> Any:
    value: Any = asdict(manifest)
    for name in path.split("."):
        value = value[name]
    return value


def _shown(relation: str, path: str, ours: Manifest, theirs: Manifest) -> list[str]:
    """What a message shows of both sides."""
    if relation == "hold out" and path == "labels":
        if len(ours.labels) == len(theirs.labels):
            return ["its label 1 is 'fair'", "ONE is 'good'"]
        return [f"it has {len(theirs.labels)} labels", f"ONE has {len(ours.labels)}"]
    if relation == "hold out" and path == "labelled":
        return ["--validation-cache OTHER: its rows have no hard labels"]
    if path == "hidden.widths" and relation in ("ensemble", "hold out"):
        return ["32", "64"]
    if path == "hidden.layers" and relation == "ensemble":
        return ["hidden layer -1 has 32 channels in ONE and 0 in OTHER"]
    if path == "hidden.layers" and relation == "hold out":
        return ["its deepest hidden layer is 3 ", "ONE is -1 "]
    values = [_value(each, path) for each in (ours, theirs)]
    return [str(value) if relation == "hold out" else repr(value) for value in values]


def test_several_options_are_all_named_and_a_missing_part_once():
    ours = make_manifest()
    asked = changed(changed(ours, "seed", 5), "targets.top_k", 4)
    message = refusal("resume", ours, replace(asked, teacher=None), ())
    assert "seed: the cache has 0, asked for 5; targets.top_k: the cache has 8, asked" in message
    assert message.count("teacher: the cache has {'id': 'someone/teacher',") == 1
    assert message.count("the cache has") == 3
    assert refusal("join", ours, asked, ()).count(" in the first and ") == 1


# ---- A student and a cache


def student_of(manifest: Manifest, **changes: Any) -> Student:
    """One that fits a manifest in all that can be known of it."""
    of_labels = TASKS[manifest.task].target_space == "labels"
    options: dict[str, Any] = {
        "name": "STUDENT",
        "model_type": "bert",
        "tasks": frozenset({manifest.task}),
        "num_tokens": 300,
        "tokenizer_hash": manifest.tokenizer.hash,
        "labels": manifest.labels if of_labels else None,
        "problem_type": "single_label_classification" if of_labels else None,
        "decoder_start": max(0, manifest.preprocessing.decoder_start),
    }
    return Student(**options | changes)


REFUSED_STUDENTS = {
    "text": {"tokenizer.hash", "targets.num_classes", "preprocessing.decoder_start"},
    "labels": {"tokenizer.hash", "tokenizer.num_ids", "labels", "problem_type"},
    "states": {"tokenizer.hash", "targets.num_classes"},
}


@pytest.mark.parametrize("path", LEAVES)
@pytest.mark.parametrize("kind", MANIFESTS)
def test_a_student_fits_what_it_reads_and_answers(kind, path):
    ours = MANIFESTS[kind]()
    student = student_of(ours)
    compat.check_student(student, Side("CACHE", ours))
    value = "question-answering" if path == "task" else OTHER[path]
    cache = Side("CACHE", changed(ours, path, value))
    if path not in {*REFUSED_STUDENTS[kind], "task"}:
        compat.check_student(student, cache)
        return
    with pytest.raises(CacheMismatch, match=r"^STUDENT: .*CACHE.*\. (The|Use|Save|Its|Cache) "):
        compat.check_student(student, cache)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("seq2seq-lm", "type bert is no encoder-decoder, which CACHE was cached for. Use a T5"),
        ("token-classification", "type bert for token-classification, the task of CACHE. Use a"),
        (
            "question-answering",
            "no model of type bert for question-answering, .* that AutoModelFor",
        ),
    ],
)
def test_a_student_of_no_model_for_the_task_is_refused(task: TaskName, message):
    manifest = make_manifest(task=task)
    with pytest.raises(CacheMismatch, match=message):
        compat.check_student(student_of(manifest, tasks=frozenset()), Side("CACHE", manifest))


def test_what_a_student_does_not_say_fits_anything():
    """A new head, a body without a tokenizer, weights that are not kept."""
    unknown = {"num_tokens": None, "tokenizer_hash": None, "labels": None, "problem_type": None}
    for make in MANIFESTS.values():
        manifest = make()
        tokenizer: TokenizerInfo = replace(manifest.tokenizer, hash="other", num_ids=9999)
        student = student_of(manifest, decoder_start=None, **unknown)
        compat.check_student(student, Side("CACHE", replace(manifest, tokenizer=tokenizer)))
