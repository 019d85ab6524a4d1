"""What a job learns before its first shard, and the manifest it publishes: calibrate, publish.

It begins with a draft (`draft.py`). What `cache-teacher plan` says of a job, with --calibrate too,
is `tools/plan.py`.

*Calibrate* fixes, on a sample of documents spread over the corpus, everything that is learnt: how
many documents make a shard, how many tokens one forward takes, the order of the classes.
*Publish* writes the manifest by exclusive create; whoever comes second adopts what the first one
learnt, after checking that the same things were asked for. Nothing here depends on measured time,
so two first starts of the same job publish the same bytes.
"""

import json
import logging
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from safetensors.numpy import save as save_safetensors

from shared import compat
from shared.errors import CorpusError, Refused
from shared.fit_rules import Side
from shared.format import manifest as manifests
from shared.format import manifest_file
from shared.format.manifest import BatchPlan, Manifest
from shared.format.schema import ROW_CHUNK_BITS
from shared.storage.base import Storage
from shared.targets.record import ClassRanks
from shared.targets.spec import TargetSpec
from teacher_cache.engines.base import Engine
from teacher_cache.job.draft import Draft
from teacher_cache.job.writing import stand_ins
from teacher_cache.select.kinds import SELECTORS
from teacher_cache.select.largest import Largest
from teacher_cache.tasks.rows import TrainingRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_SAMPLE_DOCUMENTS = 512
_WRITTEN_DOCUMENTS = 64  # of the sample, where the teacher has to write them first
_SAMPLE_TOKENS = 1 << 20  # the sample stops here even if few documents were read
_LEARN_TOKENS = 1 << 14  # tokens the teacher runs over to learn the order of the classes
_MIN_SHARD_TOKENS = 1 << 15  # smaller shards are all overhead, however small the corpus
_SHARDS_WANTED = 64  # so that a few workers can share even a small corpus


@dataclass(frozen=True, slots=True)
class Sample:
    """What a spread-out sample of the corpus says about all of it."""

    documents: int
    tokens: int
    positions: int
    rows: tuple[TrainingRow, ...]
    counters: Counter[str]
    token_counts: np.ndarray

    @property
    def tokens_per_document(self) -> float:
        return self.tokens / max(1, self.documents)


def sample_corpus(draft: Draft) -> Sample:
    """Tokenizes documents spread over the corpus, always the same ones."""
    total = len(draft.corpus)
    picked = np.unique(np.linspace(0, total - 1, min(total, _SAMPLE_DOCUMENTS)).astype(np.int64))
    spread = sorted(picked.tolist(), key=lambda index: (index * 2654435761) % (1 << 32))
    counters: Counter[str] = Counter()
    token_counts = np.zeros(draft.tokenizer_info.num_ids, np.int64)
    built: list[TrainingRow] = []
    tokens = documents = 0
    documents_of = _sample_documents(draft, spread, counters)
    for index, document in documents_of:
        for row in draft.build_rows([(index, document)], counters):
            tokens += len(row.input_ids)
            token_counts += np.bincount(row.input_ids, minlength=len(token_counts))
            built.append(row)
        documents += 1
        if tokens >= _SAMPLE_TOKENS:
            break
    if not built:
        raise CorpusError(
            f"{draft.config.corpus}: no usable document among the {documents} looked at "
            f"({_listed(counters)}). A document needs at least one token besides its end."
        )
    positions = sum(row.num_positions for row in built)
    return Sample(documents, tokens, positions, tuple(built), counters, token_counts)


def _sample_documents(
    draft: Draft, indices: Sequence[int], counters: Counter[str]
) -> Iterator[tuple[int, Any]]:
    """The documents of the sample; with --generate as written, but then few: writing is slow."""
    read = ((index, draft.corpus.read([index])[0]) for index in indices)
    if draft.preprocessing.generation is None:
        return read
    few, options = islice(read, _WRITTEN_DOCUMENTS), draft.preprocessing
    if draft.engine is None:
        return stand_ins(few, draft.task, draft.tokenizer, options, counters)
    asked = draft.config.forward_tokens
    tokens = draft.engine.default_forward_tokens if asked == "auto" else asked
    return draft.writer(tokens).written(few, counters)


def _listed(counters: Counter[str]) -> str:
    return ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in counters.items())


