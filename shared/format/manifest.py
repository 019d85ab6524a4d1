"""The manifest: what is cached, in one immutable JSON file whose sha256 is the cache id.

It holds what was asked for, what the teacher, the tokenizer and the corpus were, and what
calibration fixed; no clock, no host and no absolute path, so that two runs of the same job publish
the same bytes. Read strictly: an unknown format version is refused, a missing or ill-typed field is
an error that names it, unknown fields are ignored (a newer writer may add some), and one marked
`added` has its default in manifests of before. Every number that sizes follow from has limits,
checked before anything is allocated.
"""

import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import Field, asdict, dataclass, field, fields, is_dataclass
from typing import Any, TypeVar

import xxhash

from shared.errors import CacheMismatch, ConfigError, CorruptCache, IncompleteCache
from shared.storage import Storage
from shared.targets.base import TargetKind
from shared.targets.spec import TargetSpec
from shared.tasks import TASKS, HiddenCodec, Labels, Layout, Pooling, ProblemType, TaskName

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MANIFEST_HASH = "manifest.sha256"
MAX_MANIFEST_BYTES = 16 << 20
MAX_CLASSES = 1 << 24
MAX_SHARDS = 1_000_000
MAX_SHARD_ROWS = 1 << 21  # of a shard of 2 million tokens, the default, with two tokens in each row
MAX_LENGTH = 2**31 - 1
MAX_WIDTH = 1 << 20
MAX_TEMPERATURES = 32
MAX_LAYERS = 1024
MAX_SIDE_FILES = 64
_MAX_HASH_BYTES = 1024
_MAX_JSON_VALUES = 1 << 17  # a commit has one for each block: half a billion positions
_MAX_JSON_CONTAINERS = 256
_ALWAYS = ("row_ids", "num_tokens", "num_positions", "input_ids")
_OF_WINDOWS = ("num_segments", "segments", "positions", "labels", "reference_bytes", "reference")
_OF_LABELS = ("labels", "label_values", "label_logprob")
_OF_TARGETS = ("target_", "log_partition_ratio", "hidden")
# Where each output of a row has a position: its kind of targets, classes, and column of labels.
_OF_OUTPUTS: dict[ProblemType, tuple[TargetKind, int, str]] = {
    "multi_label": ("dense", 2, "labels"),
    "regression": ("values", 1, "label_values"),
}

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherInfo:
    """Which teacher, and how it was run; `id` is a Hub id or the folder's own name."""

    id: str
    revision: str
    config_hash: str
    weights_digest: str
    dtype: str
    attn_implementation: str
    parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerInfo:
    """`hash` is over the canonical content; `num_ids` is the highest token id + 1."""

    hash: str
    num_ids: int
    bos_token_id: int | None
    eos_token_id: int | None
    template_hash: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusInfo:
    """`fingerprint`: of sorted names, sizes and hashes (local), or repository and commit (Hub)."""

    source: str
    fingerprint: str
    num_documents: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """How the teacher wrote the targets itself: by beams, or sampled at a temperature above 0.

    `writer` is a hash over its weights and over the rest of its own generation settings.
    """

    num_beams: int
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    writer: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocessing:
    """Every option that decides which tokens a document becomes.

    `mask_...` are of a masked language model alone: its rows are another for each copy and seed.
    Of seq2seq-lm: `max_length` is of the source, `max_target_length` of the target with its end;
    `decoder_start` is the token in front of every target, -1 for other tasks. `generation`: targets
    are what the teacher wrote.
    """

    split: str
    columns: tuple[str, ...]
    sample_by: str
    encoding_errors: str
    limit_documents: int
    max_length: int
    pack: bool
    mask_copies: int = field(default=0, metadata={"added": True})
    mask_share: float = field(default=0.0, metadata={"added": True})
    mask_seed: int = field(default=0, metadata={"added": True})
    stride: int = field(default=128, metadata={"added": True})
    max_target_length: int = field(default=128, metadata={"added": True})
    decoder_start: int = field(default=-1, metadata={"added": True})
    generation: GenerationSpec | None = field(default=None, metadata={"added": True})


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenSpec:
    """Stored layers (-1 is the final state after the last norm), their widths and codec.

    Of each row the positions 0, `every`, 2 `every`, ... have states. With `pooling` a row has one
    position, whose state is made of those of all its tokens.
    """

    layers: tuple[int, ...]
    widths: tuple[int, ...]
    codec: HiddenCodec
    every: int = field(default=1, metadata={"added": True})
    pooling: Pooling = field(default="none", metadata={"added": True})

    def width_of(self, layer: int | None) -> int:
        """Channels of a layer; 0 where it is not stored."""
        widths = zip(self.layers, self.widths, strict=True)
        return next((width for each, width in widths if each == layer), 0)

    @property
    def deepest(self) -> int | None:
        """The stored layer nearest to the head; None where none is."""
        return -1 if -1 in self.layers else max(self.layers, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """What calibration fixed; part of the definition of every shard's bytes."""

    documents_per_shard: int
    num_shards: int
    estimated_tokens: int
    forward_tokens: int
    chunk_positions: int
    cpu_threads: int
    asked_shard_tokens: int
    asked_forward_tokens: int | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Everything that is needed to read a cache.

    `teacher` is None in a label-only cache; `origin` names the cache that this one was repacked
    from. `labels` are the names of the classes of a label space, empty for a vocabulary. Of
    sequence classification `problem_type` says what they are to a row: one of them is right
    (single_label), each is right or not (multi_label), or each names a number (regression). Without
    `labelled` no row has a hard label, though the task stores them.
    """

    format_version: int
    task: TaskName
    teacher: TeacherInfo | None
    tokenizer: TokenizerInfo
    corpus: CorpusInfo
    preprocessing: Preprocessing
    rows_id: str
    targets: TargetSpec
    hidden: HiddenSpec
    columns: tuple[str, ...]
    plan: BatchPlan
    seed: int
    nonfinite: str
    origin: dict[str, str] | None
    side_files: dict[str, str]
    labels: tuple[str, ...] = field(default=(), metadata={"added": True})
    problem_type: ProblemType = field(default="single_label", metadata={"added": True})
    labelled: bool = field(default=True, metadata={"added": True})

    @property
    def hard_labels(self) -> Labels:
        """Where the hard labels of positions are."""
        return TASKS[self.task].labels if self.labelled else "none"

    @property
    def layout(self) -> Layout:
        """How a row is laid out and where its targets are."""
        own = TASKS[self.task].layout
        return own if self.problem_type == "single_label" else "outputs"

    @property
    def num_outputs(self) -> int:
        """Positions of every row where these are outputs; else 0."""
        return len(self.labels) if self.layout == "outputs" else 0

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False).encode()

    @property
    def max_row_tokens(self) -> int:
        """Tokens of the longest row there can be: a pair is a source, a start and a target."""
        options = self.preprocessing
        if TASKS[self.task].layout == "pair":
            return options.max_length + 1 + options.max_target_length
        return options.max_length

    @property
    def cache_id(self) -> str:
        return hashlib.sha256(self.to_json()).hexdigest()


def rows_id(corpus: CorpusInfo, tokenizer: TokenizerInfo, preprocessing: Preprocessing) -> str:
    """Equal for two caches exactly when their row ids name the same rows.

    A preprocessing option that was added later counts where it is not at its default.
    """
    options = asdict(preprocessing)
    for option in fields(preprocessing):
        if option.metadata.get("added") and options[option.name] == option.default:
            del options[option.name]
    parts = [corpus.fingerprint, tokenizer.hash, tokenizer.template_hash, options]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())


def publish(storage: Storage, manifest: Manifest) -> bool:
    """Writes the manifest if the cache has none; false if another process was first."""
    for problem in _beyond_limits(manifest):
        raise ConfigError(
            f"{storage.root}: {problem}. This version cannot write such a cache: ask for less, or "
            "for another --shard-tokens."
        )
    won = storage.put_new(MANIFEST, manifest.to_json())
    write_hash(storage)
    return won


def write_hash(storage: Storage) -> None:
    """Adds manifest.sha256, which a crash right after the manifest may have left out."""
    digest = hashlib.sha256(storage.read(MANIFEST, max_bytes=MAX_MANIFEST_BYTES)).hexdigest()
    storage.put_new(MANIFEST_HASH, f"{digest}  {MANIFEST}\n".encode())


def read(storage: Storage) -> tuple[Manifest, str]:
    """The manifest and the cache id; every byte is checked against manifest.sha256."""
    path = storage.where(MANIFEST)
    if not storage.exists(MANIFEST):
        raise IncompleteCache(
            f"{storage.root}: no cache here ({MANIFEST} is missing). "
            "Make one with cache-teacher run --out, or name another folder."
        )
    data = storage.read(MANIFEST, max_bytes=MAX_MANIFEST_BYTES)
    digest = hashlib.sha256(data).hexdigest()
    if not storage.exists(MANIFEST_HASH):
        raise IncompleteCache(
            f"{storage.root}: {MANIFEST_HASH} is missing, so the start of this cache was cut "
            "short. Run the same cache-teacher run command again."
        )
    recorded = (
        storage.read(MANIFEST_HASH, max_bytes=_MAX_HASH_BYTES).decode("utf-8", "replace").split()
    )
    if not recorded or recorded[0] != digest:
        raise CorruptCache(
            f"{path}: its sha256 is {digest} but {MANIFEST_HASH} says "
            f"{(recorded or ['nothing'])[0]}. "
            "One of the two files was changed; restore it from a copy."
        )
    raw = parse_json(data, path)
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if isinstance(version, int) and version < 1:
        raise CorruptCache(f"{path}: format {version}; the first one is 1")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CacheMismatch(
            f"{path}: format {version} needs a newer teacher-cache; this one reads up to format "
            f"{FORMAT_VERSION}. Run pip install --upgrade teacher-cache."
        )
    manifest = build(Manifest, raw, path)
    for problem in _beyond_limits(manifest):
        raise CorruptCache(f"{path}: {problem}. Restore it from a copy.")
    return manifest, digest


def _beyond_limits(manifest: Manifest) -> Iterator[str]:
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
    temperatures, layers = manifest.targets.temperatures, manifest.hidden.layers
    if len(temperatures) > MAX_TEMPERATURES or not all(map(math.isfinite, temperatures)):
        yield (
            f"targets.temperatures: found {_short(temperatures)}, expected up to "
            f"{MAX_TEMPERATURES} numbers"
        )
    once = len(layers) == len(set(layers)) == len(manifest.hidden.widths)
    if not once or len(layers) > MAX_LAYERS:
        yield (
            f"hidden: found layers {_short(layers)}, expected up to {MAX_LAYERS:,}, each once, "
            "with one width each"
        )
    if manifest.targets.ragged and not manifest.targets.threshold:
        yield "targets.threshold: found 0, expected what calibration found"
    start, of_pairs = manifest.preprocessing.decoder_start, manifest.layout == "pair"
    if not (0 <= start < manifest.tokenizer.num_ids if of_pairs else start == -1):
        yield (
            f"preprocessing.decoder_start: found {start}, expected "
            + (
                f"a token below {manifest.tokenizer.num_ids:,}"
                if of_pairs
                else "-1, for no decoder"
            )
        )
    yield from _wrong_labels(manifest)
    if len(manifest.side_files) > MAX_SIDE_FILES:
        yield f"side_files: found {len(manifest.side_files)}, expected at most {MAX_SIDE_FILES}"
    if manifest.layout == "window":
        yield from _wrong_windows(manifest)
    yield from _wrong_columns(manifest.columns)


def _wrong_windows(manifest: Manifest) -> Iterator[str]:
    classes, tokens = manifest.targets.num_classes, manifest.preprocessing.max_length
    if classes != tokens:
        yield f"targets.num_classes: found {classes:,} for rows of up to {tokens:,} tokens"
    for name in _OF_WINDOWS:
        if name not in manifest.columns:
            yield f"columns: {name} is missing, which {manifest.task} has"


def _wrong_labels(manifest: Manifest) -> Iterator[str]:
    """Names of classes, and what of them a position has: one of all, yes or no, or a number."""
    names, targets, problem = len(manifest.labels), manifest.targets, manifest.problem_type
    of_labels = TASKS[manifest.task].target_space == "labels"
    if not manifest.labelled:
        yield from _wrong_unlabelled(manifest)
    elif (
        TASKS[manifest.task].labels == "stored"
        and manifest.layout in ("row", "tokens")
        and "labels" not in manifest.columns
    ):
        yield f"columns: labels is missing, which {manifest.task} has"
    if problem == "single_label":
        if names != (targets.num_classes if of_labels else 0):
            yield (
                f"labels: found {names} names for {targets.num_classes:,} classes of "
                f"{manifest.task}"
            )
        if targets.numbers or "label_values" in manifest.columns:
            yield "problem_type: found single_label, but the cache holds numbers"
        return
    kind, classes, column = _OF_OUTPUTS[problem]
    if TASKS[manifest.task].layout != "row":
        yield f"problem_type: found {problem}, but {manifest.task} has none"
    if not names:
        yield f"labels: found no name, expected one for each output of {problem}"
    if targets.num_classes != classes or (targets.has_targets and targets.kind != kind):
        yield (
            f"targets: found {targets.kind} of {targets.num_classes:,} classes, expected {kind} "
            f"of {classes}, or none, with {problem}"
        )
    there = {"positions", "segments", "labels", "label_values"} & set(manifest.columns)
    if there != ({column} if manifest.labelled else set()):
        yield f"columns: found {_short(sorted(there))}, expected {column} with {problem}"


def _wrong_unlabelled(manifest: Manifest) -> Iterator[str]:
    if not TASKS[manifest.task].unlabelled or not manifest.targets.has_targets:
        kind = manifest.targets.kind
        yield f"labelled: found false, but {manifest.task} with targets {kind} needs labels"
    for name in _OF_LABELS:
        if name in manifest.columns:
            yield f"columns: found {name}, but labelled is false"


def _wrong_columns(columns: tuple[str, ...]) -> Iterator[str]:
    missing = [name for name in _ALWAYS if name not in columns]
    if missing:
        yield f"columns: {missing[0]} is missing"
    if len(columns) != len(set(columns)):
        yield f"columns: found {_short(columns)}, expected each once"
    if any(name.startswith(_OF_TARGETS) for name in columns):
        yield f"columns: found {_short(columns)}, but those of targets and hidden states follow"
    for name, lengths in (("segments", "num_segments"), ("reference", "reference_bytes")):
        if name in columns and lengths not in columns[: columns.index(name)]:
            yield f"columns: {name} without {lengths} before it"


def _short(value: Any) -> str:
    return repr(str(value)[:80])


def parse_json(
    data: bytes,
    where: str,
    *,
    max_values: int = _MAX_JSON_VALUES,
    max_containers: int = _MAX_JSON_CONTAINERS,
) -> Any:
    """Parsed JSON; anything else, or far more values or nesting than we write, is an error."""
    containers = data.count(b"[") + data.count(b"{")
    values = containers + data.count(b",")
    if containers > max_containers or values > max_values:
        raise CorruptCache(
            f"{where}: {values:,} values in {containers:,} lists and objects, expected at most "
            f"{max_values:,} in {max_containers}. Restore it from a copy."
        )
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptCache(f"{where}: not valid JSON: {error}") from None


def build(kind: type[T], value: Any, where: str) -> T:
    """A dataclass from parsed JSON, every field checked against its declared type."""
    return typing.cast(T, _build(kind, value, where))


def _build(kind: Any, value: Any, where: str) -> Any:
    if type(value) is kind and kind in (str, int, float, bool):  # most fields: 7 times as fast
        return _in_range(value, where)
    origin, arguments = _parts_of(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        exact = [argument for argument in arguments if type(value) is argument]
        return _build((exact or arguments)[0], value, where)
    if is_dataclass(kind):
        if not isinstance(value, dict):
            raise _wrong(where, value, "an object")
        make: Any = kind
        hints = _types_of(make)
        added = {field.name for field in fields(kind) if field.metadata.get("added")}
        missing = {field.name for field in fields(kind)} - value.keys() - added
        if missing:
            raise CorruptCache(f"{where}: the field {min(missing)!r} is missing")
        values = {
            f.name: _build_field(f, hints[f.name], value[f.name], f"{where}: {f.name}")
            for f in fields(kind)
            if f.name in value
        }
        try:
            return make(**values)
        except ConfigError as error:
            raise CorruptCache(f"{where}: {error}") from None
    if origin is tuple:
        if not isinstance(value, list):
            raise _wrong(where, value, "a list")
        return _items(arguments[0], value, where)
    if origin is dict:
        if not isinstance(value, dict):
            raise _wrong(where, value, "an object")
        return {_text(key, where): _build(arguments[1], item, where) for key, item in value.items()}
    if origin is typing.Literal:
        if value not in arguments:
            raise _wrong(where, value, f"one of {', '.join(map(str, arguments))}")
        return value
    if kind is Any:
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise _wrong(where, value, "a number") from None
    raise _wrong(where, value, f"a value of type {kind.__name__}")


def _in_range(value: str | float | bool, where: str) -> str | float | bool:
    """Text that can be written somewhere, a whole number that fits 64 bits."""
    if type(value) is int and not -(2**63) <= value < 2**64:
        raise _wrong(where, value, "a number of at most 64 bits")
    return _text(value, where) if isinstance(value, str) else value


def _items(kind: Any, values: list[Any], where: str) -> tuple[Any, ...]:
    """The items of a list, each checked.

    Lists of lengths may be long, so that whole numbers are looked at together: 60 times as fast.
    """
    plain = kind is int and set(map(type, values)) == {int}
    if plain and min(values) >= -(2**63) and max(values) < 2**64:
        return tuple(values)
    return tuple(_build(kind, item, where) for item in values)


@functools.cache
def _parts_of(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """What a declared type is made from, and its arguments."""
    return typing.get_origin(kind), typing.get_args(kind)


@functools.cache
def _types_of(kind: Any) -> dict[str, Any]:
    """The declared type of each field of a dataclass."""
    return typing.get_type_hints(kind)


def _build_field(description: Field[Any], kind: Any, value: Any, where: str) -> Any:
    """The value of one field; `one_of` in its metadata is the table whose names it may have."""
    table = description.metadata.get("one_of")
    if table is not None and not (isinstance(value, str) and value in table):
        raise _wrong(where, value, f"one of {', '.join(table)}")
    return _build(kind, value, where)


def _text(value: str, where: str) -> str:
    """Half a surrogate pair is legal in JSON but can be written nowhere."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _wrong(where, value, "Unicode text") from None
    return value


def _wrong(where: str, value: Any, expected: str) -> CorruptCache:
    return CorruptCache(f"{where}: found {_short(value)}, expected {expected}")


def differences(
    found: Mapping[str, Any],
    asked: Mapping[str, Any],
    prefix: str = "",
    *,
    left: str = "the cache has",
) -> Iterator[str]:
    """One line for each field that differs: `targets.top_k: the cache has 32, asked for 64`."""
    for key in sorted(found.keys() | asked.keys()):
        one, other, name = found.get(key), asked.get(key), f"{prefix}{key}"
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from differences(one, other, f"{name}.", left=left)
        elif one != other:
            yield f"{name}: {left} {one!r}, asked for {other!r}"
