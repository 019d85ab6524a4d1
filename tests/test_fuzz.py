"""Bytes and values changed at random where every hash is right again: only our own errors come out.

What a file says is changed in two ways: as bytes, which mostly breaks its syntax, and as values of
its JSON, which reaches the code behind the parser.
"""

import copy
import hashlib
import json
import math
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared.errors import TeacherCacheError
from shared.format.commits import _checksum, commit_name, file_hash
from shared.format.manifest_file import MANIFEST, MANIFEST_HASH
from tests.shared.format.test_shards import assert_same
from tests.test_hostile import batch_of, forge_commit, forge_manifest, forge_side_file, read_all

FEW = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MANY = settings(FEW, max_examples=1500)


KINDS = {
    "topk": {"top_k": 4, "hidden_layers": (-1,), "temperature": (2.0,)},
    "sample": {"targets": "sample", "mean_entries": 6.0},
    "adaptive": {"targets": "adaptive", "mean_entries": 6.0, "value_bits": 16},
}


@pytest.fixture(scope="module", params=KINDS)
def pristine(request, capture):
    """20 documents in one shard."""
    return capture(limit_documents=20, **KINDS[request.param])


class Forgery:
    """A cache that is damaged again and again, each time from the same good one."""

    def __init__(self, good, path):
        self.good, self.path = good, Path(shutil.copytree(good, path))
        self.expected, _, _ = read_all(good)

    def __enter__(self):
        return self.path

    def __exit__(self, *_):
        for kept in self.path.rglob("*"):
            if kept.is_file() and not (self.good / kept.relative_to(self.path)).exists():
                kept.unlink()
        for source in self.good.rglob("*"):
            copy = self.path / source.relative_to(self.good)
            if source.is_file() and (not copy.exists() or copy.read_bytes() != source.read_bytes()):
                shutil.copyfile(source, copy)

    def outcome(self):
        """The blocks, or None where an error of ours came; any other error is a failure."""
        try:
            return read_all(self.path)[0]
        except TeacherCacheError:
            return None

    def assert_error_or_same(self):
        blocks = self.outcome()
        if blocks is not None:
            assert len(blocks) == len(self.expected)
            for found, expected in zip(blocks, self.expected, strict=True):
                assert_same(found, expected)


@pytest.fixture(scope="module")
def forgery(pristine, tmp_path_factory):
    return Forgery(pristine, tmp_path_factory.mktemp("forged") / "cache")


PLACES = st.floats(0, 1, exclude_max=True)
EDITS = st.lists(
    st.tuples(st.sampled_from(["set", "insert", "cut", "swap"]), PLACES, st.binary(max_size=12)),
    min_size=1,
    max_size=4,
)
WEIRD = st.sampled_from(
    [
        *(0, 1, -1, 255, 2**31 - 1, 2**31, 2**62, 2**63, 2**64, -(2**63), 10**30),
        *(0.5, math.nan, math.inf, -math.inf, 1e308),
        *("", "x", "\ud800", "../x", "a\0b", "x" * 1000, "00", "none", "topk", "adaptive", "bf16"),
        *(None, True, [], {}, [0], [[]], ["x"], {"x": 0}, [2**40] * 3),
    ]
)


def edited(data, edits):
    """The bytes after a few edits at places from 0 to 1."""
    data = bytearray(data)
    for how, place, new in edits:
        at = int(place * len(data))
        if how == "set":
            data[at : at + len(new)] = new
        elif how == "insert":
            data[at:at] = new
        elif how == "cut":
            del data[at : at + 1 + len(new)]
        else:
            other = (at * 7 + 3) % max(1, len(data))
            data[at : at + 8], data[other : other + 8] = data[other : other + 8], data[at : at + 8]
    return bytes(data)


def leaves(value, path=()):
    """The place of every value inside parsed JSON, objects and lists included."""
    if path:
        yield path
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))


