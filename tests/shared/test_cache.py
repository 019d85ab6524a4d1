"""Reading a cache: what opens, what a row is against the live teacher, and many threads at once.

P positions of a row, C classes, K entries, D channels.
"""

import json
import os
import random
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.numpy import save as save_safetensors
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared import cache as cache_module
from shared import open_cache
from shared.cache import class_ranks, committed_shards
from shared.errors import CacheMismatch, CorruptCache, IncompleteCache
from shared.format import manifest_file
from shared.format.commits import commit_name, file_hash, parse_commit
from shared.models.tokenizer import load_cached_tokenizer
from shared.storage.local import LocalStorage
from teacher_cache.config import VerifyConfig
from teacher_cache.engines.batches import forward_batches
from teacher_cache.engines.teacher import Teacher
from teacher_cache.tasks.rows import TrainingRow
from teacher_cache.tools.verify import verify
from tests.shared.format.test_shards import assert_same
from tests.shared.storage.test_local import tree

MAX_LENGTH = 64
EOS = 0
FLOAT32 = 2e-5  # the same logits from another batch, after a softmax


@pytest.fixture(scope="module")
def cache(cache_dir):
    return open_cache(cache_dir)


@pytest.fixture(scope="module")
def model(teacher_dir):
    return AutoModelForCausalLM.from_pretrained(teacher_dir, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def expected_rows(corpus_file, tokenizer_dir):
    """Row id and tokens of every row of the corpus, built with no code of ours."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    rows = []
    for document, text in enumerate(corpus_file.read_text().splitlines()):
        if not text:
            continue
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], EOS]
        for chunk in range(0, len(ids), MAX_LENGTH):
            part = ids[chunk : chunk + MAX_LENGTH]
            if len(part) > 1:
                rows.append((document << 24 | chunk // MAX_LENGTH, part))
    return rows


def logits_of(model, ids):
    """[P, C] of one segment alone: no batch, no padding, every token but the last."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0, :-1]


def best_first(logits_PC):
    """All classes of each position by (larger logit, smaller id), by a stable sort."""
    return logits_PC.sort(dim=1, descending=True, stable=True)


def check_targets(ids_PK, logprobs_PK, tail_mass_P, logits_PC):
    """Cached targets against live logits that are equal but for float32 rounding."""
    K = ids_PK.shape[1]
    live_PC = logits_PC.double().log_softmax(dim=1)
    values_PC, classes_PC = best_first(live_PC)
    clear_P = values_PC[:, K - 1] - values_PC[:, K] > FLOAT32  # no near tie at the edge
    assert torch.equal(
        ids_PK[clear_P].sort(dim=1).values, classes_PC[clear_P, :K].sort(dim=1).values
    )
    live_PK = live_PC.gather(1, ids_PK)
    kept_P, found_kept_P = live_PK.exp().sum(dim=1), logprobs_PK.double().exp().sum(dim=1)
    torch.testing.assert_close(found_kept_P + tail_mass_P, torch.ones(len(ids_PK)).double())
    # The bounds that codec.encode states: of each drop below the likeliest entry at M = 127, with a
    # coded range at most 2**(1/16) above the largest drop, and of ln(tail / kept).
    drop_PK = live_PK.max(dim=1, keepdim=True).values - live_PK
    found_drop_PK = (logprobs_PK.max(dim=1, keepdim=True).values - logprobs_PK).double()
    range_P1 = drop_PK.max(dim=1, keepdim=True).values.clamp(min=1 / 16) * 2 ** (1 / 16)
    bound_PK = range_P1 * ((drop_PK / range_P1).sqrt() / 127 + 1 / (4 * 127**2))
    assert ((found_drop_PK - drop_PK).abs() <= bound_PK + 2 * FLOAT32).all()
    ratio_P = ((1 - kept_P) / kept_P).log().clamp(-14, 17)
    found_P = (tail_mass_P.double() / found_kept_P).log()
    assert ((ratio_P - found_P).abs() <= 2.4e-4 + FLOAT32 / (1 - kept_P).clamp(min=1e-6)).all()


def test_every_row_of_the_corpus_is_there_in_order_with_its_tokens_and_places(cache, expected_rows):
    assert len(cache) == cache.num_rows == len(expected_rows)
    assert cache.num_blocks > len(cache.commits) > 3  # several blocks to a shard, several shards
    found = [cache.read_block(block, targets=False) for block in range(cache.num_blocks)]
    ids = np.concatenate([block.row_ids for block in found])
    assert ids.tolist() == [row_id for row_id, _ in expected_rows]
    assert cache.row_tokens.tolist() == [len(tokens) for _, tokens in expected_rows]
    assert cache.row_positions.tolist() == [len(tokens) - 1 for _, tokens in expected_rows]
    assert cache.block_rows.tolist() == [len(block.row_ids) for block in found]
    tokens = np.concatenate([block.input_ids for block in found])
    assert tokens.tolist() == [token for _, tokens in expected_rows for token in tokens]


def test_a_row_says_what_the_live_teacher_says(cache, expected_rows, model):
    for index in [*range(0, len(cache), 40), len(cache) - 1]:
        row_id, tokens = expected_rows[index]
        row = cache[index]
        assert (row.row_id, row.input_ids.tolist()) == (row_id, tokens)
        assert row.positions.tolist() == list(range(len(tokens) - 1))
        assert row.segments == (len(tokens),)
        assert row.labels.tolist() == tokens[1:]
        assert row.targets.ids.dtype == row.labels.dtype == torch.int64
        assert row.targets.logprobs.dtype == row.targets.tail_mass.dtype == torch.float32
        assert row.targets.counts is None
        targets = row.targets
        check_targets(targets.ids, targets.logprobs, targets.tail_mass, logits_of(model, tokens))


def test_the_light_columns_say_what_the_live_teacher_says(cache, expected_rows, model):
    block = cache.read_block(0)
    live = torch.cat(
        [logits_of(model, tokens) for _, tokens in expected_rows[: len(block.row_ids)]]
    )
    live_PC = live.double().log_softmax(dim=1)
    labels = [token for _, tokens in expected_rows[: len(block.row_ids)] for token in tokens[1:]]
    label_logprob = live_PC.gather(1, torch.tensor(labels)[:, None])[:, 0].numpy()
    np.testing.assert_allclose(block.label_logprob, label_logprob, rtol=2**-11, atol=FLOAT32)
    log_classes = np.log(cache.manifest.targets.num_classes)
    entropy = -(live_PC.exp() * live_PC).sum(dim=1).numpy()
    np.testing.assert_allclose(block.entropy, entropy, atol=log_classes / 510 + FLOAT32)
    ratio = (live_PC / 2).logsumexp(dim=1).numpy()
    found = block.log_partition_ratio[2.0]
    np.testing.assert_allclose(found, ratio, atol=0.5 * log_classes / 65_535 + FLOAT32)


@pytest.mark.parametrize("which", [0, -1])
def test_in_the_same_batches_ids_and_hidden_states_are_exactly_the_live_ones(
    cache, expected_rows, teacher_dir, which
):
    """bfloat16 hidden states are lossless only in their own rounding; the batch decides the rest.

    The batches are those of the shard's rows; logits and states then are the same bits.
    """
    plan, commit = cache.manifest.plan, cache.commits[which]
    documents = range(
        commit.shard * plan.documents_per_shard, (commit.shard + 1) * plan.documents_per_shard
    )
    first = next(i for i, (row_id, _) in enumerate(expected_rows) if row_id >> 24 in documents)
    rows = [
        TrainingRow(row_id, np.array(tokens, np.int32), (len(tokens),))
        for row_id, tokens in expected_rows[first : first + commit.rows]
    ]
    starts = np.cumsum([0, *(row.num_positions for row in rows)])
    cached = [cache[first + place] for place in range(commit.rows)]
    ids = torch.cat([row.targets.ids for row in cached])
    hidden = {layer: torch.cat([row.hidden[layer] for row in cached]) for layer in (-1, 0)}

    teacher = Teacher.load(str(teacher_dir), device="cpu")
    checked = 0
    for batch in forward_batches(rows, plan.forward_tokens, packed=False):
        output = teacher.forward(batch.inputs, chunk_positions=plan.chunk_positions)
        logits_NC = torch.cat([logits for _, logits in output.chunks])
        best_NK = best_first(logits_NC).indices[:, : ids.shape[1]]
        found_NK = ids[batch.window_index]
        assert torch.equal(found_NK.sort(dim=1).values, best_NK.sort(dim=1).values)
        with torch.no_grad():
            reported = teacher.model(
                batch.inputs.input_ids,
                attention_mask=batch.inputs.attention_mask,
                output_hidden_states=True,
            ).hidden_states  # the embedding, then what each block hands on, the last after the norm
        for layer, states_BTD in ((0, reported[1]), (-1, reported[-1])):
            live_ND = states_BTD.flatten(0, 1)[batch.inputs.position_index].bfloat16()
            assert torch.equal(hidden[layer][batch.window_index], live_ND)
        checked += len(found_NK)
    assert checked == commit.positions == starts[-1]


def test_hidden_states_and_targets_are_read_only_when_asked_for(cache):
    assert cache.read_block(1).hidden == {}
    assert cache.read_block(1, hidden_layers=(0,)).hidden.keys() == {0}
    bare = cache.read_block(1, targets=False)
    assert bare.target is bare.entropy is bare.label_logprob is None
    assert bare.log_partition_ratio == {}
    skipped = cache.read_block(1, skip=("label_logprob",))
    assert skipped.label_logprob is None
    np.testing.assert_array_equal(skipped.entropy, cache.read_block(1).entropy)


def test_an_empty_block_has_the_columns_of_any_other(cache):
    empty, block = cache.empty_block(hidden_layers=(0,)), cache.read_block(1, hidden_layers=(0,))
    for found, expected in (
        (empty.row_ids, block.row_ids),
        (empty.input_ids, block.input_ids),
        (empty.positions, block.positions),
        (empty.entropy, block.entropy),
        (empty.target.ids, block.target.ids),
        (empty.target.logprobs, block.target.logprobs),
        (empty.target.log_tail, block.target.log_tail),
        (empty.hidden[0], block.hidden[0]),
    ):
        assert found.dtype == expected.dtype
        assert found.shape == (0, *expected.shape[1:])
    assert empty.log_partition_ratio.keys() == block.log_partition_ratio.keys()


def test_packed_rows_predict_inside_each_document_only(capture, model, expected_rows):
    cache = open_cache(capture(pack=True, limit_documents=40))
    assert len(cache) < sum(row_id >> 24 < 40 for row_id, _ in expected_rows)
    number = 0
    for index in range(cache.num_blocks):
        block = cache.read_block(index)
        assert block.num_segments.max() > 1
        segments = block.segments.tolist()
        for count in block.num_segments.tolist():
            row, start, places = cache[number], 0, []
            assert row.segments == tuple(segments[:count])
            for length in segments[:count]:
                inside = range(start, start + length - 1)
                own = slice(len(places), len(places) + length - 1)
                places += inside
                tokens = row.input_ids[start : start + length].tolist()
                assert row.labels[own].tolist() == tokens[1:]
                if number % 7 == 0:
                    t = row.targets
                    live = logits_of(model, tokens)
                    check_targets(t.ids[own], t.logprobs[own], t.tail_mass[own], live)
                start += length
            assert row.positions.tolist() == places
            assert start == len(row.input_ids)
            segments = segments[count:]
            number += 1
    assert number == len(cache)


def test_a_cache_of_hard_labels_only(labels_dir, expected_rows):
    cache = open_cache(labels_dir)
    assert not cache.has_targets
    assert len(cache) == len(expected_rows)
    for index in (0, 100, -1):
        row, tokens = cache[index], expected_rows[index][1]
        assert row.targets is None
        assert row.hidden == {}
        assert row.input_ids.tolist() == tokens
        assert row.labels.tolist() == tokens[1:]


def test_rows_are_a_sequence(cache):
    rows = len(cache)
    assert cache[-1].row_id == cache[rows - 1].row_id
    assert cache[-rows].row_id == cache[0].row_id
    assert cache[np.int64(3)].row_id == cache[3].row_id
    for index in (rows, rows + 10, -rows - 1):
        with pytest.raises(IndexError, match=f"row {index} of a cache with {rows} rows"):
            cache[index]
    for block in (cache.num_blocks, -1):
        with pytest.raises(IndexError):
            cache.read_block(block)
    few = cache.restrict({"12": cache.snapshot()["12"]})
    assert [row.row_id for row in few] == [few[i].row_id for i in range(len(few))]
    assert len(few) == cache.commits[12].rows


def test_channel_deviations_are_those_of_the_stored_states(cache):
    """Learnt on a sample, so only about those of the whole cache."""
    blocks = [cache.read_block(b, hidden_layers=(0,)) for b in range(cache.num_blocks)]
    bits = torch.from_numpy(np.concatenate([block.hidden[0] for block in blocks]))
    deviation = bits.view(torch.bfloat16).float().std(dim=0)
    found = cache.channel_deviation(0)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, deviation, rtol=0.05, atol=0)


