"""Opens local files as a data set, and says which byte or line cannot be read."""

import codecs
import glob
import json
import os
import re
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import xxhash

from shared.errors import CorpusError
from shared.format.commits import file_hash
from shared.tasks import TASKS
from teacher_cache.config import CaptureConfig
from teacher_cache.corpus import conll
from teacher_cache.corpus.files import loader_of


def open_local(config: CaptureConfig, files: list[Path]) -> tuple[datasets.Dataset, str]:
    """The data set of these files, which are of one kind, and their fingerprint."""
    loader = loader_of(files[0])
    assert loader is not None  # local_files keeps only known kinds
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
        documents = _load(loader, config, files, split, cache_dir)
    except (datasets.exceptions.DatasetGenerationError, UnicodeDecodeError) as error:
        raise CorpusError(_first_fault(files, loader, error)) from error
    except pa.ArrowException as error:  # before ValueError, which it is too
        raise CorpusError(f"{files[0]}: cannot be read: {error}") from error
    except ValueError as error:
        raise CorpusError(f"{config.corpus}: --split {config.split}: {error}") from error
    return documents, fingerprint


def _load(
    loader: str, config: CaptureConfig, files: list[Path], split: str, cache_dir: Path
) -> datasets.Dataset:
    if loader == "conll":
        return _open_conll(config, files, split, cache_dir)
    options: dict[str, Any] = {}
    if loader == "text":
        options = {"sample_by": config.sample_by}
    if loader in ("text", "json"):
        # not "utf-8": then `datasets` would hand JSON on undecoded, and bad bytes would be found
        # only when a document is read
        options |= {"encoding": "utf-8-sig", "encoding_errors": config.encoding_errors}
    return datasets.load_dataset(
        loader,
        data_files={"train": [glob.escape(str(path.absolute())) for path in files]},
        split=split,
        cache_dir=str(cache_dir),
        **options,
    )


def _open_conll(
    config: CaptureConfig, files: list[Path], split: str, cache_dir: Path
) -> datasets.Dataset:
    if conll.ROLES not in TASKS[config.task].ways:
        tasks = " or ".join(name for name, task in TASKS.items() if conll.ROLES in task.ways)
        raise CorpusError(
            f"{files[0]}: a column file of tagged words is a corpus of --task {tasks},"
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
    columns = columns_in_file(config, files[0].suffix)
    return conll.open_sentences(files, columns, config.encoding_errors, split, cache_dir)


def columns_in_file(config: CaptureConfig, suffix: str) -> conll.Columns:
    """Which columns of a column file hold the words and the tags."""
    return conll.columns_of(config.column_of, suffix, unlabelled=config.unlabelled)


def _fingerprint(loader: str, files: list[Path]) -> str:
    """A hash of names below a common folder, sizes and contents; a link is what it points to."""
    root = Path(os.path.commonpath([path.absolute().parent for path in files]))
    listed = [
        [path.absolute().relative_to(root).as_posix(), path.stat().st_size, file_hash(path)]
        for path in files
    ]
    return xxhash.xxh3_128_hexdigest(json.dumps([loader, sorted(listed)]).encode())


def _first_fault(files: list[Path], loader: str, error: BaseException) -> str:
    """Names file and line of the first byte or line that cannot be read."""
    for path in files:
        if path.suffix not in (".txt", ".jsonl", ".json"):
            continue
        each_is_json = loader == "json" and path.suffix == ".jsonl"
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if fault := _fault(line, each_is_json):
                    return f"{path}, line {number}: {fault}"
    cause = error.__cause__ or error
    return f"{files[0]}: cannot be read: {str(cause).splitlines()[0]}"


def _fault(line: bytes, is_json: bool) -> str:
    """What is wrong with a line; "" if nothing is."""
    try:
        text = codecs.decode(line, "utf-8-sig")
    except UnicodeDecodeError as fault:
        return (
            f"not UTF-8 ({fault.reason} at byte {fault.start}). "
            "Convert the file, or use --encoding-errors replace"
        )
    if is_json and text.strip():
        try:
            json.loads(text)
        except ValueError as fault:
            return f"not valid JSON ({fault}). Mend or remove the line."
    return ""