def with_value(raw, place, value, *, remove=False):
    """Parsed JSON with one value replaced or left out, in place."""
    paths = list(leaves(raw))
    *parents, last = paths[int(place * len(paths))]
    for key in parents:
        raw = raw[key]
    if remove:
        del raw[last]
    else:
        raw[last] = copy.deepcopy(value)  # a list from an example must not change for the next
    return raw


def check_manifest_bytes(forgery, edits):
    with forgery as path:
        (path / MANIFEST).write_bytes(edited((path / MANIFEST).read_bytes(), edits))
        digest = hashlib.sha256((path / MANIFEST).read_bytes()).hexdigest()
        (path / MANIFEST_HASH).write_text(digest)
        forgery.outcome()


def check_manifest_values(forgery, places, value, remove):
    """The shards and commits agree with what the manifest has become."""
    with forgery as path:

        def change(raw):
            for place in places:
                with_value(raw, place, value, remove=remove)

        forge_manifest(path, change)
        forgery.outcome()


def check_commit_values(forgery, place, value, remove):
    with forgery as path:

        def change(body):
            with_value(body, place, value, remove=remove)
            return body

        forge_commit(path, change)
        forgery.assert_error_or_same()


def check_commit_bytes(forgery, edits):
    """With a right checksum wherever the result is still JSON."""
    with forgery as path:
        name = path / commit_name(0)
        data = edited(name.read_bytes(), edits)
        try:
            body = json.loads(data)
            body.pop("checksum", None)
            data = json.dumps(body | {"checksum": _checksum(body)}).encode()
        except (ValueError, AttributeError, TypeError):
            pass
        name.write_bytes(data)
        forgery.assert_error_or_same()


def check_shard(forgery, edits):
    """Around the frames: Arrow's header, its metadata and its footer; the length may change."""
    with forgery as path:
        (shard,) = (path / "shards").iterdir()
        data = shard.read_bytes()
        _, batch = batch_of(data)
        body = sum(buffer.size for c in batch.columns for buffer in c.buffers() if buffer)
        start = max(0, data.rfind(b"\xff\xff\xff\xff", 0, len(data) - body))
        tail = data.find(b"\xff\xff\xff\xff\0\0\0\0", len(data) - 16_000)
        parts = [data[: start + 4096], data[start + 4096 : tail], data[tail:]]
        which = 0 if edits[0][1] < 0.5 else 2
        parts[which] = edited(parts[which], edits)
        shard.write_bytes(b"".join(parts))
        forge_commit(path, shard=shard)
        forgery.assert_error_or_same()


def check_learnt(forgery, edits):
    """The order of the classes and deviations may change, and with them what is decoded."""
    with forgery as path:
        learnt = next(path.glob("learnt-*"))
        data = learnt.read_bytes()
        size = 8 + int.from_bytes(data[:8], "little")
        forge_side_file(path, "learnt-", edited(data[:size], edits) + data[size:])
        assert file_hash(learnt)
        forgery.outcome()


ONE_OR_TWO = st.lists(PLACES, min_size=1, max_size=2)
CHECKS = {
    "manifest bytes": (check_manifest_bytes, (EDITS,)),
    "manifest values": (check_manifest_values, (ONE_OR_TWO, WEIRD, st.just(False))),
    "manifest fields": (
        check_manifest_values,
        (ONE_OR_TWO.map(lambda x: x[:1]), WEIRD, st.just(True)),
    ),
    "commit bytes": (check_commit_bytes, (EDITS,)),
    "commit values": (check_commit_values, (PLACES, WEIRD, st.booleans())),
    "shard": (check_shard, (EDITS,)),
    "learnt file": (check_learnt, (EDITS,)),
}


@pytest.mark.parametrize("name", CHECKS)
def test_only_our_own_errors(forgery, name):
    check, strategies = CHECKS[name]
    FEW(given(st.tuples(*strategies))(lambda drawn: check(forgery, *drawn)))()


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_only_our_own_errors_in_many_more(forgery, name):
    check, strategies = CHECKS[name]
    MANY(given(st.tuples(*strategies))(lambda drawn: check(forgery, *drawn)))()