def without(path, shard):
    (path / commit_name(shard)).unlink()


def test_a_missing_shard_is_refused_unless_allowed(cache, cache_copy):
    without(cache_copy, 3)
    without(cache_copy, 5)
    with pytest.raises(
        IncompleteCache,
        match=r"11 of 13 shards are done \(shard 3 is the first missing one\).*cache-teacher run "
        r"command again.*--allow-partial",
    ):
        open_cache(cache_copy)
    partial = open_cache(cache_copy, allow_partial=True)
    assert partial.missing_shards == [3, 5]
    assert cache.missing_shards == []
    there = [commit for commit in cache.commits if commit.shard not in (3, 5)]
    assert partial.commits == there
    assert len(partial) == sum(commit.rows for commit in there)
    before = sum(commit.rows for commit in cache.commits[:6])
    first = sum(commit.rows for commit in there if commit.shard < 6)
    assert partial[first].row_id == cache[before].row_id


def test_a_cache_without_any_shard_is_refused_even_then(cache_copy):
    shutil.rmtree(cache_copy / "commits")
    with pytest.raises(IncompleteCache, match=r"none of 13 shards is done.*cache-teacher run"):
        open_cache(cache_copy, allow_partial=True)


def test_a_folder_that_is_no_cache_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "nothing", str(tmp_path)):
        with pytest.raises(IncompleteCache, match=r"no cache here"):
            open_cache(path)


