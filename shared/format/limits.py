"""What no manifest of this version says: sizes that overflow, columns that do not fit its task."""

import math
from collections.abc import Iterator

from shared.format.column import Contents
from shared.format.manifest import Manifest
from shared.format.schema import COLUMNS, columns_of
from shared.strict import short
from shared.tasks import TASKS

MAX_CLASSES = 1 << 24
MAX_SHARDS = 1_000_000
MAX_SHARD_ROWS = 1 << 21  # of a shard of 2 million tokens, the default, with two tokens in each row
MAX_LENGTH = 2**31 - 1
MAX_WIDTH = 1 << 20
MAX_TEMPERATURES = 32
MAX_LAYERS = 1024
MAX_SIDE_FILES = 64
_NOTHING = Contents(segments=False, positions=False, labels=False, targets=False)


def problems(manifest: Manifest) -> Iterator[str]:
    """What no cache of this version has: sizes that overflow, columns that are not there."""
    limits = [
        ("tokenizer.num_ids", manifest.tokenizer.num_ids, MAX_CLASSES),
        ("preprocessing.max_length", manifest.preprocessing.max_length, MAX_LENGTH),
        ("preprocessing.max_target_length", manifest.preprocessing.max_target_length, MAX_LENGTH),
        ("targets.num_classes", manifest.targets.num_classes, MAX_CLASSES),
        ("targets.top_k", manifest.targets.top_k, MAX_CLASSES),
        ("hidden.every", manifest.hidden.every, MAX_LENGTH),
        ("plan.num_shards", manifest.plan.num_shards, MAX_SHARDS),
        ("plan.documents_per_shard", manifest.plan.documents_per_shard, MAX_SHARD_ROWS),
        *(("hidden.widths", width, MAX_WIDTH) for width in manifest.hidden.widths),
    ]
    for name, found, most in limits:
        if not 1 <= found <= most:
            yield f"{name}: found {found}, expected 1 to {most:,}"
    yield from _wrong_counts(manifest)
    yield from _wrong_start(manifest)
    yield from _wrong_labels(manifest)
    if len(manifest.side_files) > MAX_SIDE_FILES:
        yield f"side_files: found {len(manifest.side_files)}, expected at most {MAX_SIDE_FILES}"
    yield from _wrong_layout(manifest)
    yield from _wrong_columns(manifest.columns)


def _wrong_counts(manifest: Manifest) -> Iterator[str]:
    """Temperatures, layers, and the threshold of a ragged kind."""
    temperatures, layers = manifest.targets.temperatures, manifest.hidden.layers
    if len(temperatures) > MAX_TEMPERATURES or not all(map(math.isfinite, temperatures)):
        yield (
            f"targets.temperatures: found {short(temperatures)}, expected up to "
            f"{MAX_TEMPERATURES} numbers"
        )
    once = len(layers) == len(set(layers)) == len(manifest.hidden.widths)
    if not once or len(layers) > MAX_LAYERS:
        yield (
            f"hidden: found layers {short(layers)}, expected up to {MAX_LAYERS:,}, each once, "
            "with one width each"
        )
    if manifest.targets.ragged and not manifest.targets.threshold:
        yield "targets.threshold: found 0, expected what calibration found"


def _wrong_start(manifest: Manifest) -> Iterator[str]:
    start, decodes = manifest.preprocessing.decoder_start, manifest.layout.has_decoder
    if not (0 <= start < manifest.tokenizer.num_ids if decodes else start == -1):
        yield (
            f"preprocessing.decoder_start: found {start}, expected "
            + (f"a token below {manifest.tokenizer.num_ids:,}" if decodes else "-1, for no decoder")
        )


def _wrong_layout(manifest: Manifest) -> Iterator[str]:
    classes, tokens = manifest.targets.num_classes, manifest.preprocessing.max_length
    if manifest.layout.classes_are_tokens and classes != tokens:
        yield f"targets.num_classes: found {classes:,} for rows of up to {tokens:,} tokens"
    for name in manifest.layout.required_columns:
        if name not in manifest.columns:
            yield f"columns: {name} is missing, which {manifest.task} has"


def _wrong_labels(manifest: Manifest) -> Iterator[str]:
    """Names of classes, and what of them a position has: one of all, yes or no, or a number."""
    names, targets, problem = len(manifest.labels), manifest.targets, manifest.problem
    of_labels = TASKS[manifest.task].named_classes
    if not manifest.labelled:
        yield from _wrong_unlabelled(manifest)
    elif (
        manifest.hard_labels == "stored"
        and manifest.layout.one_label_column
        and "labels" not in manifest.columns
    ):
        yield f"columns: labels is missing, which {manifest.task} has"
    if problem.layout is None:
        if names != (targets.num_classes if of_labels else 0):
            yield (
                f"labels: found {names} names for {targets.num_classes:,} classes of "
                f"{manifest.task}"
            )
        if targets.numbers or "label_values" in manifest.columns:
            yield f"problem_type: found {manifest.problem_type}, but the cache holds numbers"
    else:
        yield from _wrong_outputs(manifest)


def _wrong_outputs(manifest: Manifest) -> Iterator[str]:
    """What each output of a row has: a kind of targets, classes, and a column of labels."""
    name, problem, targets = manifest.problem_type, manifest.problem, manifest.targets
    if not TASKS[manifest.task].has_problem_type:
        yield f"problem_type: found {name}, but {manifest.task} has none"
    if not manifest.labels:
        yield f"labels: found no name, expected one for each output of {name}"
    fits = not targets.has_targets or targets.kind == problem.kind
    if not fits or targets.num_classes != problem.num_classes:
        yield (
            f"targets: found {targets.kind} of {targets.num_classes:,} classes, expected "
            f"{problem.kind} of {problem.num_classes}, or none, with {name}"
        )
    there = {"positions", "segments", "labels", "label_values"} & set(manifest.columns)
    if there != ({problem.label_column} if manifest.labelled else set()):
        yield (
            f"columns: found {short(sorted(there))}, expected {problem.label_column} with {name}"
        )


def _wrong_unlabelled(manifest: Manifest) -> Iterator[str]:
    if not TASKS[manifest.task].unlabelled or not manifest.targets.has_targets:
        kind = manifest.targets.kind
        yield f"labelled: found false, but {manifest.task} with targets {kind} needs labels"
    for column in COLUMNS:
        if column.needs_labels and column.name in manifest.columns:
            yield f"columns: found {column.name}, but labelled is false"


def _wrong_columns(names: tuple[str, ...]) -> Iterator[str]:
    missing = [name for name in columns_of(_NOTHING) if name not in names]
    if missing:
        yield f"columns: {missing[0]} is missing"
    if len(names) != len(set(names)):
        yield f"columns: found {short(names)}, expected each once"
    follow = tuple(column.name for column in COLUMNS if column.present is None)
    if any(name.startswith(("target_", *follow)) for name in names):
        yield f"columns: found {short(names)}, but those of targets and hidden states follow"
    for column in COLUMNS:
        name, lengths = column.name, column.counted_by
        if lengths and name in names and lengths not in names[: names.index(name)]:
            yield f"columns: {name} without {lengths} before it"
