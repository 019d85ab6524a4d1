"""Start-up of stage one: resolve, calibrate, publish; and what a job will cost before it starts.

*Resolve* turns the options into a draft: what the teacher, the tokenizer and the corpus are.
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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash
from safetensors.numpy import save as save_safetensors
from torch import Tensor

from shared import manifest as manifests
from shared.decoding import decoder_start_of
from shared.errors import CacheMismatch, ConfigError, CorpusError, Refused
from shared.hidden import ChannelScale, ChannelStatistics, int8_scale, without_massive
from shared.manifest import (
    BatchPlan,
    GenerationSpec,
    HiddenSpec,
    Manifest,
    Preprocessing,
    TeacherInfo,
    TokenizerInfo,
)
from shared.schema import ROW_CHUNK_BITS, optional_columns
from shared.storage import Storage
from shared.target import MAX_ENTRIES, RAGGED_KINDS, ClassRanks, TargetKind, TargetSpec
from shared.tasks import TASKS, ProblemType
from shared.tokenizer import describe
from teacher_cache.batches import forward_batches
from teacher_cache.config import CaptureConfig
from teacher_cache.corpus import Corpus, open_corpus
from teacher_cache.generation import Writer, stand_ins, writer_hash
from teacher_cache.memory import is_out_of_memory
from teacher_cache.row_builders import RowContext, build_rows
from teacher_cache.rows import Row, document_ends
from teacher_cache.targets import select, values_of
from teacher_cache.teacher import (
    Teacher,
    config_hash,
    hidden_width_of,
    labels_of,
    load_tokenizer,
    logit_width_of,
    model_source,
    problem_type_of,
    weights_digest,
)
from teacher_cache.thresholds import find_threshold, inclusion

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

_SAMPLE_DOCUMENTS = 512
_WRITTEN_DOCUMENTS = 64  # of the sample, where the teacher has to write them first
_SAMPLE_TOKENS = 1 << 20  # the sample stops here even if few documents were read
_LEARN_TOKENS = 1 << 14  # tokens the teacher runs over to learn the order of the classes
_MIN_SHARD_TOKENS = 1 << 15  # smaller shards are all overhead, however small the corpus
_SHARDS_WANTED = 64  # so that a few workers can share even a small corpus
DEFAULT_TOP_K = 32
AUTO_DENSE_CLASSES = 256  # 512 bytes a position, and every loss at every temperature is exact
_FORWARD_TOKENS = {"cpu": 4096, "cuda": 32768}  # tried first; halved until it fits the memory


@dataclass(frozen=True, slots=True)
class Draft:
    """A job before calibration: what was asked for, and what it was asked of."""

    config: CaptureConfig
    corpus: Corpus
    tokenizer: "PreTrainedTokenizerBase"
    tokenizer_info: TokenizerInfo
    teacher: Teacher | None
    teacher_info: TeacherInfo | None
    preprocessing: Preprocessing
    targets: TargetSpec
    hidden: HiddenSpec
    labels: tuple[str, ...] = ()  # names of the classes of a label space
    problem_type: ProblemType = "single_label"
    learnt: bytes | None = None  # of the cache given by --like

    def build_rows(
        self, documents: Iterable[tuple[int, Any]], counters: Counter[str]
    ) -> Iterator[Row]:
        """Rows of (index, document) pairs, in order; what is left out is counted."""
        context = RowContext(
            self.config.task,
            self.tokenizer,
            self.preprocessing,
            self.labels,
            self.config.seed,
            self.problem_type,
            self.hidden.pooling,
        )
        return build_rows(documents, context, counters)

    def writer(self, forward_tokens: int) -> Writer:
        """Writes the targets of a job with --generate."""
        assert self.teacher is not None  # CaptureConfig refuses --generate without targets
        spec = self.preprocessing.generation
        assert spec is not None  # with --generate there is one
        task, options = self.config.task, self.preprocessing
        return Writer(task, self.tokenizer, options, spec, self.teacher, forward_tokens)

    def asked(self) -> dict[str, Any]:
        """Every field that a second run must ask for alike; compared before it may go on."""
        return {
            "task": self.config.task,
            "labels": self.labels,
            "problem_type": self.problem_type,
            "teacher": None if self.teacher_info is None else asdict(self.teacher_info),
            "tokenizer": asdict(self.tokenizer_info),
            "corpus": asdict(self.corpus.info),
            "preprocessing": asdict(self.preprocessing),
            "targets": _asked_targets(asdict(self.targets)),
            "hidden": asdict(self.hidden),
            "seed": self.config.seed,
            "nonfinite": self.config.nonfinite,
            "shard_tokens": self.config.shard_tokens,
            "forward_tokens": self.config.forward_tokens,
        }


def _asked_targets(targets: dict[str, Any]) -> dict[str, Any]:
    """Of a target spec what was asked for: the threshold was found."""
    return {name: value for name, value in targets.items() if name != "threshold"}


@dataclass(frozen=True, slots=True)
class Sample:
    """What a spread-out sample of the corpus says about all of it."""

    documents: int
    tokens: int
    positions: int
    rows: tuple[Row, ...]
    counters: Counter[str]
    token_counts: np.ndarray

    @property
    def tokens_per_document(self) -> float:
        return self.tokens / max(1, self.documents)


def resolve(config: CaptureConfig, *, load_teacher: bool = True) -> Draft:
    """Opens corpus, tokenizer and teacher, and refuses what cannot work before any GPU hour.

    Without `load_teacher` (for `plan`) only the teacher's config and tokenizer are read.
    """
    old = None if config.like is None else Storage(config.like)
    if old is not None:
        config = _as_in(config, manifests.read(old)[0])
    corpus = open_corpus(config)
    problem_type = problem_type_for(config, corpus)
    wants_teacher = load_teacher and config.uses_teacher
    teacher = _load_teacher(config, problem_type) if wants_teacher else None
    name = config.tokenizer or config.teacher
    assert name is not None  # CaptureConfig refuses a job without either
    tokenizer = load_tokenizer(name, revision=None if config.tokenizer else config.revision)
    info = describe(tokenizer)
    labels = _labels(config, corpus, teacher, problem_type)
    num_classes = len(labels) or _num_classes(config, teacher, info)
    draft = Draft(
        config=config,
        corpus=corpus,
        tokenizer=tokenizer,
        tokenizer_info=info,
        teacher=teacher,
        teacher_info=None if teacher is None else teacher_info(config.teacher or "", teacher),
        preprocessing=_preprocessing(config, corpus, tokenizer, teacher),
        targets=_target_spec(config, num_classes, problem_type),
        hidden=_hidden_spec(config, teacher),
        labels=labels,
        problem_type=problem_type,
    )
    return draft if old is None else _like(draft, old)


def _as_in(config: CaptureConfig, old: Manifest) -> CaptureConfig:
    """The options with those of --like's cache that decide whether two caches train together."""
    targets, masked = old.targets, config.task == old.task == "masked-lm"
    return replace(
        config,
        like=None,
        targets="auto" if targets.kind == "values" else targets.kind,
        problem_type=old.problem_type if TASKS[config.task].layout == "row" else "auto",
        mean_entries=targets.mean_entries if targets.ragged else config.mean_entries,
        top_k=targets.top_k if targets.kind == "topk" else None,
        value_bits=targets.value_bits
        if targets.kind in ("topk", *RAGGED_KINDS)
        else config.value_bits,
        temperature=old.targets.temperatures,
        hidden_layers=old.hidden.layers,
        hidden_codec=old.hidden.codec,
        hidden_every=old.hidden.every,
        pooling=old.hidden.pooling if config.task == old.task == "feature-extraction" else "auto",
        max_length=old.preprocessing.max_length,
        max_target_length=config.max_target_length
        if config.generate
        else old.preprocessing.max_target_length,
        stride=old.preprocessing.stride,
        pack=old.preprocessing.pack,
        decoder_start=start if (start := old.preprocessing.decoder_start) >= 0 else "auto",
        mask_copies=old.preprocessing.mask_copies if masked else config.mask_copies,
        mask_share=old.preprocessing.mask_share if masked else config.mask_share,
    )


