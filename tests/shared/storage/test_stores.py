"""What every store must do, and a cache written through one and read through it, from end to end.

Another store joins by a line in STORES.
"""

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from shared import open_cache
from shared.cache import committed_shards
from shared.errors import CorruptCache, IncompleteCache
from shared.format import manifest_file
from shared.format.commits import commit_name
from shared.format.writer import ShardWriter, encode_block
from shared.models.tokenizer import load_cached_tokenizer
from shared.storage.base import Storage, check_name
from shared.storage.local import LocalStorage
from tests.shared.storage.test_local import tree


class MemoryStore(Storage):
    """A store without folders: names and bytes. What `local` hands out are copies in `scratch`."""

    def __init__(self, scratch: Path) -> None:
        self.scratch, self.files, self.lock = scratch, {}, threading.Lock()

    @property
    def root(self) -> str:
        return "memory://toy"

    def size(self, name: str) -> int | None:
        check_name(self.root, name)
        data = self.files.get(name)
        return None if data is None else len(data)

    def local(self, name: str) -> Path:
        check_name(self.root, name)
        for other, data in list(self.files.items()):
            if other == name or other.startswith(f"{name}/"):
                path = self.scratch / "copies" / other
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
        return self.scratch / "copies" / name

    def read(self, name: str, *, max_bytes: int = 256 << 20) -> bytes:
        size = self.size(name)
        if size is None:
            raise CorruptCache(f"{self.where(name)}: this file is missing")
        if size > max_bytes:
            raise CorruptCache(
                f"{self.where(name)}: {size:,} bytes where at most {max_bytes:,} are expected"
            )
        return self.files[name]

    def put(self, name: str, data: bytes) -> None:
        check_name(self.root, name)
        self.files[name] = data

    def put_new(self, name: str, data: bytes) -> bool:
        check_name(self.root, name)
        with self.lock:
            if name in self.files:
                return False
            self.files[name] = data
            return True

    @contextmanager
    def temporary(self, name: str) -> Iterator[Path]:
        check_name(self.root, name)
        path = self.scratch / uuid.uuid4().hex
        try:
            yield path
        finally:
            path.unlink(missing_ok=True)

    def publish(self, temporary: Path, name: str) -> None:
        self.put(name, temporary.read_bytes())

    def list(self, prefix: str = "") -> list[str]:
        if prefix:
            check_name(self.root, prefix)
        return sorted(name for name in self.files if name.rpartition("/")[0] == prefix)

    def delete(self, name: str) -> None:
        check_name(self.root, name)
        self.files.pop(name, None)


def in_memory(folder: Path) -> MemoryStore:
    folder.mkdir()
    return MemoryStore(folder)


STORES = {
    "local": lambda folder: LocalStorage(folder / "cache"),
    "odd": lambda folder: LocalStorage(folder / "a folder with späces" / "deeper"),
    "memory": lambda folder: in_memory(folder / "scratch"),
}


@pytest.fixture(params=STORES)
def store(request, tmp_path) -> Storage:
    return STORES[request.param](tmp_path)


def test_a_file_is_put_read_replaced_listed_and_deleted(store):
    assert store.list() == store.list("a") == []
    assert not store.exists("a/x")
    assert store.size("a/x") is None
    store.put("a/x", b"1")
    store.put("a/x", b"22")
    assert store.read("a/x") == b"22"
    assert store.put_new("a/y", b"")
    assert not store.put_new("a/y", b"3")
    assert store.read("a/y") == b""
    store.put("z", b"z")
    assert store.exists("a/x")
    assert (store.size("a/x"), store.size("a/y")) == (2, 0)
    assert not store.exists("a")  # a folder is no file
    assert store.size("a") is None
    assert store.size("z/x") is None
    assert store.list("a") == ["a/x", "a/y"]
    assert store.list() == ["z"]
    store.delete("a/x")
    store.delete("a/x")
    assert store.list("a") == ["a/y"]


def test_a_name_has_a_place_for_messages_whatever_it_is(store):
    for name in ("a/x", "nowhere", "../x", ""):
        assert store.where(name) == f"{store.root}/{name}"


@pytest.mark.parametrize(
    "name",
    [
        *("", "..", "../x", "a/../../x", "a/..", "/etc/passwd", "a//x", "a/", "./x", "a\0x"),
        *("C:x", "..\\x", "a\nb", "x" * 201),
    ],
)
def test_a_name_that_leaves_the_store_is_refused(store, name, tmp_path):
    (tmp_path / "x").write_text("secret")
    before = tree(tmp_path)
    for verb in (
        store.exists,
        store.size,
        store.local,
        store.read,
        store.delete,
        lambda name: store.put(name, b""),
        lambda name: store.put_new(name, b""),
    ):
        with pytest.raises(CorruptCache, match=r"does not stay inside the folder|is no name of a"):
            verb(name)
    assert tree(tmp_path) == before


def test_reading_names_what_is_wrong(store):
    store.put("x", b"123")
    assert store.read("x", max_bytes=3) == b"123"
    with pytest.raises(CorruptCache, match="x: 3 bytes where at most 2 are expected"):
        store.read("x", max_bytes=2)
    with pytest.raises(CorruptCache, match="y: this file is missing"):
        store.read("y")


def test_of_many_first_writers_exactly_one_wins(store):
    for turn in range(20):
        barrier, won = threading.Barrier(4), []

        def write(number, barrier=barrier, won=won, name=f"a/{turn}"):
            barrier.wait()
            if store.put_new(name, bytes([number]) * 1000):
                won.append(number)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert store.read(f"a/{turn}") == bytes(won) * 1000
    assert len(store.list("a")) == 20


