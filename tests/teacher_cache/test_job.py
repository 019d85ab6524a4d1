"""A run end to end: what is in the cache against the live teacher in float64, and how runs end."""

import os
import re
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from shared import Cache, open_cache
from shared.errors import NonFiniteTargets, Refused, Stopped, TeacherCacheError
from shared.format import writer as shard_writer
from teacher_cache.config import VerifyConfig
from teacher_cache.engines.teacher import Teacher, TeacherOutput
from teacher_cache.tools.inspection import summary, verify
from teacher_cache.tools.report import inspect_text
from tests.conftest import Capture

SMALL = {"limit_documents": 60, "shard_tokens": 900, "forward_tokens": 256}


def content(folder: Path) -> dict[str, bytes]:
    """Every file but those of `runs/`, which are each process's own."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.parent.name != "runs"
    }


def live(teacher: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the next token after each token but the last, alone: [T - 1, V]."""
    with torch.no_grad():
        return teacher(ids[None]).logits[0, :-1].log_softmax(-1)


@pytest.fixture(scope="module")
def teacher64(teacher_dir: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(teacher_dir, dtype=torch.float64)


@pytest.fixture(scope="module")
def exact_dir(capture: Capture) -> Path:
    """Entries in fp16, a stored temperature, shards of a few batches each."""
    return capture(**SMALL, value_bits=16, temperature=(2.0, 0.7), top_k=12, hidden_layers=(-1,))


@pytest.fixture(scope="module")
def dense(exact_dir: Path, teacher64: LlamaForCausalLM) -> torch.Tensor:
    """The teacher's log-probabilities at every position of the cache, in its order: [P, V]."""
    return torch.cat([live(teacher64, row.input_ids) for row in open_cache(exact_dir)])


def stored(cache: Cache, name: str) -> torch.Tensor:
    """One attribute of every block, or of its targets, one after another."""
    blocks = [cache.read_block(number) for number in range(cache.num_blocks)]
    parts = [getattr(block if hasattr(block, name) else block.target, name) for block in blocks]
    return torch.from_numpy(np.concatenate(parts))


# The targets are the teacher's


def test_rows_are_the_documents(exact_dir, corpus_file, tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    documents: Counter[int] = Counter()
    pieces: dict[int, list[int]] = {}
    for row in open_cache(exact_dir):
        document = row.row_id >> 24
        assert row.row_id & 0xFFFFFF == documents[document]
        documents[document] += 1
        pieces.setdefault(document, []).extend(row.input_ids.tolist())
    for index, text in enumerate(corpus_file.read_text().splitlines()[:60]):
        ids = [*tokenizer(text)["input_ids"], 0] if text else []
        kept = pieces.get(index, [])
        assert kept == ids or (kept == ids[:-1] and len(ids) % 64 == 1)  # a lone last token


def test_positions_and_labels_are_every_token_but_the_last_and_its_successor(exact_dir):
    for row in open_cache(exact_dir):
        assert row.positions.tolist() == list(range(len(row.input_ids) - 1))
        assert row.labels.tolist() == row.input_ids[1:].tolist()


def test_entries_are_the_largest_classes_of_the_dense_teacher(exact_dir, dense):
    ids_PK = stored(open_cache(exact_dir), "ids").long()
    expected = dense.topk(12).indices.sort().values
    found = ids_PK.sort().values
    assert float((found == expected).all(1).double().mean()) > 0.999  # near-ties in float32
    least = dense.topk(12).values[:, -1:]
    assert bool((dense.gather(1, ids_PK) >= least - 1e-4).all())


@pytest.mark.parametrize("shift", [0, 1, -1])
def test_log_probabilities_are_those_of_this_position_and_of_no_neighbour(exact_dir, dense, shift):
    cache = open_cache(exact_dir)
    ids_PK, logprobs_PK = stored(cache, "ids").long(), stored(cache, "logprobs")
    error_PK = (dense.roll(shift, 0).gather(1, ids_PK) - logprobs_PK).abs()
    if shift == 0:
        # fp16 down to -16: half a step of 2^-7; float32 against float64 logits of size 10
        assert float(error_PK.max()) < 2**-7
    else:
        assert float(error_PK.mean()) > 1  # this teacher is far from flat


def test_the_tail_is_the_mass_of_all_other_classes(exact_dir, dense):
    cache = open_cache(exact_dir)
    kept_PK = dense.gather(1, stored(cache, "ids").long())
    tail_P = 1 - kept_PK.exp().sum(1)
    torch.testing.assert_close(
        stored(cache, "log_tail").double().exp(), tail_P, rtol=2e-3, atol=2e-3
    )  # entries are rounded to fp16 and the tail with them, so that all sums to 1


def test_label_logprob_and_entropy_are_over_all_classes(exact_dir, dense):
    cache = open_cache(exact_dir)
    labels_P = torch.cat([row.labels for row in cache])
    label_logprob = dense.gather(1, labels_P[:, None])[:, 0]
    torch.testing.assert_close(
        stored(cache, "label_logprob").double(), label_logprob, rtol=1e-3, atol=1e-4
    )  # fp16
    entropy = -(dense.exp() * dense).sum(1)
    step = np.log(300) / 255
    assert float((stored(cache, "entropy") - entropy).abs().max()) < 0.51 * step


@pytest.mark.parametrize("temperature", [2.0, 0.7])
def test_log_partition_ratio_is_that_of_the_dense_teacher(exact_dir, dense, temperature):
    cache = open_cache(exact_dir)
    blocks = [cache.read_block(number) for number in range(cache.num_blocks)]
    found = np.concatenate([block.log_partition_ratio[temperature] for block in blocks])
    expected = (dense / temperature).logsumexp(1)
    step = abs(1 - 1 / temperature) * np.log(300) / 65535
    np.testing.assert_allclose(found, expected, rtol=0, atol=step + 2e-5)  # float32 logits


def test_the_final_hidden_states_give_the_logits_back(exact_dir, dense, teacher64):
    states_PD = torch.cat([row.hidden[-1] for row in open_cache(exact_dir)]).double()
    logprobs_PV = teacher64.lm_head(states_PD).log_softmax(-1)
    error_P = (logprobs_PV.exp() - dense.exp()).abs().sum(1) / 2
    assert float(error_P.detach().mean()) < 0.02  # states are bfloat16: 3 digits of logits near 10


def test_statistics_of_commits_are_sums_over_the_dense_teacher(exact_dir, dense):
    cache = open_cache(exact_dir)
    total: Counter[str] = Counter()
    for commit in cache.commits:
        total.update(commit.statistics)
    entropy = -(dense.exp() * dense).sum()
    assert total["sum_entropy"] == pytest.approx(float(entropy), rel=1e-5)
    assert total["sum_kept_mass"] == pytest.approx(float(dense.topk(12)[0].exp().sum()), rel=1e-5)
    tempered = (dense / 2).softmax(1).topk(12)[0].sum()
    assert total["sum_kept_mass.2"] == pytest.approx(float(tempered), rel=1e-5)
    assert total["documents"] == 60
    assert total["empty_documents"] == 1
    assert total["nonfinite_rows"] == 0


@pytest.fixture(scope="module")
def live_states(exact_dir: Path, teacher_dir: Path) -> list[torch.Tensor]:
    """The final states of every row's positions, of the teacher alone in float32: [P, D] each."""
    teacher = LlamaForCausalLM.from_pretrained(teacher_dir)
    with torch.no_grad():
        return [
            teacher.model(row.input_ids[None]).last_hidden_state[0, row.positions]
            for row in open_cache(exact_dir)
        ]


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("codec", ["bf16", "fp8", "int8"])
def test_hidden_states_are_the_teachers_as_far_as_the_commits_say(
    codec, every, capture, live_states
):
    """Against the teacher in float32: bf16 is its rounding, the others are their codec's error."""
    options = {"hidden_layers": (-1,), "hidden_codec": codec, "hidden_every": every}
    cache = open_cache(capture(**SMALL, **options))
    expected = [states_PD[::every] for states_PD in live_states]
    for row, states_SD in zip(cache, expected, strict=True):
        assert row.hidden[-1].shape == states_SD.shape
        assert torch.equal(row.hidden_positions, row.positions[::every])
    found_SD = torch.cat([row.hidden[-1] for row in cache]).double()
    truth_SD = torch.cat(expected).double()
    error = float((found_SD - truth_SD).norm() / truth_SD.norm())
    worst = float(((found_SD - truth_SD).norm(dim=1) / truth_SD.norm(dim=1)).max())
    assert error <= {"bf16": 0.002, "fp8": 0.03, "int8": 0.012}[codec]
    reported = summary(cache)["hidden_error"]["-1"]
    assert reported["mean"] == pytest.approx(error, rel=0.02)
    # Of 32 channels, the two roundings of one position are not quite at right angles.
    assert reported["worst"] == pytest.approx(worst, rel=0.01 if codec == "bf16" else 0.15)
    told = f"hidden      layer -1: {codec}" + (" of every position in 5" if every > 1 else "")
    off = f"off by {reported['mean']:.2%} of its length, {reported['worst']:.2%} at worst"
    assert f"{told}; {off}" in inspect_text(summary(cache))


def test_a_teacher_in_bfloat16_loses_nothing(capture):
    cache = open_cache(capture(**SMALL, hidden_layers=(-1, 0), dtype="bfloat16"))
    exact = {"mean": 0.0, "worst": 0.0}
    assert summary(cache)["hidden_error"] == {"-1": exact, "0": exact}
    assert "layer -1: bf16; off by 0.00% of its length, 0.00% at worst" in inspect_text(
        summary(cache)
    )


def test_a_state_beyond_bfloat16_counts_as_infinite(capture, teacher_dir, tmp_path, tokenizer_dir):
    """3.4e38 is a float32, but the nearest bfloat16 is infinity."""
    folder = tmp_path / "teacher"
    shutil.copytree(teacher_dir, folder)
    teacher = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        teacher.lm_head.weight.zero_()
        teacher.model.norm.weight.fill_(3.4e38)
    teacher.save_pretrained(folder)
    with pytest.raises(NonFiniteTargets, match=r"document 0 .*, position 0"):
        capture(**SMALL, teacher=str(folder), hidden_layers=(-1,))


def by_chunk(cache: Cache) -> Iterator[tuple[tuple[int, ...], dict[str, torch.Tensor]]]:
    """Tokens of every chunk of a document, packed or not, and its targets."""
    for number in range(cache.num_blocks):
        block = cache.read_block(number)
        lengths = block.num_tokens if block.segments is None else block.segments
        ends, stops = np.cumsum(lengths), np.cumsum(lengths - 1)
        for length, end, stop in zip(lengths, ends, stops, strict=True):
            part = slice(stop - length + 1, stop)
            yield (
                tuple(block.input_ids[end - length : end].tolist()),
                {
                    "ids": torch.from_numpy(block.target.ids[part]),
                    "logprobs": torch.from_numpy(block.target.logprobs[part]),
                    "log_tail": torch.from_numpy(block.target.log_tail[part]),
                    "label_logprob": torch.from_numpy(block.label_logprob[part]),
                },
            )


def test_packed_rows_have_the_targets_of_unpacked_ones(exact_dir, capture):
    packed_cache = open_cache(capture(**SMALL, value_bits=16, top_k=12, pack=True))
    cache = open_cache(exact_dir)
    assert len(packed_cache) < 0.8 * len(cache)
    alone, packed = dict(by_chunk(cache)), dict(by_chunk(packed_cache))
    assert alone.keys() == packed.keys()
    for chunk, expected in alone.items():
        found = packed[chunk]
        same = (expected["ids"] == found["ids"]).all(1)  # in order of rank
        assert float(same.double().mean()) > 0.9  # near-ties
        for name in ("logprobs", "log_tail", "label_logprob"):
            # one step of fp16 at -16, where float32 rounds to its other side
            torch.testing.assert_close(found[name][same], expected[name][same], rtol=0, atol=2**-6)


def test_positions_of_packed_rows_leave_out_each_segments_last_token(capture):
    cache = open_cache(capture(**SMALL, pack=True))
    for number in range(cache.num_blocks):
        block = cache.read_block(number)
        segments, positions = iter(block.segments.tolist()), iter(block.positions.tolist())
        for count in block.num_segments.tolist():
            start = 0
            for size in [next(segments) for _ in range(count)]:
                assert [next(positions) for _ in range(size - 1)] == list(
                    range(start, start + size - 1)
                )
                start += size
        assert next(positions, None) is None


def test_a_label_only_cache_has_the_same_rows_and_no_targets(labels_dir, cache_dir):
    labels, cache = open_cache(labels_dir), open_cache(cache_dir)
    assert labels.manifest.rows_id == cache.manifest.rows_id
    assert not labels.has_targets
    found = [(row.row_id, row.input_ids.tolist(), row.labels.tolist()) for row in labels]
    assert found == [(row.row_id, row.input_ids.tolist(), row.labels.tolist()) for row in cache]
    assert labels[0].targets is None


def test_a_shard_of_empty_documents_is_an_empty_shard(capture, tmp_path):
    corpus = tmp_path / "c.txt"
    corpus.write_text("so it is\n" * 4 + "\n" * 4 + "so it was\n" * 4)
    cache = open_cache(capture(corpus=str(corpus), shard_tokens=1))
    assert cache.manifest.plan.num_shards >= 6
    assert [row.row_id >> 24 for row in cache] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert 0 in [commit.rows for commit in cache.commits]


# Any number of processes, the same bytes


@pytest.fixture(scope="module")
def one_process(capture: Capture) -> Path:
    return capture(**SMALL)


def test_three_processes_write_the_bytes_of_one(one_process, capture):
    """Processes of the command; many workers at once are in test_crash.py."""
    out = capture(**SMALL, processes=3)
    ran = sorted(path.stem for path in (out / "runs").glob("worker-*"))
    assert ran == ["worker-0-of-3", "worker-1-of-3", "worker-2-of-3"]
    assert content(out) == content(one_process)


def test_a_worker_that_is_alone_does_every_shard(one_process, capture):
    assert content(capture(**SMALL, worker="2/3")) == content(one_process)


def test_a_resolved_config_is_kept_beside_the_cache(one_process):
    text = (one_process / "runs" / "worker-0-of-1.yaml").read_text()
    assert "forward_tokens: 256" in text


# Signals


def signal_at(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, count: int) -> None:
    """This process gets the signal while it writes its `count`th shard."""
    seen = 0

    def crash_point(name: str) -> None:
        nonlocal seen
        seen += name == "after-temporary-write"
        if seen == count and name == "after-temporary-write":
            os.kill(os.getpid(), number)

    monkeypatch.setattr(shard_writer, "crash_point", crash_point)


@pytest.mark.parametrize("kind", ["targets", "labels"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_the_run_and_the_next_one_completes_it(
    number, kind, capture, tokenizer_dir, tmp_path, monkeypatch
):
    labels = {"teacher": None, "tokenizer": str(tokenizer_dir), "targets": "none"}
    options = SMALL | (labels if kind == "labels" else {})
    undisturbed = capture(**options)
    with monkeypatch.context() as patch:
        signal_at(patch, number, 2)
        with pytest.raises(Stopped) as caught:
            capture(**options, out=tmp_path / "cache")
    assert caught.value.exit_code == 75
    assert "run the same command again to go on" in str(caught.value)
    assert len(list((tmp_path / "cache" / "commits").iterdir())) == 2
    assert not list((tmp_path / "cache").rglob(".tmp.*"))
    capture(**options, out=tmp_path / "cache")
    assert content(tmp_path / "cache") == content(undisturbed)


def test_a_signal_between_two_forwards_drops_the_shard_in_work(capture, tmp_path, monkeypatch):
    forward, calls = Teacher.forward, 0

    def counted(self: Teacher, *args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += bool(more.get("chunk_positions"))  # only a capture names them
        if calls == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args, **more)

    monkeypatch.setattr(Teacher, "forward", counted)
    with pytest.raises(Stopped):
        capture(**SMALL, out=tmp_path / "cache")
    assert calls == 2
    assert list((tmp_path / "cache" / "shards").iterdir()) == []


# NaN in the teacher


SIGN = "§"  # its two bytes are tokens that no other document has


@pytest.fixture(scope="module")
def broken(
    teacher_dir: Path, tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """A teacher that gives NaN once it has read the sign, and a corpus with the sign twice."""
    folder = tmp_path_factory.mktemp("broken")
    teacher = Path(shutil.copytree(teacher_dir, folder / "teacher"))
    model = LlamaForCausalLM.from_pretrained(teacher)
    last = AutoTokenizer.from_pretrained(tokenizer_dir)(SIGN)["input_ids"][-1]
    with torch.no_grad():
        model.model.embed_tokens.weight[last, 3] = float("nan")
    model.save_pretrained(teacher)
    lines = [f"so it is {'the day ' * (i % 7)}" for i in range(40)]
    lines[23] = f"many words {SIGN} more"
    lines[31] = "the " * 30 + SIGN
    (folder / "corpus.txt").write_text("\n".join(lines) + "\n")
    return {"teacher": str(teacher), "corpus": str(folder / "corpus.txt")}


def test_nan_stops_the_run_with_document_and_position(broken, capture, tmp_path, tokenizer_dir):
    with pytest.raises(NonFiniteTargets) as caught:
        capture(**broken, out=tmp_path / "cache")
    message = str(caught.value)
    assert f"NaN or infinity in document 23 of {broken['corpus']}, chunk 0, position" in message
    assert "--nonfinite drop" in message
    place = int(re.search(r"position (\d+)", message)[1])
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    ids = torch.tensor(tokenizer(f"many words {SIGN} more")["input_ids"])
    model = LlamaForCausalLM.from_pretrained(broken["teacher"])
    with torch.no_grad():
        logits_TV = model(ids[None]).logits[0]
    assert place == int((~logits_TV.isfinite().all(1)).nonzero()[0, 0])


def test_nan_publishes_nothing_of_its_shard(broken, capture, tmp_path):
    with pytest.raises(NonFiniteTargets):
        capture(**broken, out=tmp_path / "cache", shard_tokens=300)
    cache = open_cache(tmp_path / "cache", allow_partial=True)
    per_shard = cache.manifest.plan.documents_per_shard
    assert [commit.shard for commit in cache.commits] == list(range(23 // per_shard))
    assert len(list((tmp_path / "cache" / "shards").iterdir())) == len(cache.commits) > 0


def test_nonfinite_drop_leaves_out_and_counts_exactly_the_bad_rows(broken, capture, caplog):
    cache = open_cache(capture(**broken, nonfinite="drop"))
    documents = [row.row_id >> 24 for row in cache]
    assert documents == [i for i in range(40) if i not in (23, 31)]
    assert sum(commit.statistics["nonfinite_rows"] for commit in cache.commits) == 2
    assert [f"document {i} of" in caplog.text for i in (22, 23, 31)] == [False, True, True]


def test_nonfinite_drop_lets_no_nan_into_any_number(broken, capture):
    out = capture(**broken, nonfinite="drop", hidden_layers=(-1,), temperature=(2.0,))
    cache = open_cache(out)
    for number in range(cache.num_blocks):
        block = cache.read_block(number, hidden_layers=(-1,))
        states = torch.from_numpy(block.hidden[-1]).view(torch.bfloat16)
        assert states.isfinite().all()
        assert np.isfinite(block.target.logprobs).all()
        assert np.isfinite(block.entropy).all()
    assert all(np.isfinite(list(commit.statistics.values())).all() for commit in cache.commits)
    assert cache.channel_deviation(-1).isfinite().all()


def test_neighbours_of_a_dropped_row_keep_their_targets(broken, capture, teacher64):
    cache = open_cache(capture(**broken, nonfinite="drop", value_bits=16))
    for row in cache:
        dense_PV = live(teacher64, row.input_ids)
        error = dense_PV.gather(1, row.targets.ids) - row.targets.logprobs
        assert float(error.abs().max()) < 2**-7


def test_a_masked_class_is_no_nan(capture):
    """Minus infinity is a legal logit: a class that the teacher never predicts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Teacher, "forward", masking(Teacher.forward, 5))
        cache = open_cache(capture(**SMALL, value_bits=16))
    assert len(cache) > 60
    for row in cache:
        assert 5 not in row.targets.ids
        assert row.targets.logprobs.isfinite().all()
    assert all(commit.statistics["nonfinite_rows"] == 0 for commit in cache.commits)


def masking(forward: Callable[..., TeacherOutput], masked: int) -> Callable[..., TeacherOutput]:
    """Teacher.forward with one class at minus infinity, as a model's own mask would set it."""

    def masked_forward(*args: Any, **more: Any) -> TeacherOutput:
        output = forward(*args, **more)

        def chunks() -> Iterator[tuple[slice, torch.Tensor]]:
            for part, logits_nV in output.chunks:
                logits_nV[:, masked] = -torch.inf
                yield part, logits_nV

        return TeacherOutput(output.hidden, chunks())

    return masked_forward


# Places


def test_paths_with_spaces_and_letters_of_any_alphabet_and_links(
    one_process, capture, corpus_file, teacher_dir, tmp_path
):
    """Captured there through a link, resumed through the folder itself, and moved afterwards."""
    real = tmp_path / "Größe und 試験 🎓"
    (tmp_path / "link").symlink_to(real)
    real.mkdir()
    corpus = Path(shutil.copy(corpus_file, real / "mein Körper.txt"))
    teacher = Path(shutil.copytree(teacher_dir, real / teacher_dir.name))
    options = SMALL | {"corpus": str(corpus), "teacher": str(teacher)}
    capture(**options, out=tmp_path / "link" / "der Cache")
    (real / "der Cache" / "commits" / "00001.json").unlink()
    capture(**options, out=real / "der Cache")
    moved = (real / "der Cache").rename(tmp_path / "elsewhere")
    (tmp_path / "second link").symlink_to(moved)
    expected = [row.input_ids.tolist() for row in open_cache(one_process)]
    for path in (moved, tmp_path / "second link"):
        assert [row.input_ids.tolist() for row in open_cache(path)] == expected
    assert verify(VerifyConfig(cache=tmp_path / "second link")).sound
    names = [name.casefold() for name in content(moved)]
    assert len(set(names)) == len(names)  # a file system may not tell A from a


@pytest.mark.parametrize("where", ["a file", "below a file", "no place to write"])
def test_an_out_that_cannot_be_written_is_refused_by_name(where, capture, tmp_path):
    (tmp_path / "file").write_text("mine")
    out = {
        "a file": tmp_path / "file",
        "below a file": tmp_path / "file" / "cache",
        "no place to write": Path("/proc/cache"),  # for root, too
    }[where]
    with pytest.raises(TeacherCacheError) as caught:
        capture(**SMALL, out=out)
    assert str(caught.value).startswith(f"{out}: ")
    assert "--out" in str(caught.value)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused_by_name(capture, tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(Refused, match=r"cannot be written .*Choose another --out"):
            capture(**SMALL, out=tmp_path / "cache")
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("where", ["encode_and_measure", "ShardWriter.write"])
def test_a_fault_while_encoding_or_writing_ends_the_run_with_that_error(
    where, capture, tmp_path, monkeypatch
):
    """In a thread of its own, or in the writer: no wait for ever, nothing half published."""
    import teacher_cache.job.run as job

    owner, _, name = where.rpartition(".")
    target = job.ShardWriter if owner else job
    calls, right = [], vars(target)[name]

    def faulty(*args, **kwargs):
        calls.append(name)
        if len(calls) == 2:
            raise OSError("the fault of this test")
        return right(*args, **kwargs)

    monkeypatch.setattr("teacher_cache.job.run.MIN_BLOCK_POSITIONS", 500)
    options = {"limit_documents": 120, "out": tmp_path / "cache"}
    with monkeypatch.context() as patch:
        patch.setattr(target, name, faulty)
        with pytest.raises(OSError, match="the fault of this test"):
            capture(**options)
    assert list((tmp_path / "cache" / "commits").glob("*")) == []
    assert list((tmp_path / "cache" / "shards").iterdir()) == []
    assert not open_cache(capture(**options)).missing_shards
