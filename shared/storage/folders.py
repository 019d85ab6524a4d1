"""A folder of several files that appears whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import Refused
from shared.storage.base import TEMPORARY_PREFIX, errors_explained


def check_free(out: Path) -> None:
    """Refuses a path where something is: nothing is ever overwritten."""
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        what = "this folder is not empty" if out.is_dir() else "this is no folder"
        raise Refused(
            f"{out}: {what}. Nothing is overwritten: choose another --out, or remove it first."
        )


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which takes the name `out` at a clean exit and else is removed."""
    check_free(out)
    with errors_explained(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(dir=out.parent, prefix=TEMPORARY_PREFIX)
    with temporary as around:  # itself readable by its owner alone
        staging = Path(around) / "whole"
        staging.mkdir()
        yield staging
        mode = staging.stat().st_mode & 0o666  # safetensors are written for their owner alone
        for path in staging.rglob("*"):
            if path.is_file():
                path.chmod(mode)
        with errors_explained(out):
            staging.replace(out)