def _like(draft: Draft, old: Storage) -> Draft:
    """Refuses another teacher or tokenizer than the old cache's, and takes over what it learnt."""
    manifest, _ = manifests.read(old)
    fields = asdict(manifest)
    fields["targets"] = _asked_targets(fields["targets"])
    names = {"teacher", "tokenizer", "targets", "hidden", "problem_type"}
    if draft.teacher is None:  # of a plan that reads no weights nobody can say whose they are
        names.remove("teacher")
    asked = {name: value for name, value in draft.asked().items() if name in names}
    lines = list(manifests.differences({name: fields[name] for name in names}, asked))
    if lines:
        raise CacheMismatch(
            f"--like {old.root}: the new documents would not train together with it. "
            f"{'; '.join(lines)}."
        )
    names_learnt = [name for name in manifest.side_files if name.startswith("learnt-")]
    learnt = old.read(names_learnt[0]) if names_learnt else None
    return replace(draft, targets=manifest.targets, learnt=learnt)


def problem_type_for(config: CaptureConfig, corpus: Corpus) -> ProblemType:
    """As asked, else as the teacher's config says, else as the column of labels looks."""
    if TASKS[config.task].layout != "row":
        return "single_label"
    its = None
    if config.teacher is not None and config.targets != "none":
        its = problem_type_of(config.teacher, config.revision)
    if config.problem_type == "auto":
        return its or corpus.problem_type
    if its not in (None, config.problem_type):
        log.warning(
            "--problem-type %s: the config of %s says %s; its logits are read as asked for",
            *(config.problem_type, config.teacher, its),
        )
    return config.problem_type


