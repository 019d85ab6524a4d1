"""The student: built from a folder or a Hub id, checked against the cache before the first step.

Weights come from safetensors only, and no code that comes with a model is ever run.
"""

import logging
from collections.abc import Sequence
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from shared.cache import Cache
from shared.errors import CacheMismatch, ConfigError, Refused
from shared.positions import most_tokens
from shared.tasks import TASKS, ProblemType, TaskName
from shared.tokenizer import content_hash, load_cached_tokenizer
from shared.windows import PLACES
from student_train.config import AdapterSpec, TrainConfig
from student_train.encoder_decoder import (
    check_decoder_start,
    check_lengths,
    generation_config,
    num_blocks,
    set_tokens,
)

log = logging.getLogger(__name__)

FEW_KEPT = 0.8  # at T=2 the best 32 keep 62 % of a strong teacher, at T=4 32 %

# As `transformers` names them: its own loss and its pipelines go by it.
PROBLEM_TYPES: dict[ProblemType, str] = {
    "single_label": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}

_DROPOUTS = ("dropout", "dropout_prob", "dropout_rate", "pdrop")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "tokenizer.model")


def build_student(name: str, cache: Cache, *, seed: int, dropout: float | None = None) -> Any:
    """A pretrained student, one with adapters, or fresh weights where there is only config.json.

    With `dropout` in place of its own, if it is given. For the task of the cache: on a label space
    its head has the classes of the cache; a student without a head for the task gets a new one.
    """
    transformers.utils.logging.disable_progress_bar()
    config = load_config(name)
    task, folder = cache.manifest.task, Path(name)
    if (folder / "adapter_config.json").is_file():
        return _with_saved_adapters(folder, cache, seed=seed, dropout=dropout)
    if dropout is not None:
        set_dropout(name, config, dropout)
    auto: Any = getattr(transformers, TASKS[task].auto_class)
    of_labels, of_tokens = (TASKS[task].target_space == each for each in ("labels", "tokens"))
    from_scratch = is_from_scratch(name)
    new_head = (of_labels or of_tokens) and not _has_head(config, task)
    if of_labels and (from_scratch or new_head or not _unnamed(cache.manifest.labels)):
        _name_labels(config, cache.manifest.labels)
    if of_tokens and (from_scratch or new_head):
        config.num_labels = len(PLACES)
    if of_labels or of_tokens:
        _set_padding(config, cache, keep_own=not from_scratch)
    if TASKS[task].layout == "pair" and from_scratch:
        set_tokens(config, cache)
    if TASKS[task].layout == "row":
        # What the loss is, for who serves it.
        config.problem_type = PROBLEM_TYPES[cache.manifest.problem_type]
    torch.manual_seed(seed)
    if from_scratch:
        log.info("%s: no weights there, training from scratch", name)
        student = _without_pooler(auto.from_config(config, dtype=torch.float32), task)
        if TASKS[task].layout == "pair":
            student.generation_config = generation_config(config)
        return student
    if new_head:
        log.info("%s: it has no head for %s, a new one is made", name, task)
    try:
        # A head for another task may have the same name and another width; nothing else may differ.
        student, loaded = auto.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=new_head,
            output_loading_info=True,
        )
    except OSError as error:
        raise Refused(
            f"{name}: no weights in safetensors format could be loaded ({_first_line(error)}). "
            "Convert the model with save_pretrained, or name a folder with only config.json to "
            "train from scratch."
        ) from error
    body = f"{student.base_model_prefix}."
    wrong = sorted(key for key, *_ in loaded["mismatched_keys"] if key.startswith(body))
    if wrong:
        raise Refused(
            f"{name}: the weights of {wrong[0]} have another shape than its config.json says. "
            "Take both from the same model."
        )
    return _without_pooler(student, task)


def _without_pooler(student: Any, task: TaskName) -> Any:
    """Of a model for hidden states a pooler would be trained by nothing."""
    if TASKS[task].target_space == "states" and "pooler" in dict(student.named_children()):
        student.pooler = None
    return student


