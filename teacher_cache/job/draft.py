"""What a capture job is: its options resolved into engine, tokenizer, corpus, rows and targets.

Nothing is measured here and nothing written: what cannot work is refused before any GPU hour, and
`calibrate.py` calibrates and publishes what this module has found out.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from shared.format import manifest_file
from shared.format.manifest import HiddenSpec, Manifest, Preprocessing, TeacherInfo, TokenizerInfo
from shared.models.tokenizer import describe
from shared.storage.local import LocalStorage
from shared.targets.spec import TargetSpec
from shared.tasks import ProblemType
from teacher_cache.config import CaptureConfig
from teacher_cache.corpus.corpus import Corpus
from teacher_cache.corpus.sources import open_corpus
from teacher_cache.engines.base import Engine, LoadEngine
from teacher_cache.engines.loading import hidden_width_of, load_tokenizer, logit_width_of
from teacher_cache.engines.table import DEFAULT_ENGINE, ENGINES
from teacher_cache.job.labels import label_names, problem_type_for
from teacher_cache.job.like import as_in, check_alike, learnt_by
from teacher_cache.job.preprocessing import preprocessing_of
from teacher_cache.job.writing import Writer
from teacher_cache.select import kinds
from teacher_cache.tasks.base import RowContext, TeacherTask
from teacher_cache.tasks.rows import TrainingRow
from teacher_cache.tasks.table import task_for

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Draft:
    """A job before calibration: what was asked for, and what it was asked of."""

    config: CaptureConfig
    corpus: Corpus
    tokenizer: "PreTrainedTokenizerBase"
    tokenizer_info: TokenizerInfo
    engine: Engine | None
    teacher_info: TeacherInfo | None
    preprocessing: Preprocessing
    targets: TargetSpec
    hidden: HiddenSpec
    labels: tuple[str, ...] = ()  # names of the classes of a label space
    problem_type: ProblemType = "single_label"
    learnt: bytes | None = None  # of the cache given by --like

    @property
    def task(self) -> TeacherTask:
        return task_for(self.config.task, self.problem_type)

    @property
    def labelled(self) -> bool:
        """Whether rows have hard labels, where their task stores some."""
        return self.task.labelled(self.corpus.columns)

    def build_rows(
        self, documents: Iterable[tuple[int, Any]], counters: Counter[str]
    ) -> Iterator[TrainingRow]:
        """Rows of (index, document) pairs, in order; what is left out is counted."""
        context = RowContext(
            self.tokenizer, self.preprocessing, self.labels, self.hidden.pooling, self.labelled
        )
        return self.task.build_rows(documents, context, counters)

    def writer(self, forward_tokens: int) -> Writer:
        """Writes the targets of a job with --generate."""
        assert self.engine is not None  # CaptureConfig refuses --generate without targets
        spec = self.preprocessing.generation
        assert spec is not None  # with --generate there is one
        return Writer(
            self.task, self.tokenizer, self.preprocessing, spec, self.engine, forward_tokens
        )

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


def resolve(
    config: CaptureConfig,
    *,
    load_teacher: bool = True,
    load_engine: LoadEngine = ENGINES[DEFAULT_ENGINE],
) -> Draft:
    """Opens corpus, tokenizer and teacher, and refuses what cannot work before any GPU hour.

    Without `load_teacher` (for `plan`) only the teacher's config and tokenizer are read.
    """
    old = None if config.like is None else LocalStorage(config.like)
    manifest = None if old is None else manifest_file.read(old)[0]
    if manifest is not None:
        config = as_in(config, manifest)
    corpus = open_corpus(config)
    task = task_for(config.task, problem_type_for(config, corpus))
    engine = load_engine(config, task) if load_teacher and config.uses_teacher else None
    tokenizer = _tokenizer(config)
    info = describe(tokenizer)
    labels = label_names(config, corpus, task, engine, () if manifest is None else manifest.labels)
    num_classes = task.num_classes(config, len(labels), lambda: _vocabulary(config, engine, info))
    draft = Draft(
        config=config,
        corpus=corpus,
        tokenizer=tokenizer,
        tokenizer_info=info,
        engine=engine,
        teacher_info=None if engine is None else engine.info(),
        preprocessing=preprocessing_of(config, corpus, tokenizer, task, engine),
        targets=kinds.asked_targets(config, task, num_classes),
        hidden=_hidden_spec(config, engine),
        labels=labels,
        problem_type=task.problem_type,
    )
    if old is None or manifest is None:
        return draft
    check_alike(old, manifest, draft.asked_of(manifest), reads_weights=engine is not None)
    return replace(draft, targets=manifest.targets, learnt=learnt_by(old, manifest))


def _tokenizer(config: CaptureConfig) -> "PreTrainedTokenizerBase":
    name = config.tokenizer or config.teacher
    assert name is not None  # CaptureConfig refuses a job without either
    return load_tokenizer(name, revision=None if config.tokenizer else config.revision)


def _vocabulary(config: CaptureConfig, engine: Engine | None, info: TokenizerInfo) -> int:
    """Classes where they are neither labels nor tokens of a row."""
    if engine is not None:
        return engine.num_classes
    if not config.uses_teacher or config.teacher is None:
        return info.num_ids
    return min(info.num_ids, logit_width_of(config.teacher, config.revision))


def _hidden_spec(config: CaptureConfig, engine: Engine | None) -> HiddenSpec:
    layers, width = config.layers, 0
    if layers and engine is not None:
        width = engine.hidden_width
    elif layers and config.teacher is not None:  # `plan` reads no weights
        width = hidden_width_of(config.teacher, config.revision)
    return HiddenSpec(
        layers=layers,
        widths=(width,) * len(layers),
        codec=config.hidden_codec,
        every=config.hidden_every,
        pooling=config.pooled,
    )