def documents_per_shard(draft: Draft, sample: Sample) -> int:
    """min(--shard-tokens, corpus / 64), but at least 32,768 tokens, in documents."""
    corpus_tokens = sample.tokens_per_document * len(draft.corpus)
    wanted = max(_MIN_SHARD_TOKENS, corpus_tokens / _SHARDS_WANTED)
    tokens = min(draft.config.shard_tokens, wanted)
    return max(1, round(tokens / max(1.0, sample.tokens_per_document)))


def calibrate(draft: Draft) -> tuple[Manifest, dict[str, bytes]]:
    """Everything that is learnt, as a manifest and the side files it names."""
    sample = sample_corpus(draft)
    per_shard = documents_per_shard(draft, sample)
    side_files = {f"tokenizer/{name}": data for name, data in _tokenizer_files(draft.tokenizer)}
    forward_tokens = chunk_positions = 1
    if draft.engine is not None:
        forward_tokens = _largest_forward(draft.engine, draft, sample)
        chunk_positions = draft.engine.chunk_positions
        targets, learnt = draft.targets, draft.learnt
        if learnt is None and SELECTORS[targets.kind].learns_classes:
            targets, learnt = _learn(draft, draft.engine, sample, forward_tokens)
        draft = replace(draft, targets=targets)
        if learnt is not None:
            side_files[f"learnt-{xxhash.xxh3_128_hexdigest(learnt)[:16]}.safetensors"] = learnt
    plan = BatchPlan(
        documents_per_shard=per_shard,
        num_shards=-(-len(draft.corpus) // per_shard),
        estimated_tokens=round(sample.tokens_per_document * len(draft.corpus)),
        forward_tokens=forward_tokens,
        chunk_positions=chunk_positions,
        cpu_threads=torch.get_num_threads(),
        asked_shard_tokens=draft.config.shard_tokens,
        asked_forward_tokens=draft.config.forward_tokens,
    )
    return manifest_of(draft, plan, side_files), side_files


def manifest_of(draft: Draft, plan: BatchPlan, side_files: dict[str, bytes]) -> Manifest:
    columns = draft.task.columns(
        draft.preprocessing,
        draft.corpus.columns,
        labelled=draft.labelled,
        distributions=SELECTORS[draft.targets.kind].distributions,
    )
    return Manifest(
        format_version=manifests.FORMAT_VERSION,
        task=draft.config.task,
        teacher=draft.teacher_info,
        tokenizer=draft.tokenizer_info,
        corpus=draft.corpus.info,
        preprocessing=draft.preprocessing,
        rows_id=manifests.rows_id(draft.corpus.info, draft.tokenizer_info, draft.preprocessing),
        targets=draft.targets,
        hidden=draft.hidden,
        columns=columns,
        plan=plan,
        seed=draft.config.seed,
        nonfinite=draft.config.nonfinite,
        origin=None,
        side_files={name: xxhash.xxh3_128_hexdigest(data) for name, data in side_files.items()},
        labels=draft.labels,
        problem_type=draft.problem_type,
        labelled=draft.labelled,
    )


def _tokenizer_files(tokenizer: "PreTrainedTokenizerBase") -> Iterator[tuple[str, bytes]]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in sorted(Path(folder).rglob("*")):
            if path.name == "tokenizer_config.json":
                path.write_text(_without_origin(path.read_text()))
            if path.is_file():
                yield path.relative_to(folder).as_posix(), path.read_bytes()


def _without_origin(config: str) -> str:
    """A tokenizer's settings without how this process came by them (offline, from a folder)."""
    settings = json.loads(config)
    for name in ("is_local", "local_files_only", "name_or_path"):
        settings.pop(name, None)
    return json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _largest_forward(engine: Engine, draft: Draft, sample: Sample) -> int:
    """Tokens of one forward: as asked, else the most the device holds, tried on real rows."""
    asked = draft.config.forward_tokens
    tokens = engine.default_forward_tokens if asked == "auto" else asked
    longest = max(sample.rows, key=lambda row: len(row.input_ids))
    spec, hidden, packed = draft.targets, draft.hidden, draft.preprocessing.pack
    while True:
        count = max(1, tokens // len(longest.input_ids))
        rows = [longest] * count
        if engine.fits(rows, spec, hidden, forward_tokens=tokens, packed=packed):
            return tokens
        if count == 1:
            raise Refused(
                f"--forward-tokens {asked}: one row of {len(longest.input_ids):,} tokens (document "
                f"{longest.row_id >> ROW_CHUNK_BITS}) does not fit into the device's memory. Use a "
                "smaller --max-length or --dtype."
            )
        if asked != "auto":
            raise Refused(
                f"--forward-tokens {asked}: {count} rows of {len(longest.input_ids):,} tokens do "
                "not fit into the device's memory together. Use a smaller --forward-tokens, or "
                "leave it out: the largest that fits is then found."
            )
        tokens //= 2


def _learn(
    draft: Draft, engine: Engine, sample: Sample, forward_tokens: int
) -> tuple[TargetSpec, bytes]:
    """The targets with their threshold, and the learnt side file: classes in order of how often
    they are kept, channel statistics."""
    largest = engine.largest(
        learning_rows(sample),
        draft.targets,
        draft.hidden,
        forward_tokens=forward_tokens,
        packed=draft.preprocessing.pack,
    )
    targets, ranks = learn_targets(draft.targets, largest, sample)
    arrays: dict[str, np.ndarray] = {"class_by_rank": ranks.classes}
    for layer, channel in largest.statistics.items():
        arrays[f"hidden.{layer}.mean"] = channel.mean.astype(np.float32)
        arrays[f"hidden.{layer}.std"] = channel.std.astype(np.float32)
    for layer, scale in largest.scales(draft.hidden).items():
        arrays[f"hidden.{layer}.centre"] = scale.centre
        arrays[f"hidden.{layer}.unit"] = scale.unit
    return targets, save_safetensors(arrays)


def learning_rows(sample: Sample) -> list[TrainingRow]:
    """The rows that the teacher runs over before anything is captured."""
    chosen: list[TrainingRow] = []
    tokens = 0
    for row in sample.rows:
        chosen.append(row)
        tokens += len(row.input_ids)
        if tokens >= _LEARN_TOKENS:
            break
    return chosen


def learn_targets(
    spec: TargetSpec, largest: Largest, sample: Sample
) -> tuple[TargetSpec, ClassRanks]:
    """The targets with their threshold, and the classes in order of how often they are kept."""
    ids_NK, logprobs_NK = largest.ids_NK, largest.logprobs_NK
    selector = SELECTORS[spec.kind]
    if not spec.threshold:  # --like brings its own
        spec = replace(spec, threshold=selector.find_threshold(logprobs_NK, spec))
    ids_NK, share_NK = selector.kept_share(ids_NK, logprobs_NK, spec)
    kept = np.bincount(ids_NK.flatten(), share_NK.flatten().double(), spec.num_classes)
    seen = sample.token_counts[: len(kept)]
    kept[: len(seen)] += seen
    return spec, ClassRanks.from_counts(np.rint(kept * 16))


def publish_or_adopt(draft: Draft, storage: Storage) -> tuple[Manifest, str]:
    """The manifest all workers of this cache follow: the first one's. Returns it and its id."""
    if not storage.exists(manifest_file.MANIFEST):
        manifest, side_files = calibrate(draft)
        for name, data in side_files.items():
            storage.put_new(name, data)
        manifest_file.publish(storage, manifest)
    manifest_file.write_hash(storage)
    manifest, cache_id = manifest_file.read(storage)
    check_asked(draft, manifest, storage)
    _mend_tokenizer(draft, manifest, storage)
    return manifest, cache_id


def _mend_tokenizer(draft: Draft, manifest: Manifest, storage: Storage) -> None:
    """A first start of another job that lost, or died, may have left its own tokenizer files."""
    for name, data in _tokenizer_files(draft.tokenizer):
        name, digest = f"tokenizer/{name}", xxhash.xxh3_128_hexdigest(data)
        if manifest.side_files.get(name) != digest:
            continue
        if not storage.exists(name) or storage.read(name) != data:
            storage.put(name, data)


def check_asked(draft: Draft, manifest: Manifest, storage: Storage) -> None:
    """Refuses to go on with a cache that was started for something else, field by field."""
    cached, asked = Side(str(storage.root), manifest), Side("asked", draft.asked_of(manifest))
    compat.check("resume", cached, asked)
