"""Where documents come from: local files and Hub data sets, read by index through `datasets`.

A corpus is opened once, memory-mapped, and then any process can ask for document i. Its fingerprint
says what it was: names, sizes and hashes of local files, or repository and commit on the Hub.
"""

import codecs
import glob
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import xxhash

from shared.errors import CorpusError
from shared.format.commits import file_hash
from shared.format.manifest import CorpusInfo
from shared.tasks import TASKS, ProblemType, TaskName
from teacher_cache.config import CaptureConfig
from teacher_cache.corpus import conll
from teacher_cache.corpus.chat import Conversation, Exchange
from teacher_cache.tasks.label_rows import Label, Labelled, Tagged
from teacher_cache.tasks.seq2seq_rows import Pair
from teacher_cache.tasks.window_rows import Asked, answers_of

log = logging.getLogger(__name__)

_LOADERS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    **dict.fromkeys(conll.SUFFIXES, "conll"),
}
# Role -> names that are taken for it, in this order, where --columns says nothing.
_NAMES = {
    "messages": ("messages", "conversations", "conversation", "dialogue"),
    "text": ("text", "content", "body", "document", "article", "sentence", "sentence1", "premise"),
    "prompt": ("prompt", "question", "instruction", "input"),
    "completion": ("completion", "answer", "response", "output"),
    "source": ("source", "document", "article", "text", "dialogue", "input", "en"),
    "target": ("target", "summary", "summaries", "translation", "highlights", "output"),
    "tokens": ("tokens", "words"),
    "tags": ("tags", "ner_tags", "labels"),
    "text_pair": ("text_pair", "sentence2", "hypothesis"),
    "label": ("label", "labels", "intent", "category", "score"),
    "question": ("question", "query"),
    "context": ("context", "passage", "paragraph", "document"),
    "answers": ("answers",),
}


# What a document is made of, by the roles of its columns.
_DOCUMENTS: dict[tuple[str, ...], Callable[..., Any]] = {
    ("messages",): lambda conversation: conversation,
    ("text",): lambda text: text,
    ("prompt", "completion"): Exchange,
    ("prompt",): lambda prompt: Exchange(prompt, ""),
    ("source",): lambda source: Pair(source, ()),
    ("source", "target"): Pair,
    ("tokens", "tags"): Tagged,
    ("text", "text_pair", "label"): Labelled,
    ("text", "label"): lambda text, label: Labelled(text, None, label),
    ("tokens",): lambda tokens: Tagged(tokens, (None,) * len(tokens)),
    ("text", "text_pair"): lambda text, text_pair: Labelled(text, text_pair, None),
    ("question", "context", "answers"): Asked,
}

# With --generate a corpus need not have the answers; and a text has none.
_WAYS_OF_SOURCES: dict[TaskName, tuple[tuple[str, ...], ...]] = {
    "causal-lm": (("messages",), ("prompt", "completion"), ("prompt",)),
    "seq2seq-lm": (("source", "target"), ("source",), ("messages",)),
}
_READ_AT_ONCE = 1000  # documents


