"""`repack`: what it keeps equals what was there, and what it drops joins the tail."""

from pathlib import Path

import numpy as np
import pytest
import torch

from shared.cache import open_cache
from shared.errors import CacheMismatch, ConfigError
from teacher_cache.config import RepackConfig
from teacher_cache.repack import repack


def test_fewer_entries_are_the_most_probable_and_the_mass_stays(cache_dir, tmp_path):
    repack(RepackConfig(cache=cache_dir, out=tmp_path / "small", top_k=3))
    old, new = open_cache(cache_dir), open_cache(tmp_path / "small")
    assert len(new) == len(old)
    for index in range(0, len(old), 17):
        before, after = old[index], new[index]
        assert torch.equal(after.input_ids, before.input_ids)
        best = before.targets.logprobs.argsort(dim=1, descending=True, stable=True)[:, :3]
        third = before.targets.logprobs.gather(1, best)[:, -1:]
        chosen = before.targets.ids[:, :, None] == after.targets.ids[:, None, :]
        found = torch.where(chosen.any(2), before.targets.logprobs, torch.inf).min(1).values
        assert torch.equal(found, third[:, 0])  # codes of equal value may stand for each other
        total = after.targets.logprobs.exp().sum(1) + after.targets.tail_mass
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=3e-6)
        kept = before.targets.logprobs.gather(1, best).exp().sum(1)
        # 7 bits of a smaller range, relative to the tail: 2.4e-4.
        torch.testing.assert_close(1 - after.targets.tail_mass, kept, rtol=1e-3, atol=1e-3)
        for layer in (-1, 0):
            assert torch.equal(after.hidden[layer], before.hidden[layer])
    assert new.manifest.origin == {"cache_id": old.cache_id, "documents": ":"}


def test_a_slice_of_documents_keeps_whole_rows(cache_dir, tmp_path):
    repack(RepackConfig(cache=cache_dir, out=tmp_path / "part", documents="100:200"))
    old, new = open_cache(cache_dir), open_cache(tmp_path / "part")
    wanted = [row.row_id for row in old if 100 <= row.row_id >> 24 < 200]
    assert [row.row_id for row in new] == wanted
    row = next(row for row in old if row.row_id == wanted[5])
    assert torch.equal(new[5].targets.ids, row.targets.ids)


def test_layers_can_be_dropped(cache_dir, tmp_path):
    repack(RepackConfig(cache=cache_dir, out=tmp_path / "a", hidden_layers=(0,)))
    repack(RepackConfig(cache=cache_dir, out=tmp_path / "b", drop_hidden=True))
    assert set(open_cache(tmp_path / "a")[0].hidden) == {0}
    assert set(open_cache(tmp_path / "b")[0].hidden) == set()


def test_repacking_to_the_same_rounds_once_more_at_most(cache_dir, tmp_path):
    repack(RepackConfig(cache=cache_dir, out=tmp_path / "same"))
    old, new = open_cache(cache_dir), open_cache(tmp_path / "same")
    for block in range(old.num_blocks):
        before, after = old.read_block(block), new.read_block(block)
        assert np.array_equal(before.target.ids, after.target.ids)
        # A code is half a step of sqrt off at most; of a range of 5 nats that is 0.04.
        np.testing.assert_allclose(before.target.logprobs, after.target.logprobs, atol=0.04)
        assert np.array_equal(before.entropy, after.entropy)


def test_run_again_resumes_and_another_wish_is_refused(cache_dir, tmp_path):
    config = RepackConfig(cache=cache_dir, out=tmp_path / "small", top_k=3)
    repack(config)
    commit = tmp_path / "small" / "commits" / "00001.json"
    text = commit.read_bytes()
    commit.unlink()
    repack(config)
    assert commit.read_bytes() == text
    with pytest.raises(CacheMismatch, match=r"targets.top_k: the cache has 3, asked for 2"):
        repack(RepackConfig(cache=cache_dir, out=tmp_path / "small", top_k=2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, "only makes smaller"),
        ({"value_bits": 8}, "only makes smaller"),
        ({"hidden_layers": (4,)}, "holds layers -1, 0"),
        ({"documents": "x"}, "expected A:B"),
    ],
)
def test_more_than_there_is_is_refused(cache_dir, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        repack(RepackConfig(cache=cache_dir, out=Path(tmp_path) / "out", **options))


@pytest.mark.parametrize("kind", ["sample", "adaptive", "dense"])
def test_other_kinds_keep_their_targets(kind, capture, tmp_path):
    options = {} if kind == "dense" else {"mean_entries": 6.0}
    old = open_cache(capture(targets=kind, limit_documents=40, **options))
    repack(RepackConfig(cache=old.storage.root, out=tmp_path / "part", documents="5:30"))
    new = open_cache(tmp_path / "part")
    rows = {row.row_id: row.targets for row in old if 5 <= row.row_id >> 24 < 30}
    assert [row.row_id for row in new] == list(rows)
    for row in new:
        before, after = rows[row.row_id], row.targets
        assert torch.equal(after.ids, before.ids)
        if kind == "sample":  # nothing is rounded, so nothing is drawn again
            assert torch.equal(after.logprobs, before.logprobs)
        torch.testing.assert_close(after.logprobs, before.logprobs, rtol=1e-3, atol=0.05)
        torch.testing.assert_close(after.tail_mass, before.tail_mass, rtol=3e-4, atol=0)
        assert after.counts is None or torch.equal(after.counts, before.counts)