def _load_teacher(config: CaptureConfig, problem_type: ProblemType) -> Teacher:
    assert config.teacher is not None  # CaptureConfig refuses targets without a teacher
    attention = config.attn_implementation
    teacher = Teacher.load(
        config.teacher,
        task=config.task,
        problem_type=problem_type,
        max_length=config.max_length,
        tokenizer=config.tokenizer,
        revision=config.revision,
        dtype=config.dtype,
        device=config.device,
        attn_implementation=None if attention == "auto" else attention,
        trust_remote_code=config.trust_remote_code,
    )
    if config.task in (
        "masked-lm",
        "feature-extraction",
    ):  # other tasks have rows of their documents' length
        teacher.check_length(config.max_length)
    if config.layers:
        teacher.check_layers(config.layers)
    if config.pack and not teacher.allows_packing():
        raise Refused(
            f"--pack: packed and alone, {config.teacher} gives different outputs (its documents "
            "see "
            "each other), so packing would be wrong. Use --no-pack: rows of similar length are "
            "batched together anyway."
        )
    return teacher


def teacher_info(name: str, teacher: Teacher) -> TeacherInfo:
    """What the manifest says of a teacher loaded as `name`."""
    folder = Path(name)
    return TeacherInfo(
        id=folder.resolve().name if folder.is_dir() else name,
        revision=teacher.revision or "local",
        config_hash=config_hash(teacher.model),
        weights_digest=weights_digest(teacher.model),
        dtype=str(teacher.dtype).removeprefix("torch."),
        attn_implementation=teacher.attn_implementation or "unknown",
        parameters=sum(parameter.numel() for parameter in teacher.model.parameters()),
    )