@dataclass(frozen=True)
class Corpus:
    """Documents by index; `read` of a range is one memory-mapped read."""

    info: CorpusInfo
    documents: datasets.Dataset
    columns: dict[str, str]  # role -> column

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def supervised(self) -> bool:
        """Whether only a part of each document is predicted: what an assistant says."""
        return self.columns.keys() != {"text"}

    @cached_property
    def class_names(self) -> tuple[str, ...]:
        """What the numbers in the column of labels stand for, where the data set says so."""
        role = "tags" if "tags" in self.columns else "label"
        if role not in self.columns:
            return ()
        feature = self.documents.features[self.columns[role]]
        while isinstance(feature, datasets.List | datasets.LargeList):
            feature = feature.feature
        return tuple(feature.names) if isinstance(feature, datasets.ClassLabel) else ()

    @cached_property
    def problem_type(self) -> ProblemType:
        """By the type of the column of labels: a list of several, a number, or one class."""
        if "label" not in self.columns:
            return "single_label"
        feature = self.documents.features[self.columns["label"]]
        if isinstance(feature, datasets.List | datasets.LargeList):
            return "multi_label"
        number = isinstance(feature, datasets.Value) and feature.dtype.startswith("float")
        return "regression" if number else "single_label"

    def labels(self, problem_type: ProblemType = "single_label") -> tuple[str, ...]:
        """The names of all labels there are, sorted; of numbers, the numbers up to the largest.

        A data set that names its classes itself has those, in its own order. In a regression, and
        where lists say 0 or 1 for each label, there are as many as a list is long.
        """
        if self.class_names:
            return self.class_names
        role = "tags" if "tags" in self.columns else "label"
        found: set[str | int | float | None] = set()
        lengths: set[int] = set()
        for start in range(0, len(self), _READ_AT_ONCE):
            batch = self.documents[start : start + _READ_AT_ONCE][self.columns[role]]
            for value in batch:
                found.update(value if isinstance(value, list) else (value,))
                lengths.update([len(value)] if isinstance(value, list) else [])
        known = found - {None, -100}
        longest = max(lengths, default=1)
        if problem_type == "regression":
            return _numbered(longest)
        named = longest <= 2 and not any(isinstance(value, bool | float) for value in known)
        vectors = lengths == {longest} and known <= {0, 1} and not named  # label_rows.is_vector
        if problem_type == "multi_label" and vectors:
            return _numbered(longest)
        if all(isinstance(label, str) for label in known):
            return tuple(sorted(map(str, known)))
        numbers = [label for label in known if isinstance(label, int)]
        if not numbers:
            raise CorpusError(
                f"{self.info.source}: found {str(min(known, key=str))!r} in column "
                f"{self.columns[role]!r}, expected names or numbers of classes. Say --problem-type "
                "regression where labels are numbers of another kind."
            )
        return _numbered(max(numbers) + 1)

    def read(self, indices: Sequence[int]) -> list[Any]:
        """Documents as the task builds rows of them; a null is an empty document."""
        if not indices:
            return []
        found = self.documents[list(indices)]
        parts = [
            [self._value(role, *pair) for pair in zip(indices, found[column], strict=True)]
            for role, column in self.columns.items()
        ]
        make = _DOCUMENTS[tuple(self.columns)]
        return [make(*values) for values in zip(*parts, strict=True)]

    def _value(self, role: str, index: int, value: Any) -> Any:
        """A value of a role as documents hold it."""
        match role:
            case "messages":
                return self._conversation(index, value)
            case "target":
                texts = value if isinstance(value, list) else [value]
                return tuple(self._text(index, text, role) for text in texts if text is not None)
            case "tokens":
                return self._words(index, value)
            case "tags":
                return tuple(self._named(label) for label in value or ())
            case "label" if isinstance(value, list):
                return tuple(self._named(each) for each in value)
            case "label":
                return self._named(value)
            case "answers":
                return answers_of(value, f"{self.info.source}: document {index}, answers")
        return self._text(index, value, role)

    def _named(self, label: Label) -> Label:
        """A number by the name the data set gives it: a teacher may count in another order."""
        names = self.class_names
        if not names or not isinstance(label, int):
            return label
        return names[label] if label >= 0 else None  # `datasets` has -1 where none is known

    def _words(self, index: int, value: Any) -> tuple[str, ...]:
        words = value or ()
        if isinstance(words, str) or not all(isinstance(word, str) for word in words):
            raise CorpusError(
                f"{self.info.source}: document {index} has {str(value)[:80]!r} in column "
                f"{self.columns['tokens']!r} where a list of words is expected. Cut texts into "
                "words first, or name another column with --columns."
            )
        return tuple(words)

    def _text(self, index: int, value: Any, role: str) -> str:
        if value is not None and not isinstance(value, str):
            raise CorpusError(
                f"{self.info.source}: document {index} has a {type(value).__name__} in column "
                f"{self.columns[role]!r} where a text is expected. Name another one with --columns."
            )
        return value or ""

    def _conversation(self, index: int, value: Any) -> Conversation:
        messages = value or []
        for number, message in enumerate(messages):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise CorpusError(
                    f"{self.info.source}: document {index}, message {number} of column "
                    f"{self.columns['messages']!r}: found {str(message)[:80]!r}, expected an "
                    "object with role and content."
                )
        # `datasets` gives every message every key of any: null ones were not there.
        return Conversation(
            tuple({k: v for k, v in message.items() if v is not None} for message in messages)
        )


