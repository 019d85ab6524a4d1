"""`verify --seal`: what a seal finds that checksums inside the cache cannot."""

import hashlib

import pyarrow as pa
import pytest

from shared.errors import CorruptCache, IncompleteCache
from teacher_cache.config import VerifyConfig
from teacher_cache.tools.verify import verify
from tests.teacher_cache.tools.test_check import rewritten, shift


def test_a_seal_holds_the_sha256_of_every_shard(cache_copy):
    assert verify(VerifyConfig(cache=cache_copy, seal=True)).sealed
    table = pa.ipc.open_file(str(cache_copy / "index.arrow")).read_all().to_pylist()
    files = sorted(path.name for path in (cache_copy / "shards").iterdir())
    assert [row["file"] for row in table] == [f"shards/{name}" for name in files]
    for row in table:
        data = (cache_copy / row["file"]).read_bytes()
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
    assert verify(VerifyConfig(cache=cache_copy)).sealed


def test_shards_written_anew_with_right_checksums_break_the_seal(cache_dir, cache_copy):
    from shared.cache import open_cache

    verify(VerifyConfig(cache=cache_copy, seal=True))
    rewritten(open_cache(cache_dir), cache_copy, shift)
    with pytest.raises(CorruptCache, match="are not the ones that were sealed"):
        verify(VerifyConfig(cache=cache_copy))


def test_an_incomplete_cache_cannot_be_sealed(cache_copy):
    (cache_copy / "commits" / "00003.json").unlink()
    with pytest.raises(IncompleteCache, match="1 of 13 shards are missing"):
        verify(VerifyConfig(cache=cache_copy, seal=True))
    assert not (cache_copy / "index.arrow").exists()


def test_a_dropped_shard_takes_the_seal_along(cache_copy):
    verify(VerifyConfig(cache=cache_copy, seal=True))
    shard = sorted((cache_copy / "shards").iterdir())[2]
    shard.write_bytes(shard.read_bytes()[:-8])
    found = verify(VerifyConfig(cache=cache_copy, drop_bad=True))
    assert found.dropped == [2]
    assert not found.sealed