def _has_head(config: PretrainedConfig, task: TaskName) -> bool:
    """Whether the model was saved as one for this task, so that its labels mean something."""
    auto: Any = getattr(transformers, TASKS[task].auto_class)
    return auto._model_mapping[type(config)].__name__ in (config.architectures or ())


def _name_labels(config: PretrainedConfig, labels: tuple[str, ...]) -> None:
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}


def _set_padding(config: PretrainedConfig, cache: Cache, *, keep_own: bool) -> None:
    """A decoder takes the last token that is no padding for the whole row, so it must know it.

    Pretrained ones keep theirs; a tokenizer without padding pads with the end of a text.
    """
    text_config = config.get_text_config()
    own = text_config.pad_token_id
    if keep_own and own is not None and 0 <= own < text_config.vocab_size:
        return
    tokenizer = load_cached_tokenizer(cache.storage)
    known = [i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None]
    text_config.pad_token_id = known[0] if known else 0


def set_dropout(name: str, config: PretrainedConfig, dropout: float) -> None:
    """Every number of the config whose name says that it is the probability of a dropout.

    What is null there follows another one (BERT's classifier) and goes on doing so.
    """
    found = 0
    for each in {id(part): part for part in (config, config.get_text_config())}.values():
        for field, value in each.to_dict().items():
            numeric = isinstance(value, int | float) and not isinstance(value, bool)
            if numeric and field.endswith(_DROPOUTS):
                setattr(each, field, dropout)
                found += 1
    if not found:
        raise ConfigError(
            f"--dropout {dropout:g}: the config of {name} ({config.model_type}) has no dropout to "
            f"set, no number whose name ends in {', '.join(_DROPOUTS)}. Leave the option out."
        )


def _with_saved_adapters(folder: Path, cache: Cache, *, seed: int, dropout: float | None) -> Any:
    require_peft()
    from peft import PeftConfig, PeftModel

    base_name = str(PeftConfig.from_pretrained(folder).base_model_name_or_path)
    base = build_student(base_name, cache, seed=seed, dropout=dropout)
    return PeftModel.from_pretrained(base, folder)


def load_config(name: str) -> PretrainedConfig:
    """The model configuration of a folder or Hub id."""
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise Refused(f"{name}: no such folder")
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise Refused(
            f"{name}: no student could be loaded from here ({_first_line(error)}). Expected a Hub "
            "id, "
            "or a folder with config.json and, unless it is to train from scratch, safetensors."
        ) from error


def is_from_scratch(name: str) -> bool:
    """Whether this is a folder without weights."""
    return Path(name).is_dir() and not _has_weights(Path(name))


def _has_weights(folder: Path) -> bool:
    patterns = ("*.safetensors", "*.bin", "*.pt", "*.pth")
    return any(any(folder.glob(pattern)) for pattern in patterns)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def check_fit(name: str, config: PretrainedConfig, cache: Cache) -> None:
    """Refuses a student that the targets of the cache do not fit, naming both sides."""
    text_config = config.get_text_config()
    if TASKS[cache.manifest.task].target_space == "labels":
        _check_labels(name, config, cache)
    elif TASKS[cache.manifest.task].target_space == "tokens":
        _check_reads(name, config, cache)
    else:
        _check_vocabulary(name, text_config, cache)
    longest = int(cache.row_tokens.max(initial=0))
    places = _places(config, cache.manifest.task, longest)
    if cache.manifest.layout == "pair":
        _check_pair(name, config, cache, places)
    elif places is not None and longest > places:
        raise CacheMismatch(
            f"{name}: takes {places:,} positions, but the longest row of {cache.path} has "
            f"{longest:,} tokens. Cache again with --max-length {places}, or use another student."
        )
    _check_tokenizer(name, cache)


def _check_pair(name: str, config: PretrainedConfig, cache: Cache, places: int | None) -> None:
    auto: Any = transformers.AutoModelForSeq2SeqLM
    if type(config) not in auto._model_mapping:
        raise CacheMismatch(
            f"{name}: a model of type {config.model_type} is no encoder-decoder, which "
            f"{cache.path} was cached for. Use a T5, BART, Marian or the like."
        )
    if places is not None:
        check_lengths(name, places, cache)
    if not is_from_scratch(name):
        check_decoder_start(name, cache)


