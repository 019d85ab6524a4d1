"""`repack`: what it keeps equals what was there, and what it drops joins the tail."""

from pathlib import Path

import numpy as np
import pytest
import torch

from shared.cache import Cache, open_cache
from shared.errors import CacheMismatch, ConfigError
from shared.schema import layout
from teacher_cache.config import RepackConfig, VerifyConfig
from teacher_cache.inspection import verify
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


def planes_by_row(cache: Cache) -> dict[int, dict[str, bytes]]:
    """Row id -> the bytes of every plane of that row, cut out one row at a time."""
    found: dict[int, dict[str, bytes]] = {}
    start = 0
    for number in range(cache.num_blocks):
        values = cache.read_planes(number, layout(cache.manifest))
        at = {"row": 0, "token": 0, "position": 0, "segment": 0}
        for line, row_id in enumerate(values["row_ids.0"].view(np.uint64).tolist()):
            items = {"row": 1, "token": int(cache.row_tokens[start + line])}
            items["position"] = int(cache.row_positions[start + line])
            if "num_segments.0" in values:
                items["segment"] = int(values["num_segments.0"].view(np.uint32)[line])
            found[row_id] = {}
            for plane in layout(cache.manifest):
                first, size = at[plane.per] * plane.item_bytes, items[plane.per] * plane.item_bytes
                found[row_id][plane.name] = values[plane.name][first : first + size].tobytes()
            for per, count in items.items():
                at[per] += count
        start += int(cache.block_rows[number])
    return found


@pytest.fixture(scope="module")
def kinds(capture, cache_dir, labels_dir):
    return {"padded": cache_dir, "packed": capture(pack=True), "labels": labels_dir}


@pytest.mark.parametrize("kind", ["padded", "packed", "labels"])
def test_what_stays_is_copied_bit_by_bit(kinds, kind, tmp_path):
    repack(RepackConfig(cache=kinds[kind], out=tmp_path / "same"))
    old, new = open_cache(kinds[kind]), open_cache(tmp_path / "same")
    assert planes_by_row(new) == planes_by_row(old)
    for block in range(old.num_blocks):
        before, after = (
            c.read_block(block, hidden_layers=c.manifest.hidden.layers) for c in (old, new)
        )
        for name in ("row_ids", "input_ids", "positions", "entropy", "label_logprob", "segments"):
            assert np.array_equal(getattr(before, name), getattr(after, name))
        if old.has_targets:
            for name in ("ids", "logprobs", "log_tail"):
                assert np.array_equal(getattr(before.target, name), getattr(after.target, name))
        for layer, states in before.hidden.items():
            assert np.array_equal(states, after.hidden[layer])
    assert verify(VerifyConfig(cache=tmp_path / "same")).sound


@pytest.mark.parametrize("kind", ["padded", "packed", "labels"])
def test_rows_of_a_slice_are_copied_bit_by_bit_into_blocks_of_other_numbers(kinds, kind, tmp_path):
    repack(RepackConfig(cache=kinds[kind], out=tmp_path / "part", documents="130:310"))
    old, new = open_cache(kinds[kind]), open_cache(tmp_path / "part")
    expected = {n: row for n, row in planes_by_row(old).items() if 130 <= n >> 24 < 310}
    assert 0 < len(expected) < len(old)
    assert planes_by_row(new) == expected
    assert verify(VerifyConfig(cache=tmp_path / "part")).sound


def test_layers_that_stay_are_copied_bit_by_bit_under_another_number(cache_dir, tmp_path):
    """Layer 0 is the second of two, and becomes the first of one."""
    repack(RepackConfig(cache=cache_dir, out=tmp_path / "less", hidden_layers=(0,)))
    old, new = planes_by_row(open_cache(cache_dir)), planes_by_row(open_cache(tmp_path / "less"))
    for row_id, planes in new.items():
        assert "hidden.0.0" in planes
        assert planes == {name: old[row_id][name] for name in planes}
        assert {name for name in old[row_id] if name not in planes} == {
            "hidden.-1.0",
            "hidden.-1.1",
        }


@pytest.mark.parametrize(
    "options", [{"top_k": 3}, {"value_bits": 7}, {"top_k": 5, "value_bits": 8}]
)
def test_only_targets_that_change_are_coded_anew(capture, tmp_path, options):
    cache = capture(limit_documents=60, value_bits=16, temperature=(2.0,), hidden_layers=(-1,))
    repack(RepackConfig(cache=cache, out=tmp_path / "small", **options))
    old, new = planes_by_row(open_cache(cache)), planes_by_row(open_cache(tmp_path / "small"))
    assert old.keys() == new.keys()
    for row_id, planes in new.items():
        copied = {name for name in planes if not name.startswith("target_")}
        assert {"input_ids.0", "entropy.0", "hidden.-1.1", "log_partition_ratio.2.0"} <= copied
        assert all(planes[name] == old[row_id][name] for name in copied)
    one, other = (open_cache(path).read_block(0) for path in (cache, tmp_path / "small"))
    best_P = one.target.logprobs.argmax(1)
    rows = np.arange(len(best_P))
    found_P = other.target.logprobs.argmax(1)
    agree = one.target.ids[rows, best_P] == other.target.ids[rows, found_P]
    assert agree.mean() > 0.99  # codes of 7 bits may tie
    assert verify(VerifyConfig(cache=tmp_path / "small")).sound


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
