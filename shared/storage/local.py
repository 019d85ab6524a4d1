"""The store that is a folder of this machine, or of a network disk.

A file is written to a unique temporary name in the same file system, flushed to the disk, and only
then given its name: by rename (`put`, `publish`), or by a hard link that fails when the name is
taken (`put_new`), which is how the first of several writers wins without a lock.
"""

import errno
import os
import socket
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared.errors import CorruptCache, Refused, TeacherCacheError
from shared.storage.base import (
    TEMPORARY_PREFIX,
    Storage,
    check_name,
    crash_point,
    errors_explained,
)


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
