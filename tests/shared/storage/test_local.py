"""The store that is a folder: links, full disks, what is flushed when. See test_stores.py too."""

import errno
import os
import resource
from contextlib import contextmanager

import pytest

from shared.errors import CorruptCache, DiskFull, Refused, TeacherCacheError
from shared.storage import local
from shared.storage.local import LocalStorage, temporary_files, temporary_writer

FULL = r"no space left on the disk .*Nothing finished is lost.*run the same command again"


def tree(root):
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@contextmanager
def file_size_limit(num_bytes):
    """The kernel refuses to let any file of this process grow further, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


def test_links_that_leave_the_folder_are_refused_and_those_inside_are_not(tmp_path):
    storage = LocalStorage(tmp_path / "cache")
    storage.put("a/x", b"1")
    (tmp_path / "secret").write_text("2")
    (storage.root / "out").symlink_to(tmp_path / "secret")
    (storage.root / "dangling").symlink_to(tmp_path / "nothing")
    (storage.root / "inside").symlink_to("a/x")
    assert storage.read("inside") == b"1"
    for name in ("out", "dangling"):
        with pytest.raises(CorruptCache, match=f"{name}: this link leaves the folder"):
            storage.read(name)
        with pytest.raises(CorruptCache, match=f"{name}: this link leaves the folder"):
            storage.put(name, b"3")
    assert (tmp_path / "secret").read_text() == "2"


@pytest.mark.parametrize("kind", ["models", "datasets"])
@pytest.mark.parametrize("place", ["", "caches/of a teacher"])
def test_a_snapshot_of_the_hub_links_into_its_own_store(tmp_path, kind, place):
    """As `huggingface_hub` lays a repository out; the cache may be a folder of it."""
    store = tmp_path / f"{kind}--owner--name"
    (store / "blobs").mkdir(parents=True)
    (store / "blobs" / "ab12").write_text("1")
    root = store / "snapshots" / "c0ffee" / place
    (root / "commits").mkdir(parents=True)
    blob = os.path.relpath(store / "blobs" / "ab12", root / "commits")
    (root / "commits" / "x").symlink_to(blob)
    (tmp_path / "hub").symlink_to(root)
    for folder in (root, tmp_path / "hub"):
        storage = LocalStorage(folder)
        assert storage.read("commits/x") == b"1"
        assert storage.list("commits") == ["commits/x"]


def test_a_snapshot_links_nowhere_else(tmp_path):
    for name in ("models--a--b", "models--c--d"):
        (tmp_path / name / "blobs").mkdir(parents=True)
        (tmp_path / name / "blobs" / "ab12").write_text("secret")
        (tmp_path / name / "refs").mkdir()
        (tmp_path / name / "refs" / "main").write_text("secret")
    root = tmp_path / "models--a--b" / "snapshots" / "c0ffee"
    elsewhere = root.parent / "beef"
    for folder in (root, elsewhere):
        folder.mkdir(parents=True)
        (folder / "x").symlink_to("../../blobs/ab12")
    outside = [
        tmp_path / "models--c--d" / "blobs" / "ab12",
        tmp_path / "models--a--b" / "refs" / "main",
        elsewhere / "real",
        tmp_path / "models--a--b" / "blobs" / "out",
    ]
    (elsewhere / "real").write_text("secret")
    (tmp_path / "models--a--b" / "blobs" / "out").symlink_to(tmp_path / "models--c--d/refs/main")
    for number, place in enumerate(outside):
        (root / f"link{number}").symlink_to(place)
        with pytest.raises(CorruptCache, match=f"link{number}: this link leaves the folder"):
            LocalStorage(root).read(f"link{number}")
    (tmp_path / "models--c--d" / "blobs" / "ab12").unlink()
    (tmp_path / "models--c--d" / "blobs").rmdir()
    (tmp_path / "models--c--d" / "blobs").symlink_to(tmp_path / "models--a--b" / "blobs")
    other = tmp_path / "models--c--d" / "snapshots" / "c0ffee"
    other.mkdir(parents=True)
    (other / "x").symlink_to("../../blobs/ab12")
    with pytest.raises(CorruptCache, match="x: this link leaves the folder"):
        LocalStorage(other).read("x")


@pytest.mark.parametrize(
    "place", ["snapshots/c0ffee", "models--a--b/c0ffee", "models--a--b/old/c0ffee", "m--a/s/c"]
)
def test_a_folder_that_is_no_snapshot_has_no_store(tmp_path, place):
    root = tmp_path / place
    root.mkdir(parents=True)
    (root.parent.parent / "blobs").mkdir()
    (root.parent.parent / "blobs" / "ab12").write_text("secret")
    (root / "x").symlink_to("../../blobs/ab12")
    with pytest.raises(CorruptCache, match="x: this link leaves the folder"):
        LocalStorage(root).read("x")


def test_a_linked_folder_that_leaves_the_cache_is_refused_as_well(tmp_path):
    storage = LocalStorage(tmp_path / "cache")
    storage.put("x", b"1")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("2")
    (storage.root / "shards").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CorruptCache, match="leaves the folder"):
        storage.list("shards")
    with pytest.raises(CorruptCache, match="leaves the folder"):
        storage.read("shards/secret")


@pytest.mark.parametrize("link", ["root", "above", "none"])
def test_a_path_is_checked_with_a_look_at_each_of_its_own_parts(tmp_path, monkeypatch, link):
    """However deep the folder lies, and whether or not it is a link: a commit is two parts."""
    real = tmp_path / "a" / "b" / "c" / "cache"
    LocalStorage(real).put("commits/00000.json", b"{}")
    (tmp_path / "above").symlink_to(tmp_path / "a")
    (tmp_path / "root").symlink_to(real)
    places = {"root": tmp_path / "root", "above": tmp_path / "above/b/c/cache", "none": real}
    storage, looks = LocalStorage(places[link]), []
    original = os.lstat
    monkeypatch.setattr(os, "lstat", lambda *place, **o: looks.append(place) or original(*place))
    assert storage.local("commits/00000.json").read_bytes() == b"{}"
    assert len(looks) == 2


def test_the_cache_folder_itself_may_be_a_link(tmp_path):
    LocalStorage(tmp_path / "real").put("a/x", b"1")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert LocalStorage(tmp_path / "link").read("a/x") == b"1"


def test_reading_names_what_is_wrong(tmp_path):
    storage = LocalStorage(tmp_path)
    storage.put("x", b"123")
    assert storage.read("x", max_bytes=3) == b"123"
    with pytest.raises(CorruptCache, match="x: 3 bytes where at most 2 are expected"):
        storage.read("x", max_bytes=2)
    with pytest.raises(CorruptCache, match="y: this file is missing"):
        storage.read("y")
    (tmp_path / "folder").mkdir()
    with pytest.raises(TeacherCacheError, match="folder: cannot be read: Is a directory"):
        storage.read("folder")
    with pytest.raises(TeacherCacheError, match="x/y: cannot be read: Not a directory"):
        storage.read("x/y")


@pytest.mark.parametrize("verb", ["put", "put_new"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("call", ["fsync", "open"])
def test_a_full_disk_says_so_and_leaves_nothing_half_written(
    tmp_path, monkeypatch, verb, number, call
):
    storage = LocalStorage(tmp_path)
    storage.put("old", b"old")
    fail = failing(OSError(number, os.strerror(number)))
    if call == "fsync":
        monkeypatch.setattr(os, "fsync", fail)
    else:
        monkeypatch.setattr(local, "open", fail, raising=False)
    with pytest.raises(DiskFull, match=f"{tmp_path}: {FULL}") as caught:
        getattr(storage, verb)("new" if verb == "put_new" else "old", b"new")
    assert caught.value.exit_code == 1
    assert tree(tmp_path) == {"old"}
    assert storage.read("old") == b"old"


def test_a_file_that_really_cannot_grow_is_a_full_disk(tmp_path):
    storage = LocalStorage(tmp_path)
    with file_size_limit(10_000):
        with pytest.raises(DiskFull, match=FULL):
            storage.put("x", b"1" * 20_000)
        assert tree(tmp_path) == set()
        storage.put("x", b"1" * 9_000)
    assert tree(tmp_path) == {"x"}


def test_a_full_disk_while_making_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "mkdir", failing(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(DiskFull, match=FULL):
        LocalStorage(tmp_path / "cache").put("x", b"1")


@pytest.mark.parametrize(
    ("number", "kind", "message"),
    [
        (errno.EACCES, Refused, "cannot be written .*Choose another --out"),
        (errno.EROFS, Refused, "cannot be written .*Choose another --out"),
        (errno.EIO, TeacherCacheError, "Input/output error"),
    ],
)
def test_other_failures_to_write_are_our_errors_too(tmp_path, monkeypatch, number, kind, message):
    storage = LocalStorage(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(OSError(number, os.strerror(number))))
    with pytest.raises(kind, match=message):
        storage.put("x", b"1")
    assert tree(tmp_path) == set()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(Refused, match=r"cannot be written .*Choose another --out"):
            LocalStorage(tmp_path).put("x", b"1")
    finally:
        tmp_path.chmod(0o700)


def test_a_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(TeacherCacheError, match=r"cache: (File exists|Not a directory)"):
        LocalStorage(tmp_path / "cache").put("x", b"1")


def test_a_disk_without_hard_links_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", failing(PermissionError(errno.EPERM, "not permitted")))
    storage = LocalStorage(tmp_path)
    with pytest.raises(Refused, match=r"no hard links.*local or network disk that has them"):
        storage.put_new("x", b"1")
    assert tree(tmp_path) == set()


def test_a_full_disk_at_the_link_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", failing(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(DiskFull, match=FULL):
        LocalStorage(tmp_path).put_new("x", b"1")
    assert tree(tmp_path) == set()


def test_temporary_files_are_unique_beside_their_name_and_gone_after_any_exception(tmp_path):
    storage = LocalStorage(tmp_path)
    seen = set()

    def interrupted():
        with storage.temporary("a/x") as temporary:
            temporary.write_bytes(b"half")
            seen.add(temporary)
            assert temporary.parent == tmp_path / "a"
            assert list(temporary_files(tmp_path)) == [temporary]
            assert storage.list("a") == []  # never listed
            assert temporary_writer(temporary)[1] == os.getpid()
            raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            interrupted()
    assert len(seen) == 2
    assert tree(tmp_path) == set()


def test_the_writer_of_a_temporary_file_is_known_whatever_its_host_is_called(tmp_path, monkeypatch):
    monkeypatch.setattr(local.socket, "gethostname", lambda: "node-7.rack.example")
    with LocalStorage(tmp_path).temporary("x") as temporary:
        assert temporary_writer(temporary) == ("node-7.rack.example", os.getpid())


def test_files_are_flushed_before_they_get_their_name_and_the_folder_after(tmp_path, monkeypatch):
    """What makes "done" survive a power cut is the order of these calls."""
    storage = LocalStorage(tmp_path)
    storage.put("first", b"")
    calls = []

    def spy(module, name):
        original = getattr(module, name)

        def call(*arguments, **options):
            calls.append(name)
            return original(*arguments, **options)

        monkeypatch.setattr(module, name, call)

    spy(os, "fsync")
    spy(os, "link")
    storage.put_new("x", b"1")
    assert calls == ["fsync", "link", "fsync"]
    calls.clear()
    monkeypatch.setattr(
        local, "crash_point", lambda name: calls.append(name) if "publish" in name else None
    )
    storage.put("x", b"2")
    assert calls == ["fsync", "before-publish", "after-publish", "fsync"]