def open_corpus(config: CaptureConfig) -> Corpus:
    """Opens the corpus a config asks for, and picks its columns."""
    datasets.disable_progress_bars()
    files = _local_files(config.corpus)
    if files:
        documents, fingerprint = _open_local(config, _of_split(files, config.split))
    else:
        documents, fingerprint = _open_hub(config)
    if config.limit_documents:
        documents = documents.select(range(min(config.limit_documents, len(documents))))
    if len(documents) == 0:
        raise CorpusError(
            f"{config.corpus}: no document in {config.split}. Check --split and the file."
        )
    columns = (
        _of_column_file(config, files[0].suffix).names
        if files and _kind(files[0]) == "conll"
        else _columns(documents, config)
    )
    info = CorpusInfo(
        source=_shown(config.corpus, local=bool(files)),
        fingerprint=fingerprint,
        num_documents=len(documents),
    )
    return Corpus(info, documents, columns)


def _shown(source: str, *, local: bool) -> str:
    """No absolute path in a manifest: the same corpus elsewhere is the same corpus."""
    return Path(source).name if local else source


def _local_files(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        if _kind(path) is None:
            raise CorpusError(f"{path}: {path.suffix or 'no suffix'} is not one of {_KINDS}")
        return [path]
    if glob.has_magic(source):
        found = sorted(Path(name) for name in glob.glob(source, recursive=True))
        found = [path for path in found if path.is_file()]
        if not found:
            raise CorpusError(f"{source}: no file matches this pattern")
        return _one_kind(found, source)
    if path.suffix in _LOADERS or path.is_absolute() or source.startswith((".", "~")):
        raise CorpusError(f"{source}: no such file or folder")
    return []


_KINDS = ", ".join(_LOADERS)


def _kind(path: Path) -> str | None:
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".zst", ".xz", ".bz2")]
    return _LOADERS.get(suffixes[-1]) if suffixes else None


def _folder(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and _kind(path)]
    if not files:
        raise CorpusError(f"{folder}: no {_KINDS} file in this folder")
    lines = [path for path in files if path.suffix != ".json"]
    return _one_kind(lines or files, f"{folder}/")  # a labels.json beside the rows is no corpus


def _one_kind(files: list[Path], source: str) -> list[Path]:
    kinds: dict[str, int] = {}
    for path in files:
        if _kind(path) is None:
            raise CorpusError(f"{path}: {path.suffix or 'no suffix'} is not one of {_KINDS}")
        kinds[path.suffix] = kinds.get(path.suffix, 0) + 1
    if len({_kind(path) for path in files}) > 1:
        listed = ", ".join(f"{count} {suffix}" for suffix, count in sorted(kinds.items()))
        example = max(kinds, key=lambda suffix: kinds[suffix])
        raise CorpusError(
            f"{source}: holds files of several kinds ({listed}). Name one kind with a pattern, "
            f"such as '{source.rstrip('*')}*{example}'."
        )
    return files


def _of_split(files: list[Path], split: str) -> list[Path]:
    """Where files are named after splits (train.jsonl, validation-00000.parquet), those."""
    name = re.split(r"[\[+]", split)[0]
    named = {path: re.split(r"[-_.]", path.name)[0] for path in files}
    known = {"train", "validation", "valid", "dev", "test"}
    if len(files) == 1:
        return files
    if known & set(named.values()):
        chosen = [path for path in files if named[path] == name]
        if not chosen:
            there = ", ".join(sorted(known & set(named.values())))
            raise CorpusError(f"{files[0].parent}: no file of split {name!r}; there are {there}")
        return chosen
    return files