def test_a_reader_never_sees_half_a_file(store):
    store.put("x", b"0" * 100_000)
    stop = threading.Event()

    def rewrite():
        number = 0
        while not stop.is_set():
            number = (number + 1) % 10
            store.put("x", str(number).encode() * 100_000)

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        for _ in range(200):
            data = store.read("x")
            assert len(data) == 100_000
            assert len(set(data)) == 1
    finally:
        stop.set()
        thread.join()


def test_a_local_path_has_the_content_of_a_file_and_of_a_folder(store):
    store.put("a/x", b"1")
    store.put("a/b/y", b"22")
    assert store.local("a/x").read_bytes() == b"1"
    folder = store.local("a")
    assert {name: (folder / name).read_bytes() for name in tree(folder)} == {
        "x": b"1",
        "b/y": b"22",
    }
    assert not store.local("a/z").exists()
    assert not store.local("nowhere").exists()


def test_a_temporary_file_gets_its_name_whole_or_is_gone(store, tmp_path):
    with store.temporary("a/x") as first, store.temporary("a/x") as second:
        assert first != second
        first.write_bytes(b"1")
        second.write_bytes(b"2")
        assert store.list("a") == []
        store.publish(second, "a/x")
        store.publish(first, "a/x")
    assert store.read("a/x") == b"1"
    assert store.list("a") == ["a/x"]

    def interrupted():
        with store.temporary("a/y") as path:
            path.write_bytes(b"half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        interrupted()
    assert store.list("a") == ["a/x"]
    assert not first.exists()
    assert not any(path.read_bytes() == b"half" for path in tmp_path.rglob("*") if path.is_file())


# A cache in it


@pytest.fixture
def filled(store, cache_dir):
    """The cache of the other tests, written again through the store: by its frames, as they are."""
    source = open_cache(cache_dir)
    for name in source.manifest.side_files:
        assert store.put_new(name, source.storage.read(name))
    assert manifest_file.publish(store, source.manifest)
    first = 0
    for commit in source.commits:
        with ShardWriter(store, source.manifest, source.cache_id, commit.shard) as writer:
            for number in range(len(commit.block_rows)):
                writer.write(_encoded(source, first + number, number))
            writer.statistics = commit.statistics
        assert writer.won
        first += len(commit.block_rows)
    return store


def _encoded(source, block, number):
    layers = source.manifest.hidden.layers
    decoded = source.read_block(block, hidden_layers=layers)
    return encode_block(decoded, number, source.manifest, source.ranks, source.scales)


def test_a_cache_written_through_a_store_is_read_through_it(filled, cache_dir):
    cache, expected = open_cache(filled), open_cache(cache_dir)
    assert cache.cache_id == expected.cache_id
    assert cache.storage is filled
    assert cache.path == filled.root
    assert committed_shards(filled) == list(range(len(expected.commits)))
    assert cache.row_tokens.tolist() == expected.row_tokens.tolist()
    layers = cache.manifest.hidden.layers
    for block in range(cache.num_blocks):
        found, wanted = (c.read_block(block, hidden_layers=layers) for c in (cache, expected))
        np.testing.assert_array_equal(found.row_ids, wanted.row_ids)
        np.testing.assert_array_equal(found.input_ids, wanted.input_ids)
        assert found.target.ids.shape == wanted.target.ids.shape
        assert np.array_equal(found.target.ids, wanted.target.ids)
    assert [row.row_id for row in cache[::7]] == [row.row_id for row in expected[::7]]
    assert (
        load_cached_tokenizer(filled).get_vocab()
        == load_cached_tokenizer(expected.storage).get_vocab()
    )
    torch_std = cache.channel_deviation(-1)
    assert torch_std.tolist() == expected.channel_deviation(-1).tolist()


def test_the_second_writer_of_a_shard_loses_and_leaves_nothing(filled):
    cache = open_cache(filled)
    names = [*filled.list("shards"), *filled.list("commits")]
    with ShardWriter(filled, cache.manifest, cache.cache_id, 0) as writer:
        writer.write(_encoded(cache, 0, 0))
    assert not writer.won
    assert [*filled.list("shards"), *filled.list("commits")] == names


def test_what_is_missing_or_damaged_is_named_by_its_place_in_the_store(filled):
    cache = open_cache(filled)
    commit, name = cache.commits[1], commit_name(1)
    data = filled.read(name)
    filled.delete(name)
    with pytest.raises(IncompleteCache, match=f"{filled.root}: 12 of 13 shards are done"):
        open_cache(filled)
    assert len(open_cache(filled, allow_partial=True).commits) == 12
    filled.put(name, data.replace(b'"tokens":', b'"tokenz":'))
    with pytest.raises(CorruptCache, match=f"{filled.root}/{name}: this commit does not match"):
        open_cache(filled)
    filled.put(name, data)
    shard = filled.read(commit.file)
    row = commit.rows + cache.commits[0].rows - 1
    for damage, message in ((shard[:-9], r"[\d,]+ bytes, but its commit says"), (None, "missing")):
        if damage is None:
            filled.delete(commit.file)
            filled_again = _fresh(filled)
        else:
            filled.put(commit.file, damage)
            filled_again = filled
        with pytest.raises(CorruptCache, match=f"{filled.root}/{commit.file}: .*{message}"):
            open_cache(filled_again)[row]


def _fresh(store: Storage) -> Storage:
    """A store that made no copies yet: what is deleted is not to be had from an old one."""
    if not isinstance(store, MemoryStore):
        return store
    fresh = in_memory(store.scratch.with_name("fresh"))
    fresh.files = store.files
    return fresh