def _places(config: PretrainedConfig, task: TaskName, longest: int) -> int | None:
    """Tokens that a row may have; a model is built, without weights, where that may decide."""
    text_config = config.get_text_config()
    places = getattr(text_config, "max_position_embeddings", None)
    padding = getattr(text_config, "pad_token_id", None)
    if places is None or padding is None or not places - padding - 1 < longest <= places:
        return places
    auto: Any = getattr(transformers, TASKS[task].auto_class)
    if type(config) not in auto._model_mapping:
        return places
    with torch.device("meta"):
        most = most_tokens(auto.from_config(config))
    return places if most is None else most


def _check_vocabulary(name: str, text_config: PretrainedConfig, cache: Cache) -> None:
    classes = cache.manifest.targets.num_classes
    width = getattr(text_config, "vocab_size", None)
    if width is not None and width < classes:
        raise CacheMismatch(
            f"{name}: its head has {width:,} classes, but {cache.path} was cached over "
            f"{classes:,}. "
            "Use a student with the teacher's tokenizer (a wider head is fine), or cache a teacher "
            "with the student's."
        )


def _check_reads(name: str, config: PretrainedConfig, cache: Cache) -> None:
    """The student can be one for the task, and knows every token."""
    manifest, task = cache.manifest, cache.manifest.task
    auto: Any = getattr(transformers, TASKS[task].auto_class)
    if type(config) not in auto._model_mapping:
        raise CacheMismatch(
            f"{name}: transformers has no model of type {config.model_type} for {task}, the task "
            f"of {cache.path}. Use a student that {TASKS[task].auto_class} can load."
        )
    tokens = getattr(config.get_text_config(), "vocab_size", None)
    if tokens is not None and tokens < manifest.tokenizer.num_ids:
        raise CacheMismatch(
            f"{name}: it knows {tokens:,} tokens, but the rows of {cache.path} are made of "
            f"{manifest.tokenizer.num_ids:,}. Use a student with the teacher's tokenizer."
        )


def _check_labels(name: str, config: PretrainedConfig, cache: Cache) -> None:
    """The classes of a student that has a head for the task are those of the cache, in order."""
    manifest, task = cache.manifest, cache.manifest.task
    _check_reads(name, config, cache)
    if not _has_head(config, task) or is_from_scratch(name):
        return  # a new head takes the classes of the cache
    wanted = PROBLEM_TYPES[manifest.problem_type]
    if TASKS[task].layout == "row" and config.problem_type not in (None, wanted):
        raise CacheMismatch(
            f"{name}: its head is for {config.problem_type}, but {cache.path} is of {wanted}. Save "
            "its body alone (AutoModel.from_pretrained(...).save_pretrained(...)) for a student "
            "with a new head, or cache with another --problem-type."
        )
    own, cached = [config.id2label[i] for i in range(config.num_labels)], list(manifest.labels)
    advice = (
        "Its head was trained for other labels. Save its body alone "
        "(AutoModel.from_pretrained(...).save_pretrained(...)) for a student with a new head, or "
        "cache a teacher with the same labels."
    )
    if len(own) != len(cached):
        raise CacheMismatch(
            f"{name}: its head has {len(own):,} labels ({_some(own)}), but {cache.path} was cached "
            f"over {len(cached):,} ({_some(cached)}). {advice}"
        )
    if _unnamed(own) or _unnamed(cached):
        if own != cached:
            log.warning(
                "%s: its labels are %s, those of %s %s: taken to be the same, in this order",
                *(name, _some(own), cache.path, _some(cached)),
            )
        return
    for index, (ours, theirs) in _differing(own, cached):
        raise CacheMismatch(
            f"{name}: its label {index} is {ours!r}, but in {cache.path} label {index} is "
            f"{theirs!r}. {advice}"
        )


def _differing(own: Sequence[str], cached: Sequence[str]) -> list[tuple[int, tuple[str, str]]]:
    pairs = enumerate(zip(own, cached, strict=True))
    return [(index, pair) for index, pair in pairs if pair[0] != pair[1]]