def test_a_newer_format_is_refused(cache_copy):
    raw = json.loads((cache_copy / "manifest.json").read_text())
    storage = LocalStorage(cache_copy)
    storage.put(manifest_file.MANIFEST, json.dumps(raw | {"format_version": 2}).encode())
    storage.delete(manifest_file.MANIFEST_HASH)
    manifest_file.write_hash(storage)
    with pytest.raises(CacheMismatch, match="format 2 needs a newer teacher-cache"):
        open_cache(cache_copy)


def test_a_run_reads_the_shards_it_was_started_on_and_no_other(cache, cache_copy):
    without(cache_copy, 3)
    early = open_cache(cache_copy, allow_partial=True)
    snapshot = json.loads(json.dumps(early.snapshot()))  # as a run folder keeps it
    shutil.copy(cache.path / commit_name(3), cache_copy / commit_name(3))
    later = open_cache(cache_copy)
    assert len(later) > len(early)
    again = later.restrict(snapshot)
    assert again.commits == early.commits
    assert again.row_tokens.tolist() == early.row_tokens.tolist()
    assert again.block_rows.tolist() == early.block_rows.tolist()
    for index in (0, len(again) // 2, len(again) - 1):
        assert again[index].row_id == early[index].row_id


def test_a_run_whose_shards_are_gone_or_changed_is_refused(cache):
    snapshot = cache.snapshot()
    assert cache.restrict(snapshot).commits == cache.commits
    with pytest.raises(CorruptCache, match=r"shard 99 with hash ab, but now there is no commit"):
        cache.restrict(snapshot | {"99": "ab"})
    with pytest.raises(
        CorruptCache,
        match=rf"shard 4 with hash ab, but now there is {snapshot['4']}. Restore the shard, or "
        r"start a new run with another --out",
    ):
        cache.restrict(snapshot | {"4": "ab"})


def test_a_cache_can_be_moved_and_is_never_written_to(cache, cache_copy, tmp_path):
    moved = tmp_path / "a folder" / "Größe 試験"
    moved.parent.mkdir()
    cache_copy.rename(moved)
    before = {name: (moved / name).stat().st_mtime_ns for name in tree(moved)}
    assert open_cache(str(moved))[7].row_id == cache[7].row_id
    assert {name: (moved / name).stat().st_mtime_ns for name in tree(moved)} == before


def test_a_cache_in_a_snapshot_of_the_hub_opens(cache, cache_copy, tmp_path):
    """Every file is a link to a blob, named by its hash, of the same repository."""
    store = tmp_path / "datasets--owner--name"
    (store / "blobs").mkdir(parents=True)
    snapshot = store / "snapshots" / "0123abcd"
    for name in tree(cache_copy):
        blob = store / "blobs" / file_hash(cache_copy / name)
        shutil.copy(cache_copy / name, blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    found = open_cache(snapshot)
    assert [row.row_id for row in found] == [row.row_id for row in cache]
    assert len(load_cached_tokenizer(found.storage)) == 300
    assert verify(VerifyConfig(cache=snapshot)).sound


@pytest.mark.parametrize(
    "name", ["0.json", "00000.json.bak", "00000 (1).json", "notes.txt", ".tmp.x.1.ab", "²²²²².json"]
)
def test_files_that_are_no_commits_are_not_counted(cache, cache_copy, name):
    shutil.copy(cache_copy / commit_name(0), cache_copy / "commits" / name)
    assert committed_shards(LocalStorage(cache_copy)) == list(range(13))
    assert len(open_cache(cache_copy)) == len(cache)


def test_no_commit_is_looked_for_in_a_list_of_all_commits(cache_copy, monkeypatch):
    class Names(list):
        def __contains__(self, name):
            raise AssertionError(f"{name} is compared with up to {len(self)} names")

    storage = LocalStorage(cache_copy)
    names = Names(storage.list("commits"))
    monkeypatch.setattr(storage, "list", lambda prefix: names)
    assert committed_shards(storage) == list(range(13))


def test_commits_in_the_wrong_place_are_refused(cache, cache_copy, labels_dir):
    there = cache_copy / commit_name(2)
    shutil.copy(cache_copy / commit_name(1), there)
    with pytest.raises(CorruptCache, match=f"{there}: belongs to shard 1 of cache .*expected"):
        open_cache(cache_copy)
    shutil.copy(labels_dir / commit_name(2), there)
    with pytest.raises(CorruptCache, match=f"{there}: belongs to shard 2 of cache .*Delete it and"):
        open_cache(cache_copy)
    shutil.copy(cache.path / commit_name(2), there)
    shutil.copy(there, cache_copy / commit_name(13))
    with pytest.raises(CorruptCache, match="a commit of shard 13, but there are 13"):
        open_cache(cache_copy)


@pytest.mark.parametrize(
    "file",
    [
        "shards/00001-ab.arrow",
        "tokenizer/tokenizer.json",
        "/etc/passwd",
        "shards/00000-/../../../../etc/passwd",
        "shards/00000-\0",
        "",
    ],
)
def test_a_commit_cannot_name_a_file_that_is_not_its_own(cache, cache_copy, file):
    """Forged with a right checksum."""
    commit = replace(cache.commits[0], file=file)
    LocalStorage(cache_copy).put(commit_name(0), commit.to_json())
    with pytest.raises(CorruptCache):
        open_cache(cache_copy)[0]


def test_the_side_files_are_checked_and_named(cache, cache_copy):
    assert {name.partition("/")[0] for name in cache.manifest.side_files} > {"tokenizer"}
    for name in cache.manifest.side_files:
        path = cache_copy / name
        data = path.read_bytes()
        path.write_bytes(data + b" ")
        with pytest.raises(CorruptCache, match=f"{path}: its hash .*restore it from a copy"):
            open_cache(cache_copy)
        path.unlink()
        with pytest.raises(CorruptCache, match=f"{path}: this file is missing; restore it"):
            open_cache(cache_copy)
        path.write_bytes(data)
    assert len(open_cache(cache_copy)) == len(cache)


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04\x95pickle",
        b"",
        save_safetensors({"other": np.arange(300, dtype=np.uint32)}),
        save_safetensors({"class_by_rank": np.zeros(300, np.uint32)}),
        save_safetensors({"class_by_rank": np.arange(10, dtype=np.uint32)}),
    ],
    ids=["pickle", "empty", "other name", "no permutation", "too few"],
)
def test_a_learnt_file_that_is_none_is_refused_by_name(cache, tmp_path, data):
    """Even where a forged manifest has its hash."""
    storage = LocalStorage(tmp_path)
    name = next(name for name in cache.manifest.side_files if name.startswith("learnt-"))
    storage.put(name, data)
    forged = replace(cache.manifest, side_files={name: file_hash(storage.local(name))})
    with pytest.raises(CorruptCache, match=name):
        class_ranks(storage, forged)


