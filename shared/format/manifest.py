"""What is cached: the manifest and its parts, whose sha256 as JSON is the cache id.

It holds what was asked for, what the teacher, the tokenizer and the corpus were, and what
calibration fixed; no clock, no host and no absolute path, so that two runs of the same job publish
the same bytes. A field marked `added` has its default in manifests from before it was added. How a
manifest lies on the disk is in `manifest_file`, and what it may not say in `limits`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import xxhash

from shared.format.layouts import LAYOUTS, RowLayout
from shared.targets.spec import TargetSpec
from shared.tasks import (
    PROBLEMS,
    TASKS,
    HiddenCodec,
    Labels,
    Pooling,
    Problem,
    ProblemType,
    TaskName,
)

FORMAT_VERSION = 1


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
    task: TaskName = field(metadata={"one_of": TASKS})
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
    def problem(self) -> Problem:
        """What the labels are to a row."""
        return PROBLEMS[self.problem_type]

    @property
    def layout(self) -> RowLayout:
        """How a row is laid out and where its targets are."""
        return LAYOUTS[self.problem.layout or TASKS[self.task].layout]

    @property
    def num_outputs(self) -> int:
        """Positions of every row where these are outputs; else 0."""
        return self.layout.positions_per_row(len(self.labels))

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True, ensure_ascii=False).encode()

    @property
    def max_row_tokens(self) -> int:
        """Tokens of the longest row there can be."""
        options = self.preprocessing
        return self.layout.longest_row(options.max_length, options.max_target_length)

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