def _unnamed(labels: Sequence[str]) -> bool:
    """As transformers names the labels of a model that was given no names."""
    return list(labels) == [f"LABEL_{index}" for index in range(len(labels))]


def _some(labels: list[str]) -> str:
    return ", ".join(labels[:5]) + (", ..." if len(labels) > 5 else "")


def check_same_labels(cache: Cache, held_out: Cache) -> None:
    """Refuses a held-out cache whose classes are not those that the student learns."""
    ours, theirs = cache.manifest, held_out.manifest
    advice = "Hold out rows of the same kind, with cache-teacher run --like."
    if ours.task != theirs.task:
        raise CacheMismatch(
            f"--validation-cache {held_out.path}: its task is {theirs.task}, but that of "
            f"{cache.path} is {ours.task}. {advice}"
        )
    if ours.problem_type != theirs.problem_type:
        raise CacheMismatch(
            f"--validation-cache {held_out.path}: its problem type is {theirs.problem_type}, but "
            f"that of {cache.path} is {ours.problem_type}. {advice}"
        )
    if len(ours.labels) != len(theirs.labels):
        raise CacheMismatch(
            f"--validation-cache {held_out.path}: it has {len(theirs.labels):,} labels, but "
            f"{cache.path} has {len(ours.labels):,}. {advice}"
        )
    for index, (one, other) in _differing(ours.labels, theirs.labels):
        raise CacheMismatch(
            f"--validation-cache {held_out.path}: its label {index} is {other!r}, but that of "
            f"{cache.path} is {one!r}. {advice}"
        )


def check_metric(config: TrainConfig, held_out: Cache) -> None:
    """Refuses to stop early by a number that evaluation on this cache does not give."""
    metric, manifest = config.early_stopping_metric, held_out.manifest
    if not config.early_stopping_patience:
        return
    if metric == "metric" and TASKS[manifest.task].target_space == "vocabulary":
        raise CacheMismatch(
            f"--early-stopping-metric metric: {held_out.path} is of {manifest.task}, which has no "
            "metric of its own. Use loss, or kl for the distance to the teacher."
        )
    if metric == "kl" and manifest.targets.kind == "values":
        raise CacheMismatch(
            f"--early-stopping-metric kl: {held_out.path} holds numbers, not probabilities. Use "
            "loss, which is the mean squared error, or metric."
        )
    if metric == "kl" and manifest.targets.kind == "none":
        raise CacheMismatch(
            f"--early-stopping-metric kl: {held_out.path} holds hard labels only. Use loss, or "
            "hold out rows with the teacher's targets."
        )


def _check_tokenizer(name: str, cache: Cache) -> None:
    folder = Path(name)
    if folder.is_dir() and not any((folder / file).exists() for file in _TOKENIZER_FILES):
        return  # a student without a tokenizer of its own takes the cache's
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):
        log.warning("%s: no tokenizer could be loaded, the cache's is used", name)
        return
    found, cached = content_hash(tokenizer), cache.manifest.tokenizer.hash
    if found == cached:
        return
    raise CacheMismatch(
        f"{name}: its tokenizer is not the one of {cache.path} (content hash {found[:12]}, cached "
        f"{cached[:12]}). {_token_differences(tokenizer.get_vocab(), cache)}"
        "The same ids would mean other tokens: use a student with the teacher's tokenizer, or "
        "remove the tokenizer files from a student that is to learn this one from scratch."
    )


def _token_differences(vocabulary: dict[str, int], cache: Cache) -> str:
    ours = {index: token for token, index in vocabulary.items()}
    theirs = {
        index: token for token, index in load_cached_tokenizer(cache.storage).get_vocab().items()
    }
    differing = [i for i in sorted(ours.keys() | theirs.keys()) if ours.get(i) != theirs.get(i)]
    if not differing:
        return "The tokens are equal; the rules that cut text into them differ. "
    shown = ", ".join(f"{i}: {ours.get(i)!r} / {theirs.get(i)!r}" for i in differing[:5])
    return f"{len(differing):,} ids differ, the first ones (student / cache): {shown}. "