def test_many_threads_read_what_one_reads(cache_dir, monkeypatch):
    monkeypatch.setattr(cache_module, "_OPEN_SHARDS", 2)  # so that readers come and go meanwhile
    cache = open_cache(cache_dir)
    expected = [cache.read_block(block, hidden_layers=(-1,)) for block in range(cache.num_blocks)]
    barrier, read = threading.Barrier(4), {}

    def work(seed):
        blocks = [*range(cache.num_blocks)] * 2
        random.Random(seed).shuffle(blocks)
        barrier.wait()
        found = [(block, cache.read_block(block, hidden_layers=(-1,))) for block in blocks]
        read[seed] = found

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read.keys() == {0, 1, 2, 3}  # a thread that failed is not there
    for found in read.values():
        for block, values in found:
            assert_same(values, expected[block])


def test_the_shard_used_longest_ago_is_closed_first(cache_dir, monkeypatch):
    monkeypatch.setattr(cache_module, "_OPEN_SHARDS", 2)
    cache, opened = open_cache(cache_dir), []
    original = cache_module.ShardReader

    def spy(path, manifest, commit, where):
        opened.append(commit.shard)
        return original(path, manifest, commit, where)

    monkeypatch.setattr(cache_module, "ShardReader", spy)
    first_block = np.cumsum([0, *(len(commit.block_rows) for commit in cache.commits)])
    for shard in (0, 1, 0, 2, 0, 1, 2):
        cache.read_block(int(first_block[shard]), targets=False)
    assert opened == [0, 1, 2, 1, 2]


def test_commits_are_json_anyone_can_read(cache):
    raw = json.loads((cache.path / commit_name(0)).read_text())
    commit = parse_commit((cache.path / commit_name(0)).read_bytes(), "here")
    assert (raw["file"], raw["rows"]) == (commit.file, commit.rows)
    assert (cache.path / raw["file"]).stat().st_size == raw["num_bytes"]