def _open_local(config: CaptureConfig, files: list[Path]) -> tuple[datasets.Dataset, str]:
    loader = _kind(files[0])
    assert loader is not None  # _local_files keeps only known kinds
    options: dict[str, Any] = {}
    if loader == "text":
        options = {"sample_by": config.sample_by}
    if loader in ("text", "json"):
        # not "utf-8": then `datasets` would hand JSON on undecoded, and bad bytes would be found
        # only when a document is read
        options |= {"encoding": "utf-8-sig", "encoding_errors": config.encoding_errors}
    match = re.fullmatch(r"[\w.-]+((\[[^\]]*\])?)", config.split)
    if match is None:
        raise CorpusError(f"--split {config.split}: expected train, train[:98%] or train[100:200]")
    for path in files:
        if path.stat().st_size == 0:
            raise CorpusError(f"{path}: this file is empty")
    fingerprint = _fingerprint(loader, files)
    # `datasets` goes by a file's date: another content of the same date would be missed
    cache_dir = Path(datasets.config.HF_DATASETS_CACHE) / f"teacher-cache-{fingerprint}"
    split = f"train{match.group(1)}"
    try:
        if loader == "conll":
            return _open_conll(config, files, split, cache_dir), fingerprint
        documents = datasets.load_dataset(
            loader,
            data_files={"train": [glob.escape(str(path.absolute())) for path in files]},
            split=split,
            cache_dir=str(cache_dir),
            **options,
        )
    except (datasets.exceptions.DatasetGenerationError, UnicodeDecodeError) as error:
        raise CorpusError(_first_fault(files, loader, error)) from error
    except pa.ArrowException as error:  # before ValueError, which it is too
        raise CorpusError(f"{files[0]}: cannot be read: {error}") from error
    except ValueError as error:
        raise CorpusError(f"{config.corpus}: --split {config.split}: {error}") from error
    return documents, fingerprint


def _open_conll(
    config: CaptureConfig, files: list[Path], split: str, cache_dir: Path
) -> datasets.Dataset:
    if config.task != "token-classification":
        raise CorpusError(
            f"{files[0]}: a column file of tagged words is a corpus of --task token-classification,"
            f" not of {config.task}"
        )
    for path in files:
        if path.suffix not in conll.SUFFIXES:
            raise CorpusError(f"{path}: column files are not read compressed: unpack it")
        if path.suffix != files[0].suffix:
            raise CorpusError(
                f"{path}: its columns may have other meanings than those of {files[0].name}. Name "
                f"files of one kind with a pattern, such as '*{files[0].suffix}'."
            )
    columns = _of_column_file(config, files[0].suffix)
    return conll.open_sentences(files, columns, config.encoding_errors, split, cache_dir)


def _fingerprint(loader: str, files: list[Path]) -> str:
    """Of names below their common folder, sizes and hashes; a link is the file it points to."""
    root = Path(os.path.commonpath([path.absolute().parent for path in files]))
    listed = [
        [path.absolute().relative_to(root).as_posix(), path.stat().st_size, file_hash(path)]
        for path in files
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps([loader, sorted(listed)]).encode())


def _open_hub(config: CaptureConfig) -> tuple[datasets.Dataset, str]:
    from huggingface_hub import HfApi, errors

    no_connection = errors.HTTPError  # type: ignore[attr-defined]  # of the HTTP client it uses
    name, _, configuration = config.corpus.partition(":")
    try:
        commit = HfApi().dataset_info(name).sha
        documents = datasets.load_dataset(
            name, configuration or None, split=config.split, revision=commit
        )
    except (no_connection, errors.HFValidationError, OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CorpusError(
            f"{config.corpus}: no such file or folder, and as a Hub data set it cannot be loaded: "
            f"{reason}"
        ) from error
    parts = [name, commit, configuration]
    return documents, xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())