def layer_pairs(
    config: TrainConfig, model_config: PretrainedConfig, cache: Cache
) -> tuple[tuple[int, int], ...]:
    """(teacher layer, student layer) for the hidden loss of this student on this cache."""
    if not config.uses_hidden_loss:
        return ()
    return config.layer_pairs(cache.manifest.hidden.layers, num_blocks(model_config))


def check_cache(config: TrainConfig, model_config: PretrainedConfig, cache: Cache) -> None:
    """Refuses a loss that the cache holds nothing for."""
    manifest = cache.manifest
    hidden_alone = config.uses_hidden_loss and not manifest.hidden.layers
    if manifest.targets.kind == "none" and (config.uses_soft_loss or hidden_alone):
        raise CacheMismatch(
            f"{cache.path}: holds hard labels only (--targets none). Train with --soft-weight 0 "
            "--hard-weight 1, or cache a teacher."
        )
    if config.uses_hidden_loss and TASKS[manifest.task].target_space in ("labels", "tokens"):
        raise CacheMismatch(
            f"--hidden-weight: {cache.path} is of {manifest.task}, and the hidden-state loss is "
            "there for language models only. Leave it out."
        )
    if config.uses_soft_loss and manifest.targets.kind == "sample":
        _check_sample(config, cache)
    if manifest.problem_type == "regression":
        _check_regression(config, cache)
    stored = (1.0, *manifest.targets.temperatures)
    exact = manifest.targets.kind == "dense" or config.temperature in stored
    if config.uses_soft_loss and not exact:
        listed = ", ".join(f"{temperature:g}" for temperature in stored)
        raise CacheMismatch(
            f"--temperature {config.temperature:g}: {cache.path} is exact at {listed} only. Use "
            f"one of these, or cache again with --temperature {config.temperature:g}."
        )
    if config.temperature_end is not None and manifest.targets.kind != "dense":
        raise CacheMismatch(
            f"--temperature-end {config.temperature_end:g}: a schedule passes every temperature "
            f"between {config.temperature:g} and there, and {cache.path} ({manifest.targets.kind}) "
            "is exact at those it stores only. Leave it out, or train on a dense cache."
        )
    for layer, _ in layer_pairs(config, model_config, cache):
        if layer not in manifest.hidden.layers:
            there = ", ".join(map(str, manifest.hidden.layers)) or "none"
            raise CacheMismatch(
                f"--hidden-map: {cache.path} holds hidden layers {there}, not {layer}. Cache again "
                f"with --hidden-layers {layer}."
            )
    if cache.num_rows == 0:
        raise CacheMismatch(f"{cache.path}: its committed shards hold no row to train on")


def resolved_weights(config: TrainConfig, task: TaskName) -> TrainConfig:
    """The options with the weights that are the default of a task: of states, theirs alone."""
    if TASKS[task].target_space != "states":
        return config
    defaults = {field.name: field.default for field in fields(TrainConfig)}
    for name in ("soft_weight", "hard_weight"):
        value = getattr(config, name)
        if value not in (0, defaults[name]) or getattr(config, f"{name}_end"):
            raise ConfigError(
                f"--{name.replace('_', '-')} {value:g}: a cache of --task {task} holds hidden "
                "states and neither targets nor labels. Leave it out; the loss is that of "
                "--hidden-loss."
            )
    return replace(config, soft_weight=0, hard_weight=0, hidden_weight=config.hidden_weight or 1.0)


def warn_of_lost_mass(config: TrainConfig, cache: Cache) -> None:
    """Of what is cut away a student learns only how much it is together, not where it lies."""
    if not config.uses_soft_loss or cache.manifest.targets.kind not in ("topk", "adaptive"):
        return
    name = "sum_kept_mass" if config.temperature == 1 else f"sum_kept_mass.{config.temperature:g}"
    kept = sum(commit.statistics.get(name, 0.0) for commit in cache.commits)
    share = kept / max(1, sum(commit.positions for commit in cache.commits))
    if share < FEW_KEPT:
        log.warning(
            "%s: its targets keep %.0f %% of the teacher's probability at temperature %g. The hard "
            "loss should go with them; --targets sample, or more entries, keep more",
            *(cache.path, 100 * share, config.temperature),
        )


