"""Which local files a corpus is: a file, a folder or a pattern, all of one kind, of one split."""

import glob
import re
from pathlib import Path

from shared.errors import CorpusError
from teacher_cache.corpus import conll

_LOADERS = {
    ".txt": "text",
    ".jsonl": "json",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    **dict.fromkeys(conll.SUFFIXES, "conll"),
}
_KINDS = ", ".join(_LOADERS)


def local_files(source: str) -> list[Path]:
    """The files that a source names, in order; none where it must be a name on the Hub."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        if loader_of(path) is None:
            raise CorpusError(f"{path}: {path.suffix or 'no suffix'} is not one of {_KINDS}")
        return [path]
    if glob.has_magic(source):
        found = sorted(Path(name) for name in glob.glob(source, recursive=True))
        found = [path for path in found if path.is_file()]
        if not found:
            raise CorpusError(f"{source}: no file matches this pattern")
        return _of_one_kind(found, source)
    if path.suffix in _LOADERS or path.is_absolute() or source.startswith((".", "~")):
        raise CorpusError(f"{source}: no such file or folder")
    return []


def loader_of(path: Path) -> str | None:
    """What reads files with this suffix; None: nothing does."""
    suffixes = [suffix for suffix in path.suffixes if suffix not in (".gz", ".zst", ".xz", ".bz2")]
    return _LOADERS.get(suffixes[-1]) if suffixes else None


def _folder(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and loader_of(path)]
    if not files:
        raise CorpusError(f"{folder}: no {_KINDS} file in this folder")
    lines = [path for path in files if path.suffix != ".json"]
    return _of_one_kind(lines or files, f"{folder}/")  # a labels.json beside the rows is no corpus


def _of_one_kind(files: list[Path], source: str) -> list[Path]:
    kinds: dict[str, int] = {}
    for path in files:
        if loader_of(path) is None:
            raise CorpusError(f"{path}: {path.suffix or 'no suffix'} is not one of {_KINDS}")
        kinds[path.suffix] = kinds.get(path.suffix, 0) + 1
    if len({loader_of(path) for path in files}) > 1:
        listed = ", ".join(f"{count} {suffix}" for suffix, count in sorted(kinds.items()))
        example = max(kinds, key=lambda suffix: kinds[suffix])
        raise CorpusError(
            f"{source}: holds files of several kinds ({listed}). Name one kind with a pattern, "
            f"such as '{source.rstrip('*')}*{example}'."
        )
    return files


def of_split(files: list[Path], split: str) -> list[Path]:
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
