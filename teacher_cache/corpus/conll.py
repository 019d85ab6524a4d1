"""Column files of tagged words, as of the CoNLL shared tasks: a word per line, its tag beside it.

A sentence ends at a blank line. Columns are separated by tabs where the first line of words has
one, else by spaces. By default the first column is the word and the last one its tag; in .conllu,
whose columns have fixed meanings, they are FORM and UPOS. `-DOCSTART-` lines are left out, and so
are comments: in front of a sentence, a line that starts with `#` and is separated otherwise than
the words are (or, between tabs, one that starts with `# `). Any other `#` is a word.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import datasets

from shared.errors import ConfigError, CorpusError

EncodingErrors = Literal["strict", "replace", "ignore"]

SUFFIXES = (".conll", ".conllu", ".bio", ".iob", ".iob2", ".tsv")
ROLES = ("tokens", "tags")

_DOCUMENT = "-DOCSTART-"
_RANGE = re.compile(r"\d+[-.]\d+")  # of CoNLL-U: words written as one, words that are not written


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column holds what, counted from 0, or from the end by a negative number."""

    tokens: int
    tags: int | None  # None: no tags are read

    @property
    def numbers(self) -> dict[str, int]:
        """The column of each role there is."""
        return {"tokens": self.tokens} | ({} if self.tags is None else {"tags": self.tags})

    @property
    def names(self) -> dict[str, str]:
        """Role -> name of the column of the data set, which is its number."""
        return {role: str(number) for role, number in self.numbers.items()}


def columns_of(asked: Mapping[str, str], suffix: str, *, unlabelled: bool = False) -> Columns:
    """The columns that --columns asks for, else the usual ones."""
    tokens, tags = (1, 3) if suffix == ".conllu" else (0, -1)
    numbers: dict[str, int | None] = {"tokens": tokens, "tags": None if unlabelled else tags}
    for role, number in asked.items():
        if role not in ROLES or not re.fullmatch(r"-?\d+", number):
            raise ConfigError(
                f"--columns {role}={number}: a column file has no names. Expected tokens=N or "
                "tags=N, the number of a column, counted from 0 or, if negative, from the end"
            )
        if role == "tags" and unlabelled:
            raise ConfigError(
                f"--columns tags={number}: with --unlabelled no tags are read. Leave one of the "
                "two out"
            )
        numbers[role] = int(number)
    if numbers["tokens"] == numbers["tags"]:
        raise ConfigError(
            f"--columns: words and tags are both column {numbers['tags']}; expected two columns"
        )
    assert numbers["tokens"] is not None  # of words there always is a column
    return Columns(numbers["tokens"], numbers["tags"])


def read_sentences(
    path: Path, columns: Columns, encoding_errors: EncodingErrors = "strict"
) -> Iterator[tuple[list[str], list[str]]]:
    """Words and tags of one sentence after the other; no tags where none are read."""
    tabbed = _is_tabbed(path)
    words: list[str] = []
    tags: list[str] = []
    width, first = 0, 0  # number of columns, and the line that has shown it
    for number, line in _lines(path, encoding_errors):
        if not line.strip(" \t"):
            if words:
                yield words, tags
                words, tags = [], []
            continue
        if not words and _is_comment(line, tabbed):
            continue
        cells = _cells(line, tabbed)
        if cells[0] == _DOCUMENT or (path.suffix == ".conllu" and _RANGE.fullmatch(cells[0])):
            continue
        if not width:
            width, first = len(cells), number
            _check_columns(path, number, width, columns)
        if len(cells) != width:
            raise CorpusError(
                f"{path}, line {number}: found {len(cells)} columns ({line[:80]!r}), expected "
                f"{width} as in line {first}. Mend the line, or put a blank one between sentences."
            )
        words.append(_cell(path, number, cells, columns.tokens))
        if columns.tags is not None:
            tags.append(_cell(path, number, cells, columns.tags))
    if words:
        yield words, tags
    if not width:
        raise CorpusError(f"{path}: found no word in this file, expected one per line with its tag")


def open_sentences(
    files: Sequence[Path],
    columns: Columns,
    encoding_errors: EncodingErrors,
    split: str,
    cache_dir: Path,
) -> datasets.Dataset:
    """The sentences of all files as one memory-mapped data set, or a slice of it."""
    names = columns.names.values()
    texts = datasets.Features({name: datasets.List(datasets.Value("string")) for name in names})
    given = {"files": list(files), "columns": columns, "encoding_errors": encoding_errors}
    try:
        sentences = datasets.Dataset.from_generator(
            _rows, features=texts, cache_dir=str(cache_dir), gen_kwargs=given
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, CorpusError):
            raise error.__cause__ from None
        raise
    assert isinstance(sentences, datasets.Dataset)
    spans = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(sentences)})
    return sentences.select([i for span in spans for i in range(span.from_, span.to)])


def _rows(
    files: Sequence[Path], columns: Columns, encoding_errors: EncodingErrors
) -> Iterator[dict[str, list[str]]]:
    names = columns.names
    for path in files:
        for words, tags in read_sentences(path, columns, encoding_errors):
            sentence = {"tokens": words, "tags": tags}
            yield {name: sentence[role] for role, name in names.items()}


def _lines(path: Path, encoding_errors: EncodingErrors) -> Iterator[tuple[int, str]]:
    """Number, counted from 1, and text of each line."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8", encoding_errors)
            except UnicodeDecodeError as fault:
                raise CorpusError(
                    f"{path}, line {number}: not UTF-8 ({fault.reason} at byte {fault.start}). "
                    "Convert the file, or use --encoding-errors replace"
                ) from None
            yield number, text.rstrip("\r\n")


def _is_tabbed(path: Path) -> bool:
    """Whether the first line that can be no comment has a tab; a `#` only where nothing else is."""
    of_hash = False
    for _, line in _lines(path, "replace"):
        if line.startswith("#"):
            of_hash |= "\t" in line
        elif line.strip(" \t") and not line.startswith(_DOCUMENT):
            return "\t" in line
    return of_hash


def _is_comment(line: str, tabbed: bool) -> bool:
    other_separator = ("\t" in line) != tabbed
    return line.startswith("#") and (other_separator or (tabbed and line.startswith("# ")))


def _cells(line: str, tabbed: bool) -> list[str]:
    """Without `str.split`, which also splits at spaces that are part of a word, such as U+00A0."""
    return line.split("\t") if tabbed else re.split(r"[ \t]+", line.strip(" \t"))


def _check_columns(path: Path, number: int, width: int, columns: Columns) -> None:
    if width < 2 and columns.tags is not None:
        raise CorpusError(
            f"{path}, line {number}: found one column, expected at least two, a word and its tag. "
            "Where words have no tags, say --unlabelled"
        )
    for role, column in columns.numbers.items():
        if not -width <= column < width:
            raise CorpusError(
                f"{path}, line {number}: found {width} columns, but {role} are expected in column "
                f"{column}. Name another one with --columns {role}=N, counted from 0."
            )
    if columns.tags is not None and columns.tokens % width == columns.tags % width:
        raise CorpusError(
            f"{path}, line {number}: found {width} columns, of which {columns.tokens} and "
            f"{columns.tags} are the same one. Name two different ones with --columns."
        )


def _cell(path: Path, number: int, cells: list[str], column: int) -> str:
    if not cells[column].strip(" "):
        raise CorpusError(f"{path}, line {number}: column {column} is empty, expected a text")
    return cells[column]