def _check_sample(config: TrainConfig, cache: Cache) -> None:
    """A sample is unbiased for what is linear in the teacher's probabilities, and only for that."""
    spec = config.loss_spec
    for option, found, only in (
        ("--soft-loss", spec.soft_loss, "forward-kl"),
        ("--tail", spec.tail, "bucket"),
        ("--temperature", spec.temperature, 1.0),
    ):
        if found != only:
            raise CacheMismatch(
                f"{option} {found}: {cache.path} holds a sample of each distribution, which is "
                f"right on average for {option} {only} alone: a drawn class stands for many "
                "others, so no other function of its probability means anything. Leave the option "
                "out, or train on adaptive or topk targets."
            )


def _check_regression(config: TrainConfig, cache: Cache) -> None:
    """Numbers have one loss, the squared error: nothing of a distribution applies to them."""
    spec = config.loss_spec
    for option, found, allowed in (
        ("--soft-loss", spec.soft_loss, ("forward-kl", "mse")),  # the first is the default
        ("--tail", spec.tail, ("bucket",)),
        ("--temperature", spec.temperature, (1.0,)),
        ("--temperature-end", config.temperature_end, (None,)),
        ("--label-smoothing", spec.label_smoothing, (0.0,)),
    ):
        if found not in allowed:
            raise CacheMismatch(
                f"{option} {found}: {cache.path} is of a regression. Its teacher gave numbers, not "
                "probabilities, and a student learns them by their squared error alone. Leave the "
                "option out."
            )


_ADAPTED: dict[TaskName, str | None] = {
    "causal-lm": "CAUSAL_LM",
    "masked-lm": None,  # peft has no name for it, and wraps the model as it is
    "feature-extraction": "FEATURE_EXTRACTION",
    "seq2seq-lm": "SEQ_2_SEQ_LM",
    "token-classification": "TOKEN_CLS",
    "sequence-classification": "SEQ_CLS",
    "question-answering": "QUESTION_ANS",
}


def add_adapters(student: Any, spec: AdapterSpec, task: TaskName = "causal-lm") -> Any:
    """Adapters on the linear layers of the trunk; everything else is frozen.

    Of a language model that is all; for other tasks what stands behind the trunk is trained as it
    is, and saved with the adapters.
    """
    require_peft()
    from peft import LoraConfig, get_peft_model

    heads = _heads(student) if TASKS[task].target_space in ("labels", "tokens") else None
    _check_targets(student, spec.targets, heads or [])
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=2 * spec.rank if spec.alpha is None else spec.alpha,
        lora_dropout=spec.dropout,
        use_dora=spec.kind == "dora",
        use_rslora=spec.kind == "rslora",
        target_modules=list(spec.targets) or "all-linear",
        exclude_modules=heads,
        modules_to_save=heads,
        task_type=_ADAPTED[task],
    )
    return get_peft_model(student, config)


def _check_targets(student: Any, targets: Sequence[str], heads: Sequence[str]) -> None:
    """Refuses a name that stands for no linear layer: adapters would be missing without a word."""
    layers = [
        name
        for name, module in student.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not set(name.split(".")) & set(heads)
    ]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in layers):
            known = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise ConfigError(
                f"--lora-targets {target}: no linear layer of the student has this name, or one "
                f"that ends so. There are {known}."
            )


def _heads(student: Any) -> list[str]:
    """Modules with weights behind the trunk, and a pooler: new ones where the body is pretrained.

    What is new must be saved: a frozen layer of random weights would be another one after loading.
    """
    trunk = student.base_model_prefix
    names = [
        name
        for name, module in student.named_children()
        if name != trunk and next(module.parameters(), None) is not None
    ]
    pooler = [name for name, module in getattr(student, trunk).named_children() if name == "pooler"]
    return names + pooler


def require_peft() -> None:
    """Refuses adapters where the library is not installed."""
    if find_spec("peft") is None:
        raise ConfigError("adapters need peft: pip install 'teacher-cache[lora]'")
