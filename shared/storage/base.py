"""What a store of the files of a cache can do, which names it takes, and what its errors say.

A name is relative to the store and uses `/`. Code that reads or writes a cache knows names alone:
`where` gives the words for a message, and only `local` gives a path, to what may be opened or
mapped.
"""

import errno
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from shared.errors import CorruptCache, DiskFull, Refused, TeacherCacheError

TEMPORARY_PREFIX = ".tmp."
_MAX_NAME = 200  # ours have up to 60 letters; file systems take 255 bytes


def crash_point(name: str) -> None:
    """Marks a place where a crash must do no harm; the crash tests replace this function."""


class Storage(Protocol):
    """What a cache needs of the store it lies in; several processes may use it at once.

    A name that would leave the store, and one that no cache has, is a CorruptCache.
    """

    @property
    def root(self) -> Path | str:
        """The store itself, as messages call it: a folder or an address."""
        ...

    def where(self, name: str) -> str:
        """Where a name is, for messages; asks nobody, and any name will do."""
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return self.size(name) is not None

    def size(self, name: str) -> int | None:
        """The bytes of a file; None where there is none."""
        ...

    def local(self, name: str) -> Path:
        """A local path with the content of a file, or of a folder and all that is in it.

        It is only read, and may be mapped into memory. Where there is no such file in the store,
        there is none at the path.
        """
        ...

    def read(self, name: str, *, max_bytes: int = 256 << 20) -> bytes:
        """The whole content; larger than `max_bytes` is an error before anything is allocated."""
        ...

    def put(self, name: str, data: bytes) -> None:
        """Writes or replaces a file; a reader sees the old content or the new one."""
        ...

    def put_new(self, name: str, data: bytes) -> bool:
        """Writes a file if the name is free; false, and nothing changed, if it is taken.

        Of several writers at once exactly one gets true.
        """
        ...

    def temporary(self, name: str) -> AbstractContextManager[Path]:
        """A local path of its own to write a large file to, which is gone at the end.

        `name`: about where the file will be published.
        """
        ...

    def publish(self, temporary: Path, name: str) -> None:
        """Gives a finished temporary file its name, as `put` does; it may be gone afterwards."""
        ...

    def list(self, prefix: str = "") -> list[str]:
        """Names of the files in one folder of the store, sorted; temporary files are left out."""
        ...

    def delete(self, name: str) -> None:
        """Removes a file, if there is one."""
        ...


def check_name(root: Path | str, name: str) -> None:
    """Refuses a name that would leave the store, and one that no cache has."""
    if any(part in ("", ".", "..") for part in name.split("/")) or set(name) & set("\0\\:"):
        raise CorruptCache(f"{root}: the name {name[:200]!r} does not stay inside the folder")
    if not name.isprintable() or len(name) > _MAX_NAME:
        raise CorruptCache(f"{root}: {name[:200]!r} is no name of a file of a cache")


@contextmanager
def errors_explained(root: Path | str) -> Iterator[None]:
    """Turns what the operating system says about writing somewhere into our own errors."""
    try:
        yield
    except OSError as error:
        raise _os_error(error, root) from error


def _os_error(error: OSError, root: Path | str) -> TeacherCacheError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DiskFull(
            f"{root}: no space left on the disk ({error.strerror}). Nothing finished is lost: free "
            "some space and run the same command again to go on."
        )
    if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return Refused(f"{root}: cannot be written ({error.strerror}). Choose another --out.")
    if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.ENOENT):
        return Refused(
            f"{root}: {error.strerror}: nothing can be written here. Choose another --out."
        )
    return TeacherCacheError(f"{root}: {error.strerror or error}")