def _num_classes(config: CaptureConfig, teacher: Teacher | None, info: TokenizerInfo) -> int:
    if TASKS[config.task].target_space == "tokens":
        return config.max_length
    if teacher is not None:
        return teacher.num_classes
    if not config.uses_teacher or config.teacher is None:
        return info.num_ids
    return min(info.num_ids, logit_width_of(config.teacher, config.revision))


def _labels(
    config: CaptureConfig, corpus: Corpus, teacher: Teacher | None, problem_type: ProblemType
) -> tuple[str, ...]:
    """The names of the classes: as asked, else the teacher's, else those in the corpus."""
    if TASKS[config.task].target_space != "labels":
        return ()
    asked = () if config.labels is None else read_labels(config.labels)
    its: tuple[str, ...] = ()
    if teacher is not None:
        its = teacher.labels
    elif config.teacher is not None and config.targets != "none":  # `plan` reads no weights
        its = labels_of(config.teacher, config.revision)
    if asked and its and asked != its:
        first = next((pair for pair in zip(asked, its, strict=False) if pair[0] != pair[1]), None)
        raise CacheMismatch(
            f"--labels {config.labels}: {len(asked)} names, where {config.teacher} has {len(its)}"
            + (f"; the first that differ are {first[0]!r} and {first[1]!r}" if first else "")
            + ". Classes are the teacher's: leave --labels out, or set its id2label."
        )
    if its == tuple(f"LABEL_{number}" for number in range(len(corpus.class_names))):
        its = corpus.class_names  # the teacher was given no names, the corpus was
    labels = asked or its or corpus.labels(problem_type)
    fewest = 2 if problem_type == "single_label" else 1
    if len(labels) < fewest:
        raise CorpusError(
            f"{config.corpus}: {len(labels)} different labels, expected at least {fewest}"
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


def _preprocessing(
    config: CaptureConfig,
    corpus: Corpus,
    tokenizer: "PreTrainedTokenizerBase",
    teacher: Teacher | None,
) -> Preprocessing:
    masked, of_pairs = config.task == "masked-lm", TASKS[config.task].layout == "pair"
    return Preprocessing(
        split=config.split,
        columns=tuple(f"{role}={column}" for role, column in corpus.columns.items()),
        sample_by=config.sample_by,
        encoding_errors=config.encoding_errors,
        limit_documents=config.limit_documents,
        max_length=config.max_length,
        pack=config.pack,
        mask_copies=config.mask_copies if masked else 0,
        mask_share=config.mask_share if masked else 0.0,
        mask_seed=config.seed if masked else 0,
        stride=config.stride,
        max_target_length=config.max_new_tokens
        if of_pairs and config.generate
        else config.max_target_length,
        decoder_start=_decoder_start(config, tokenizer) if of_pairs else -1,
        generation=_generation(config, teacher) if config.generate else None,
    )


def _generation(config: CaptureConfig, teacher: Teacher | None) -> GenerationSpec:
    return GenerationSpec(
        num_beams=config.num_beams,
        max_new_tokens=config.max_new_tokens,
        temperature=config.sample_temperature,
        top_p=config.top_p,
        seed=config.seed if config.sample_temperature else 0,
        writer="" if teacher is None else writer_hash(teacher),  # `plan` reads no weights
    )


def _decoder_start(config: CaptureConfig, tokenizer: "PreTrainedTokenizerBase") -> int:
    """As the teacher has it; without one as asked, else as T5, Marian and BART choose it."""
    its = None
    if config.teacher is not None:
        its = decoder_start_of(model_source(config.teacher), config.revision)
    asked = None if config.decoder_start == "auto" else config.decoder_start
    if asked is not None and its is not None and asked != its:
        raise CacheMismatch(
            f"--decoder-start {asked}: the decoder of {config.teacher} starts from token {its}. "
            "Leave --decoder-start out."
        )
    if its is None and asked is None and config.targets != "none":
        raise Refused(
            f"{config.teacher}: neither its generation_config.json nor its config.json has a "
            "decoder_start_token_id, so it cannot be told what its decoder starts from. Say it "
            "with --decoder-start (T5 and Marian: the padding token, BART: the end of a text)."
        )
    known = (its, asked, tokenizer.pad_token_id, tokenizer.bos_token_id)
    start = next((token for token in known if token is not None), document_ends(tokenizer).eos[0])
    num_ids = max(tokenizer.get_vocab().values()) + 1
    if start >= num_ids:
        raise ConfigError(
            f"--decoder-start {start}: the tokenizer has {num_ids:,} tokens, counted from 0"
        )
    return start


def _target_spec(config: CaptureConfig, num_classes: int, problem_type: ProblemType) -> TargetSpec:
    if problem_type == "regression":
        if config.targets == "dense" or config.temperature:
            raise ConfigError(
                "--targets dense and --temperature are of probabilities, but labels are numbers "
                "here (--problem-type regression). Leave them out"
            )
        values: TargetKind = "none" if config.targets == "none" else "values"
        return TargetSpec(kind=values, num_classes=1, top_k=1, value_bits=16)
    if problem_type == "multi_label":
        num_classes = 2  # of each label: no and yes
    kind: TargetKind
    if TASKS[config.task].target_space == "states":
        kind = "none"
    elif config.targets == "auto":
        few = TASKS[config.task].target_space != "vocabulary"
        asked_for_topk = config.top_k is not None or any(t != 1 for t in config.temperature)
        if few or num_classes <= AUTO_DENSE_CLASSES:
            kind = "dense"
        else:
            kind = "topk" if asked_for_topk else "sample"
    else:
        kind = config.targets
    top_k = DEFAULT_TOP_K if config.top_k is None else config.top_k
    if kind == "topk" and top_k > num_classes:
        raise ConfigError(
            f"--top-k {top_k} exceeds the teacher's {num_classes} classes; "
            f"use --top-k {num_classes} to keep them all"
        )
    return TargetSpec(
        kind=kind,
        num_classes=num_classes,
        top_k=top_k if kind == "topk" else 1,
        mean_entries=config.mean_entries if kind in RAGGED_KINDS else 0.0,
        value_bits=16 if kind == "dense" else config.value_bits,
        # Every temperature is exact where every class is there.
        temperatures=()
        if kind == "dense"
        else tuple(sorted({t for t in config.temperature if t != 1.0})),
    )


def _hidden_spec(config: CaptureConfig, teacher: Teacher | None) -> HiddenSpec:
    layers, width = config.layers, 0
    if layers and teacher is not None:
        width = teacher.hidden_width
    elif layers and config.teacher is not None:  # `plan` reads no weights
        width = hidden_width_of(config.teacher, config.revision)
    return HiddenSpec(
        layers=layers,
        widths=(width,) * len(layers),
        codec=config.hidden_codec,
        every=config.hidden_every,
        pooling=config.pooled,
    )


def sample_corpus(draft: Draft) -> Sample:
    """Tokenizes documents spread over the corpus, always the same ones."""
    total = len(draft.corpus)
    picked = np.unique(np.linspace(0, total - 1, min(total, _SAMPLE_DOCUMENTS)).astype(np.int64))
    spread = sorted(picked.tolist(), key=lambda index: (index * 2654435761) % (1 << 32))
    counters: Counter[str] = Counter()
    token_counts = np.zeros(draft.tokenizer_info.num_ids, np.int64)
    built: list[Row] = []
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
    if draft.teacher is None:
        return stand_ins(few, draft.config.task, draft.tokenizer, options, counters)
    asked = draft.config.forward_tokens
    tokens = default_forward_tokens(draft.teacher) if asked == "auto" else asked
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
    if draft.teacher is not None:
        forward_tokens = _largest_forward(draft.teacher, draft, sample)
        chunk_positions = draft.teacher.chunk_positions
        targets, learnt = draft.targets, draft.learnt
        if learnt is None and targets.kind != "values":
            targets, learnt = _learn(draft, draft.teacher, sample, forward_tokens)
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
    its_labels, layout = TASKS[draft.config.task].labels, TASKS[draft.config.task].layout
    windows, pairs = layout == "window", layout == "pair"
    columns = optional_columns(
        segments=draft.preprocessing.pack or windows or pairs,
        references=windows or pairs or draft.preprocessing.generation is not None,
        positions=(draft.corpus.supervised or its_labels != "next")
        and draft.problem_type == "single_label",
        labels=its_labels == "stored" and draft.problem_type != "regression",
        label_values=draft.problem_type == "regression",
        targets=draft.targets.kind not in ("values", "none"),
        token_types="text_pair" in draft.corpus.columns or windows,
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
        columns=tuple(columns),
        plan=plan,
        seed=draft.config.seed,
        nonfinite=draft.config.nonfinite,
        origin=None,
        side_files={name: xxhash.xxh3_128_hexdigest(data) for name, data in side_files.items()},
        labels=draft.labels,
        problem_type=draft.problem_type,
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


def _largest_forward(teacher: Teacher, draft: Draft, sample: Sample) -> int:
    """Tokens of one forward: as asked, else the most the device holds, tried on real rows."""
    asked = draft.config.forward_tokens
    tokens = default_forward_tokens(teacher) if asked == "auto" else asked
    longest = max(sample.rows, key=lambda row: len(row.input_ids))
    while not _fits(draft, teacher, longest, tokens):
        count = max(1, tokens // len(longest.input_ids))
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
        torch.cuda.empty_cache()  # outside the `except`, whose error holds what did not fit
        tokens //= 2
    return tokens


def _fits(draft: Draft, teacher: Teacher, row: Row, forward_tokens: int) -> bool:
    """Whether as many such rows as one forward takes fit into the device's memory."""
    count = max(1, forward_tokens // len(row.input_ids))
    try:
        run_largest(draft, teacher, [row] * count, forward_tokens)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def default_forward_tokens(teacher: Teacher) -> int:
    """Tokens of one forward before calibration has tried it."""
    return _FORWARD_TOKENS.get(teacher.device.type, _FORWARD_TOKENS["cpu"])


def _largest_classes(spec: TargetSpec) -> TargetSpec:
    """As many of the largest classes as any position of this kind keeps."""
    if spec.kind == "values":
        return spec
    most = min(spec.num_classes, spec.num_entries if spec.kind == "topk" else MAX_ENTRIES)
    return TargetSpec(kind="topk", num_classes=spec.num_classes, top_k=most)


@dataclass(frozen=True, slots=True)
class Largest:
    """The largest classes of N positions, descending, and what the asked-for layers look like."""

    ids_NK: Tensor
    logprobs_NK: Tensor
    statistics: dict[int, ChannelStatistics]
    ordinary: dict[int, ChannelStatistics]  # without the massive states

    def scales(self, hidden: HiddenSpec) -> dict[int, ChannelScale]:
        """Centre and unit of each channel of each layer, where the codec has them."""
        if hidden.codec != "int8":
            return {}
        return {layer: int8_scale(channel) for layer, channel in self.ordinary.items()}


def run_largest(draft: Draft, teacher: Teacher, chosen: list[Row], forward_tokens: int) -> Largest:
    """Runs the teacher over some rows."""
    spec = _largest_classes(draft.targets)
    largest: list[tuple[Tensor, Tensor]] = []
    statistics: dict[int, ChannelStatistics] = {}
    ordinary: dict[int, ChannelStatistics] = {}
    layout, packed = TASKS[draft.config.task].layout, draft.preprocessing.pack
    hidden = draft.hidden
    for batch in forward_batches(chosen, forward_tokens, packed=packed, layout=layout):
        output = teacher.forward(batch.inputs, hidden.layers, pooling=hidden.pooling)
        for _, logits in output.chunks:
            selected = values_of(logits) if spec.kind == "values" else select(logits, spec)
            good = ~selected.bad_N
            largest.append((selected.ids[good].cpu(), selected.logprobs[good].cpu()))
        for layer, states in output.hidden.items():
            finite = states[states.isfinite().all(dim=1)]  # --nonfinite drop leaves out the rest
            bits = finite.to("cpu", torch.bfloat16).view(torch.uint16).numpy()
            for found, some in ((statistics, bits), (ordinary, without_massive(bits))):
                of_batch = ChannelStatistics.of(some)
                found[layer] = found[layer].merge(of_batch) if layer in found else of_batch
    nothing = torch.zeros(0, 1, dtype=torch.int64), torch.zeros(0, 1)
    parts = zip(*(largest or [nothing]), strict=True)
    ids_NK, logprobs_NK = (torch.cat(each) for each in parts)
    return Largest(ids_NK, logprobs_NK, statistics, ordinary)


def _learn(
    draft: Draft, teacher: Teacher, sample: Sample, forward_tokens: int
) -> tuple[TargetSpec, bytes]:
    """The targets with their threshold, and the learnt side file: classes in order of how often
    they are kept, channel statistics."""
    largest = run_largest(draft, teacher, learning_rows(sample), forward_tokens)
    targets, ranks = learn_targets(draft.targets, largest, sample)
    arrays: dict[str, np.ndarray] = {"class_by_rank": ranks.classes}
    for layer, channel in largest.statistics.items():
        arrays[f"hidden.{layer}.mean"] = channel.mean.astype(np.float32)
        arrays[f"hidden.{layer}.std"] = channel.std.astype(np.float32)
    for layer, scale in largest.scales(draft.hidden).items():
        arrays[f"hidden.{layer}.centre"] = scale.centre
        arrays[f"hidden.{layer}.unit"] = scale.unit
    return targets, save_safetensors(arrays)


def learning_rows(sample: Sample) -> list[Row]:
    """The rows that the teacher runs over before anything is captured."""
    chosen: list[Row] = []
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
    if spec.kind == "topk":
        ids_NK, logprobs_NK = ids_NK[:, : spec.num_entries], logprobs_NK[:, : spec.num_entries]
    share_NK = torch.ones_like(logprobs_NK)
    if spec.ragged:
        if not spec.threshold:  # --like brings its own
            spec = replace(spec, threshold=find_threshold(logprobs_NK, spec))
        share_NK, _ = inclusion(logprobs_NK, spec.kind, spec.threshold)
    kept = np.bincount(ids_NK.flatten(), share_NK.flatten().double(), spec.num_classes)
    seen = sample.token_counts[: len(kept)]
    kept[: len(seen)] += seen
    return spec, ClassRanks.from_counts(np.rint(kept * 16))


def publish_or_adopt(draft: Draft, storage: Storage) -> tuple[Manifest, str]:
    """The manifest all workers of this cache follow: the first one's. Returns it and its id."""
    if not storage.exists(manifests.MANIFEST):
        manifest, side_files = calibrate(draft)
        for name, data in side_files.items():
            storage.put_new(name, data)
        manifests.publish(storage, manifest)
    manifests.write_hash(storage)
    manifest, cache_id = manifests.read(storage)
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
    fields = asdict(manifest)
    found = {key: fields.get(key) for key in draft.asked()}
    found["targets"] = _asked_targets(fields["targets"])
    found["shard_tokens"] = manifest.plan.asked_shard_tokens
    found["forward_tokens"] = manifest.plan.asked_forward_tokens
    lines = list(manifests.differences(found, draft.asked()))
    if lines:
        raise CacheMismatch(
            f"{storage.root}: this folder holds another cache. "
            + "; ".join(lines)
            + ". Choose another --out, or ask for the same thing to go on with this one."
        )
