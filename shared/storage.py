"""Where the files of a cache lie: a store, by name, in which everything written appears whole.

`Storage` says what a store can do and `LocalStorage` is the one that is a folder; another kind of
store gets a file of its own, and runs the tests of tests/shared/test_storage.py. A name is relative
to the store and uses `/`. Code that reads or writes a cache knows names alone: `where` gives the
words for a message, and only `local` gives a path, to what may be opened or mapped.

In a folder a file is written to a unique temporary name in the same file system, flushed to the
disk, and only then given its name: by rename (`put`, `publish`), or by a hard link that fails when
the name is taken (`put_new`), which is how the first of several writers wins without a lock.
"""

import errno
import os
import socket
import stat
import uuid
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


class LocalStorage(Storage):
    """A folder of this machine, or of a network disk."""

    def __init__(self, root: Path | str) -> None:
        self._root = Path(root)

    @property
    def root(self) -> Path:
        return self._root

    def local(self, name: str) -> Path:
        """The path of a name itself; a link that leaves the folder is refused."""
        check_name(self.root, name)
        path, place = self.root / name, str(self.root)
        for part in name.split(
            "/"
        ):  # only a link can lead out, and resolving each path costs 24 calls
            place = f"{place}/{part}"
            if os.path.islink(place):
                self._check_link(path)
                break
        return path

    def _check_link(self, path: Path) -> None:
        """Refuses a path that a link leads out of the folder, but into its own Hub store."""
        try:
            target, root = path.resolve(), self.root.resolve()
        except (OSError, RuntimeError) as error:  # links in a circle
            raise CorruptCache(f"{path}: {error}") from None
        if not any(map(target.is_relative_to, (root, *_hub_blobs(root)))):
            raise CorruptCache(f"{path}: this link leaves the folder {self.root}")

    def size(self, name: str) -> int | None:
        path = self.local(name)
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def read(self, name: str, *, max_bytes: int = 256 << 20) -> bytes:
        path = self.local(name)
        try:
            status = path.stat()
            size = status.st_size
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
                raise CorruptCache(f"{path}: this is no file")  # reading a pipe waits for ever
            if size > max_bytes:
                raise CorruptCache(
                    f"{path}: {size:,} bytes where at most {max_bytes:,} are expected"
                )
            return path.read_bytes()
        except FileNotFoundError:
            raise CorruptCache(f"{path}: this file is missing") from None
        except OSError as error:
            raise TeacherCacheError(f"{path}: cannot be read: {error.strerror}") from error

    def put(self, name: str, data: bytes) -> None:
        with self.temporary(name) as temporary:
            self._write(temporary, data)
            self.publish(temporary, name)

    def put_new(self, name: str, data: bytes) -> bool:
        path = self.local(name)
        with self.temporary(name) as temporary, errors_explained(self.root):
            self._write(temporary, data)
            crash_point("before-link")
            try:
                os.link(temporary, path)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                    raise Refused(
                        f"{self.root}: this file system has no hard links, which make a commit "
                        "exclusive. Put the cache on a local or network disk that has them."
                    ) from error
                raise
            crash_point("after-link")
            _sync_folder(path.parent)
        return True

    def list(self, prefix: str = "") -> list[str]:
        folder = self.local(prefix) if prefix else self.root
        if not folder.is_dir():
            return []
        start = f"{prefix}/" if prefix else ""
        return sorted(
            f"{start}{entry.name}"
            for entry in os.scandir(folder)
            if entry.is_file() and not entry.name.startswith(TEMPORARY_PREFIX)
        )

    def delete(self, name: str) -> None:
        self.local(name).unlink(missing_ok=True)

    @contextmanager
    def temporary(self, name: str) -> Iterator[Path]:
        """A unique path beside `name`; whatever is left there at the end is removed."""
        folder = self.local(name).parent
        unique = f"{TEMPORARY_PREFIX}{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex}"
        with errors_explained(self.root):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            yield folder / unique
        finally:
            (folder / unique).unlink(missing_ok=True)

    def publish(self, temporary: Path, name: str) -> None:
        """Also makes it last through a power cut."""
        path = self.local(name)
        with errors_explained(self.root):
            crash_point("before-publish")
            temporary.replace(path)
            crash_point("after-publish")
            _sync_folder(path.parent)

    def _write(self, temporary: Path, data: bytes) -> None:
        with errors_explained(self.root), open(temporary, "xb") as file:
            file.write(data[: len(data) // 2])
            crash_point("in-the-middle-of-a-write")
            file.write(data[len(data) // 2 :])
            file.flush()
            crash_point("before-fsync")
            os.fsync(file.fileno())


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


def _hub_blobs(root: Path) -> Iterator[Path]:
    """Where the files of a Hugging Face snapshot lie; nothing where `root` is in none.

    `huggingface_hub` keeps a repository as `datasets--owner--name/blobs` and a commit of it as
    `datasets--owner--name/snapshots/<commit>`, whose files are links to those blobs.
    """
    for snapshot in (root, *root.parents):
        store = snapshot.parent.parent
        of_hub = store.name.startswith(("models--", "datasets--"))
        if of_hub and snapshot.parent.name == "snapshots":
            yield store / "blobs"


def temporary_files(root: Path) -> Iterator[Path]:
    """Temporary files of finished and of running writers, in the whole folder."""
    yield from sorted(root.rglob(f"{TEMPORARY_PREFIX}*.*.*"))


def temporary_writer(path: Path) -> tuple[str, int]:
    """Host and process that wrote a temporary file, from its name."""
    host, process, _ = path.name.removeprefix(TEMPORARY_PREFIX).rsplit(".", 2)
    return host, int(process)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
