"""What a capture job is: its options resolved into teacher, tokenizer, corpus, rows and targets.

Nothing is measured here and nothing written: what cannot work is refused before any GPU hour, and
`plan.py` calibrates and publishes what this module has found out.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from shared import compat
from shared.errors import CacheMismatch, ConfigError, CorpusError, Refused
from shared.fit_rules import Side
from shared.format import manifest_file
from shared.format.manifest import (
    GenerationSpec,
    HiddenSpec,
    Manifest,
    Preprocessing,
    TeacherInfo,
    TokenizerInfo,
)
from shared.models.decoding import decoder_start_of
from shared.models.tokenizer import describe
from shared.storage import LocalStorage, Storage
from shared.targets.base import TargetKind
from shared.targets.kinds import RAGGED_KINDS
from shared.targets.spec import TargetSpec
from shared.tasks import TASKS, ProblemType
from teacher_cache.config import CaptureConfig
from teacher_cache.config.targets import Targets
from teacher_cache.corpus.sources import Corpus, open_corpus
from teacher_cache.engines.generation import Writer, writer_hash
from teacher_cache.engines.teacher import (
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
from teacher_cache.tasks.row_builders import RowContext, build_rows
from teacher_cache.tasks.rows import Row, document_ends

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

DEFAULT_TOP_K = 32
AUTO_DENSE_CLASSES = 256  # 512 bytes a position, and every loss at every temperature is exact


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

    @property
    def labelled(self) -> bool:
        """Whether rows have hard labels, where their task stores some."""
        has = {"label", "tags"} & self.corpus.columns.keys()
        return bool(has) or not TASKS[self.config.task].unlabelled

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
            self.labelled,
        )
        return build_rows(documents, context, counters)

    def writer(self, forward_tokens: int) -> Writer:
        """Writes the targets of a job with --generate."""
        assert self.teacher is not None  # CaptureConfig refuses --generate without targets
        spec = self.preprocessing.generation
        assert spec is not None  # with --generate there is one
        task, options = self.config.task, self.preprocessing
        return Writer(task, self.tokenizer, options, spec, self.teacher, forward_tokens)

    def asked_of(self, cached: Manifest) -> Manifest:
        """The manifest of a cache that this job asks for, had it learnt what `cached` did."""
        plan = replace(
            cached.plan,
            asked_shard_tokens=self.config.shard_tokens,
            asked_forward_tokens=self.config.forward_tokens,
        )
        return replace(
            cached,
            task=self.config.task,
            teacher=self.teacher_info,
            tokenizer=self.tokenizer_info,
            corpus=self.corpus.info,
            preprocessing=self.preprocessing,
            targets=self.targets,
            hidden=self.hidden,
            plan=plan,
            seed=self.config.seed,
            nonfinite=self.config.nonfinite,
            origin=None,
            labels=self.labels,
            problem_type=self.problem_type,
            labelled=self.labelled,
        )


def resolve(config: CaptureConfig, *, load_teacher: bool = True) -> Draft:
    """Opens corpus, tokenizer and teacher, and refuses what cannot work before any GPU hour.

    Without `load_teacher` (for `plan`) only the teacher's config and tokenizer are read.
    """
    old = None if config.like is None else LocalStorage(config.like)
    if old is not None:
        config = _as_in(config, manifest_file.read(old)[0])
    corpus = open_corpus(config)
    problem_type = problem_type_for(config, corpus)
    wants_teacher = load_teacher and config.uses_teacher
    teacher = _load_teacher(config, problem_type) if wants_teacher else None
    name = config.tokenizer or config.teacher
    assert name is not None  # CaptureConfig refuses a job without either
    tokenizer = load_tokenizer(name, revision=None if config.tokenizer else config.revision)
    info = describe(tokenizer)
    known = () if old is None else manifest_file.read(old)[0].labels
    labels = _labels(config, corpus, teacher, problem_type, known)
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
        targets="auto" if targets.numbers else cast(Targets, targets.kind),
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
    manifest, _ = manifest_file.read(old)
    asked = draft.asked_of(manifest)
    if draft.teacher is None:  # of a plan that reads no weights nobody can say whose they are
        asked = replace(asked, teacher=manifest.teacher)
    compat.check("like", Side(str(old.root), manifest), Side("the new documents", asked))
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
    return TeacherInfo(
        id=teacher_id(name),
        revision=teacher.revision or "local",
        config_hash=config_hash(teacher.model),
        weights_digest=weights_digest(teacher.model),
        dtype=str(teacher.dtype).removeprefix("torch."),
        attn_implementation=teacher.attn_implementation or "unknown",
        parameters=sum(parameter.numel() for parameter in teacher.model.parameters()),
    )


def teacher_id(name: str) -> str:
    """The Hub id, or the name of the folder without where it lies."""
    folder = Path(name)
    return folder.resolve().name if folder.is_dir() else name


def _num_classes(config: CaptureConfig, teacher: Teacher | None, info: TokenizerInfo) -> int:
    if TASKS[config.task].target_space == "tokens":
        return config.max_length
    if teacher is not None:
        return teacher.num_classes
    if not config.uses_teacher or config.teacher is None:
        return info.num_ids
    return min(info.num_ids, logit_width_of(config.teacher, config.revision))


def _labels(
    config: CaptureConfig,
    corpus: Corpus,
    teacher: Teacher | None,
    problem_type: ProblemType,
    known: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """The names of the classes: as asked, else the teacher's, else those in the corpus.

    Where the teacher has none, those `known` from the cache of --like come before the corpus's,
    which may lack some, or all.
    """
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
    if its == tuple(f"LABEL_{number}" for number in range(len(its))):
        # The teacher was given no names, the corpus was.
        named = (known, corpus.class_names)
        its = next((names for names in named if len(names) == len(its) and names != its), its)
    labels = asked or its or known or corpus.labels(problem_type)
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
