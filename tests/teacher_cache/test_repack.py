"""`repack`: what it keeps equals what was there, and what it drops joins the tail."""

from pathlib import Path

import numpy as np
import pytest
import torch

from shared.cache import Cache, open_cache
from shared.errors import CacheMismatch, ConfigError
from shared.format.schema import planes_of
from teacher_cache.config import RepackConfig, VerifyConfig
from teacher_cache.tools.inspection import summary, verify
from teacher_cache.tools.repack import repack


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


@pytest.mark.parametrize("codec", ["fp8", "int8"])
def test_states_of_some_positions_stay_with_their_rows(codec, capture, tmp_path):
    options = {"hidden_layers": (-1, 0), "hidden_codec": codec, "hidden_every": 3}
    source = capture(limit_documents=150, top_k=4, **options)
    repack(RepackConfig(cache=source, out=tmp_path / "a", documents="40:90", hidden_layers=(0,)))
    old, new = open_cache(source), open_cache(tmp_path / "a")
    wanted = [row for row in old if 40 <= row.row_id >> 24 < 90]
    for row, before in zip(new, wanted, strict=True):
        assert row.hidden.keys() == {0}
        assert torch.equal(row.hidden_positions, before.hidden_positions)
        # fp8 again is the same; int8 is rounded once more
        off = (row.hidden[0].float() - before.hidden[0].float()).norm(dim=1)
        limit = 0 if codec == "fp8" else 0.01 * before.hidden[0].float().norm(dim=1)
        assert (off <= limit).all()
    errors = summary(new)["hidden_error"]
    assert errors == {"0": summary(old)["hidden_error"]["0"]}


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
        values = cache.read_planes(number, planes_of(cache.manifest))
        at = {"row": 0, "token": 0, "position": 0, "segment": 0, "entry": 0, "state": 0}
        for line, row_id in enumerate(values["row_ids.0"].view(np.uint64).tolist()):
            items = {"row": 1, "token": int(cache.row_tokens[start + line])}
            items["position"] = int(cache.row_positions[start + line])
            items["state"] = -(-items["position"] // cache.manifest.hidden.every)
            if "target_counts.0" in values:
                counts = values["target_counts.0"]
                counts = counts[at["position"] : at["position"] + items["position"]]
                items["entry"] = int(counts.sum())
            if "num_segments.0" in values:
                items["segment"] = int(values["num_segments.0"].view(np.uint32)[line])
            found[row_id] = {}
            for plane in planes_of(cache.manifest):
                first, size = at[plane.per] * plane.item_bytes, items[plane.per] * plane.item_bytes
                found[row_id][plane.name] = values[plane.name][first : first + size].tobytes()
            for per, count in items.items():
                at[per] += count
        start += int(cache.block_rows[number])
    return found


@pytest.fixture(scope="module")
def kinds(capture, cache_dir, labels_dir):
    ragged = {"mean_entries": 10.0, "limit_documents": 120}
    return {
        "padded": cache_dir,
        "packed": capture(pack=True),
        "labels": labels_dir,
        "adaptive": capture(targets="adaptive", **ragged),
        "sample": capture(targets="sample", **ragged),
        "dense": capture(targets="dense", limit_documents=40),
    }


@pytest.mark.parametrize("kind", ["padded", "packed", "labels", "adaptive", "sample", "dense"])
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


def entries_of(cache: Cache, row: int) -> list[dict[int, float]]:
    """Class -> probability or weight at each position of a row."""
    targets = cache[row].targets
    sizes = targets.counts.tolist()
    pairs = zip(targets.ids.split(sizes), targets.logprobs.exp().split(sizes), strict=True)
    return [dict(zip(ids.tolist(), p.tolist(), strict=True)) for ids, p in pairs]


def test_fewer_adaptive_entries_are_those_above_a_higher_threshold(kinds, tmp_path):
    repack(RepackConfig(cache=kinds["adaptive"], out=tmp_path / "small", mean_entries=4))
    old, new = open_cache(kinds["adaptive"]), open_cache(tmp_path / "small")
    threshold = new.manifest.targets.threshold
    assert threshold > old.manifest.targets.threshold
    count = positions = 0
    for row in range(len(old)):
        tails = new[row].targets.tail_mass.tolist()
        for before, after, tail in zip(
            entries_of(old, row), entries_of(new, row), tails, strict=True
        ):
            sure = {i for i, p in before.items() if p >= threshold * (1 + 1e-5)}
            near = {i for i, p in before.items() if p >= threshold * (1 - 1e-5)}
            largest = set() if sure else {max(before, key=before.get)}
            assert sure | largest <= after.keys() <= near | largest
            assert sum(after.values()) + tail == pytest.approx(1, abs=3e-6)
            assert sum(before[i] for i in after) == pytest.approx(1 - tail, abs=1e-3)
            count, positions = count + len(after), positions + 1
    assert count / positions == pytest.approx(4, rel=0.1)


def test_a_sample_is_drawn_again_and_stays_unbiased(kinds, tmp_path):
    """Not truncated: what leaves must be made up for by what stays. Over 2,700 positions."""
    repack(RepackConfig(cache=kinds["sample"], out=tmp_path / "small", mean_entries=4))
    old, new = open_cache(kinds["sample"]), open_cache(tmp_path / "small")
    c = new.manifest.targets.threshold
    assert c > old.manifest.targets.threshold
    count = positions = 0
    before_C, after_C, variance_C = (np.zeros(300) for _ in range(3))
    for row in range(len(old)):
        for before, after in zip(entries_of(old, row), entries_of(new, row), strict=True):
            assert after.keys() <= before.keys()
            for i, p in before.items():
                before_C[i] += p
                if p >= c:
                    assert after[i] == pytest.approx(p, rel=0.1)
                variance_C[i] += p * max(0.0, c - p)
            for i, p in after.items():
                after_C[i] += p
            total = sum(before.values())
            assert abs(sum(after.values()) - total) <= c + 0.1
            count, positions = count + len(after), positions + 1
    assert count / positions == pytest.approx(4, rel=0.1)
    error_C = np.abs(after_C - before_C) / np.sqrt(variance_C + 1e-3 * positions)
    assert error_C.max() < 4.5  # of 300 classes


def test_fewer_bits_of_a_sample_leave_its_entries(kinds, capture, tmp_path):
    source = capture(targets="sample", mean_entries=10.0, limit_documents=60, value_bits=16)
    repack(RepackConfig(cache=source, out=tmp_path / "small", value_bits=7))
    old, new = open_cache(source), open_cache(tmp_path / "small")
    assert new.manifest.targets.threshold == old.manifest.targets.threshold
    for row in range(len(old)):
        assert torch.equal(new[row].targets.counts, old[row].targets.counts)
        for before, after in zip(entries_of(old, row), entries_of(new, row), strict=True):
            assert after == pytest.approx(before, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "option", "message"),
    [
        ("sample", {"top_k": 4}, "--top-k: .* holds sample targets"),
        ("padded", {"mean_entries": 4}, "--mean-entries: .* holds topk targets"),
        ("dense", {"value_bits": 7}, "--value-bits: .* holds dense targets"),
        ("sample", {"mean_entries": 11}, "--mean-entries 11 .* holds 10 entries"),
    ],
)
def test_what_a_kind_does_not_have_cannot_be_made_smaller(kinds, kind, option, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        repack(RepackConfig(cache=kinds[kind], out=tmp_path / "no", **option))