def _of_column_file(config: CaptureConfig, suffix: str) -> conll.Columns:
    return conll.columns_of(config.column_of, suffix, unlabelled=config.unlabelled)


def _ways(config: CaptureConfig) -> tuple[tuple[str, ...], ...]:
    """The roles a document may consist of; those without labels last, and where a teacher is."""
    task = TASKS[config.task]
    if config.unlabelled:
        return task.unlabelled
    ways = _WAYS_OF_SOURCES[config.task] if config.generate else task.ways
    return ways + task.unlabelled if config.uses_teacher else ways


def _columns(documents: datasets.Dataset, config: CaptureConfig) -> dict[str, str]:
    """The column of each role: as asked, else by its usual names."""
    names, asked = list(documents.column_names), config.column_of
    task_ways = _ways(config)
    roles = list(dict.fromkeys(role for way in task_ways for role in way))
    unknown = sorted(set(asked) - set(roles))
    if unknown:
        raise CorpusError(
            f"--columns {unknown[0]}=...: --task {config.task} reads the roles {', '.join(roles)}"
        )
    for column in asked.values():
        if column not in names:
            raise CorpusError(f"{config.corpus}: no column {column!r}; there are {_listed(names)}")
    ways = task_ways
    if asked:
        ways = tuple(way for way in task_ways if set(asked) <= set(way))
        if not ways:
            kinds = ", or ".join(" and ".join(way) for way in task_ways)
            raise CorpusError(
                f"--columns {' '.join(asked)}: a document is {kinds}, not several of them"
            )
    for way in ways:
        free = [name for name in names if name not in asked.values()]
        found = {role: asked.get(role) or _usual(role, free) for role in way}
        chosen = {role: column for role, column in found.items() if column is not None}
        if len(chosen) == len(way):
            if way in TASKS[config.task].unlabelled and not config.unlabelled:
                _say_unlabelled(config, [name for name in names if name not in chosen.values()])
            return chosen
    wanted = " or ".join(" and ".join(way) for way in task_ways)
    example = "text" if "text" in roles else roles[0]
    raise CorpusError(
        f"{config.corpus}: --task {config.task} reads {wanted}, and there are the columns "
        f"{_listed(names)}. Say which is which: --columns {example}={names[0]}"
    )


def _say_unlabelled(config: CaptureConfig, others: list[str]) -> None:
    """A column of labels may only have a name that nobody guesses."""
    role = "tags" if config.task == "token-classification" else "label"
    advice = f" If it is one of {_listed(others)}: --columns {role}={others[0]}." if others else ""
    log.warning(
        "%s: no column of labels, so students learn from what the teacher says alone.%s",
        config.corpus,
        advice,
    )


def _numbered(count: int) -> tuple[str, ...]:
    """As `transformers` names the labels of a model that was given no names."""
    return tuple(f"LABEL_{number}" for number in range(count))


def _usual(role: str, names: list[str]) -> str | None:
    return next((name for name in _NAMES[role] if name in names), None)


def _listed(names: list[str]) -> str:
    return ", ".join(names)


def _first_fault(files: list[Path], loader: str, error: BaseException) -> str:
    """Names file and line of the first byte or line that cannot be read."""
    for path in files:
        if path.suffix not in (".txt", ".jsonl", ".json"):
            continue
        for number, line in _lines(path):
            try:
                text = codecs.decode(line, "utf-8-sig")
            except UnicodeDecodeError as fault:
                return (
                    f"{path}, line {number}: not UTF-8 ({fault.reason} at byte {fault.start}). "
                    "Convert the file, or use --encoding-errors replace"
                )
            if loader == "json" and path.suffix == ".jsonl" and text.strip():
                try:
                    json.loads(text)
                except ValueError as fault:
                    return (
                        f"{path}, line {number}: not valid JSON ({fault}). Mend or remove the line."
                    )
    cause = error.__cause__ or error
    return f"{files[0]}: cannot be read: {str(cause).splitlines()[0]}"


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with open(path, "rb") as file:
        yield from enumerate(file, start=1)
