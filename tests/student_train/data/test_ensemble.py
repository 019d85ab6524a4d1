"""Students of several teachers, and of several caches by weight, on real caches."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from shared.cache import Cache, open_cache
from shared.errors import CacheMismatch, ConfigError, Stopped
from student_train.config import TrainConfig
from student_train.data.ensemble import Ensemble
from student_train.student.needs import warn_of_same_rows
from teacher_cache.config import RepackConfig
from teacher_cache.tools.repack import repack
from tests.conftest import Capture, llama_config
from tests.student_train.run.test_trainer import SignalAt, losses

FEW = {"limit_documents": 60, "shard_tokens": 600}


@pytest.fixture(scope="module")
def other_teacher_dir(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher with other weights and the same tokenizer."""
    folder = tmp_path_factory.mktemp("other-teacher")
    torch.manual_seed(7)
    teacher = LlamaForCausalLM(llama_config())
    with torch.no_grad():
        teacher.lm_head.weight.mul_(12)
    teacher.save_pretrained(folder)
    for path in tokenizer_dir.iterdir():
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def dense(capture: Capture, other_teacher_dir: Path) -> tuple[Path, Path]:
    """Two teachers on the same rows; the second cache is cut into other blocks and shards."""
    first = capture(targets="dense", hidden_layers=(-1,), **FEW)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("teacher_cache.job.assemble.MIN_BLOCK_POSITIONS", 150)
        options = FEW | {"shard_tokens": 900, "teacher": str(other_teacher_dir)}
        return first, capture(targets="dense", hidden_layers=(-1,), **options)


@pytest.fixture(scope="module")
def some_states(capture: Capture, other_teacher_dir: Path) -> tuple[Path, Path]:
    """As `dense`, with the states of every third position of a row."""
    asked = {"targets": "dense", "hidden_layers": (-1,), "hidden_every": 3, **FEW}
    first = capture(**asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("teacher_cache.job.run.MIN_BLOCK_POSITIONS", 150)
        return first, capture(**asked | {"shard_tokens": 900, "teacher": str(other_teacher_dir)})


@pytest.fixture(scope="module")
def topk(capture: Capture, other_teacher_dir: Path) -> tuple[Path, Path]:
    asked = {"top_k": 12, "temperature": (2.0,), **FEW}
    return capture(**asked), capture(teacher=str(other_teacher_dir), **asked)


def rows_of(cache: Cache) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Row id -> log-probabilities [P, C] and hidden states [P, D] of a dense cache."""
    return {
        row.row_id: (row.targets.logprobs.numpy(), row.hidden[-1].float().numpy())
        for row in cache
        if row.targets is not None
    }


@pytest.mark.parametrize("weights", [(), (3.0, 1.0)])
def test_dense_teachers_are_mixed_row_by_row(dense, weights):
    one, two = (open_cache(path) for path in dense)
    assert not np.array_equal(one.block_rows, two.block_rows)
    share = 0.75 if weights else 0.5
    ensemble = Ensemble([one, two], weights, hidden_layers=(-1,))
    first, second = rows_of(one), rows_of(two)
    for number in range(one.num_blocks):
        block = ensemble.read_block(number, hidden_layers=(-1,))
        ids = block.row_ids.tolist()
        p, q = (
            np.exp(np.concatenate([rows[i][0] for i in ids]).astype(float))
            for rows in (first, second)
        )
        mixed = share * p + (1 - share) * q
        assert block.target is not None
        # float32 log-probabilities: relative errors of 1e-7 times their size, up to 40 nats
        np.testing.assert_allclose(np.exp(block.target.logprobs), mixed, rtol=8e-6, atol=1e-12)
        entropy = -(mixed * np.log(mixed)).sum(1)
        np.testing.assert_allclose(block.entropy, entropy, rtol=2e-5, atol=1e-6)
        x, y = (np.concatenate([rows[i][1] for i in ids]) for rows in (first, second))
        states = torch.from_numpy(block.hidden[-1]).view(torch.bfloat16).float().numpy()
        np.testing.assert_allclose(states, share * x + (1 - share) * y, rtol=2**-8, atol=1e-6)


def test_states_of_some_positions_are_mixed_row_by_row(some_states):
    """The second cache's blocks end elsewhere, so its states are picked row by row."""
    one, two = (open_cache(path) for path in some_states)
    assert not np.array_equal(one.block_rows, two.block_rows)
    ensemble, first, second = Ensemble([one, two], hidden_layers=(-1,)), rows_of(one), rows_of(two)
    for number in range(one.num_blocks):
        block = ensemble.read_block(number, hidden_layers=(-1,))
        ids = block.row_ids.tolist()
        x, y = (np.concatenate([rows[i][1] for i in ids]) for rows in (first, second))
        states = torch.from_numpy(block.hidden[-1]).view(torch.bfloat16).float().numpy()
        np.testing.assert_allclose(states, (x + y) / 2, rtol=2**-8, atol=1e-6)


def test_the_deviation_of_mean_states_lies_between_those_of_the_teachers(dense):
    one, two = (open_cache(path) for path in dense)
    found = Ensemble([one, two], (3.0, 1.0)).channel_deviation(-1)
    expected = 0.75 * one.channel_deviation(-1) + 0.25 * two.channel_deviation(-1)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("kind", "temperature"), [("dense", 2.0), ("topk", 1.0), ("topk", 2.0), ("adaptive", 1.0)]
)
def test_a_cache_with_itself_trains_as_it_does_alone(
    kind, temperature, capture, dense, topk, train, tmp_path
):
    """Losses equal within 1e-6: the entries stand in another order, and float32 sums round."""
    made = {"dense": dense[0], "topk": topk[0]}
    cache = made.get(kind) or capture(targets=kind, mean_entries=9.0, **FEW)
    options = {"temperature": temperature, "max_steps": 2}
    train(cache=(cache,), out=tmp_path / "alone", **options)
    train(cache=(cache, cache), ensemble=True, out=tmp_path / "twice", **options)
    for (_, alone), (_, twice) in zip(
        losses(tmp_path / "alone"), losses(tmp_path / "twice"), strict=True
    ):
        assert float.fromhex(twice) == pytest.approx(float.fromhex(alone), rel=1e-6)
    assert ("teacher_entropy" in lines(tmp_path / "twice")[0]) == (kind == "dense")


def test_a_sample_with_itself_gives_the_same_weights_and_no_kl(capture, train, tmp_path):
    cache = capture(targets="sample", mean_entries=9.0, **FEW)
    train(cache=(cache,), out=tmp_path / "alone", max_steps=2)
    train(cache=(cache, cache), ensemble=True, out=tmp_path / "twice", max_steps=2)
    for alone, twice in zip(lines(tmp_path / "alone"), lines(tmp_path / "twice"), strict=True):
        assert "soft" not in twice  # the entropy of the mixture is not known, so neither is KL
        expected = alone["soft"] + alone["teacher_entropy"]
        assert twice["soft_cross_entropy"] == pytest.approx(expected, rel=1e-5)
        assert twice["hard"] == pytest.approx(alone["hard"], rel=1e-5)


def lines(run: Path) -> list[dict]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == "train"]


def test_two_teachers_train_and_resume_as_uninterrupted(topk, train, tmp_path, monkeypatch):
    options = {"cache": (topk[0], Path(f"{topk[1]}=3")), "ensemble": True, "temperature": 2.0}
    result = train(out=tmp_path / "whole", **options)
    assert result["ensemble"] is True
    assert result["cache_weights"] == [1.0, 3.0]
    SignalAt(monkeypatch, [2])
    with pytest.raises(Stopped):
        train(**options)
    train(threads=3, **options)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


@pytest.fixture
def shorter(topk: tuple[Path, Path], tmp_path: Path) -> Path:
    """The second teacher without the documents from 55 on."""
    repack(RepackConfig(cache=topk[1], out=tmp_path / "shorter", documents=":55"))
    return tmp_path / "shorter"


def test_rows_that_one_cache_lacks_are_named(topk, shorter, train):
    missing = [row.row_id for row in open_cache(topk[0]) if row.row_id >> 24 >= 55]
    assert len(missing) >= 4
    listed = ", ".join(map(str, missing[:5]))
    expected = (
        rf"{shorter} lacks {len(missing)} of \d+ rows: row ids {listed}.*cache-teacher run, or "
        "keep the documents that both hold with cache-teacher repack --documents"
    )
    for caches in ((topk[0], shorter), (shorter, topk[0])):
        with pytest.raises(CacheMismatch, match=expected):
            train(cache=caches, ensemble=True)


def test_rows_of_equal_length_and_other_ids_are_found_when_they_are_read(topk, monkeypatch):
    one, two = (open_cache(path) for path in topk)
    ensemble, read = Ensemble([one, two]), two.read_block

    def other_ids(block: int, **options: object):
        decoded = read(block, **options)  # type: ignore[arg-type]
        decoded.row_ids = decoded.row_ids + np.uint64(1)
        return decoded

    monkeypatch.setattr(two, "read_block", other_ids)
    with pytest.raises(CacheMismatch, match=rf"{two.path} lacks \d+ of \d+ rows"):
        ensemble.read_block(0)


def test_caches_that_are_no_ensemble_are_refused(topk, dense, capture, train):
    other_rows = capture(limit_documents=10, max_length=32)
    with pytest.raises(CacheMismatch, match=r"no two teachers on the same rows: rows_id .corpus"):
        train(cache=(topk[0], other_rows), ensemble=True)
    with pytest.raises(CacheMismatch, match="kind of targets is 'topk' in the first and 'dense'"):
        train(cache=(topk[0], dense[0]), ensemble=True)


def test_what_is_nothing_to_mix_is_refused(topk, labels_dir, train, dense, tmp_path):
    with pytest.raises(ConfigError, match="name at least two with --cache"):
        train(cache=(topk[0],), ensemble=True)
    with pytest.raises(CacheMismatch, match="hold hard labels only, and there is nothing to mix"):
        train(cache=(labels_dir, labels_dir), ensemble=True, soft_weight=0.0, hard_weight=1.0)
    without = tmp_path / "without"
    repack(RepackConfig(cache=dense[1], out=without, drop_hidden=True))
    with pytest.raises(CacheMismatch, match=rf"layer -1 has 32 channels .* and 0 in {without}"):
        train(cache=(dense[0], without), ensemble=True, hidden_weight=1.0)


def test_states_of_other_positions_have_no_mean(dense, some_states, train):
    expected = (
        f"which positions have hidden states, hidden_every, is 1 in {dense[0]} and 3 in "
        f"{some_states[1]}, .* Leave --hidden-weight out"
    )
    caches = (dense[0], some_states[1])
    with pytest.raises(CacheMismatch, match=expected):
        train(cache=caches, ensemble=True, hidden_weight=1.0)
    train(cache=caches, ensemble=True, max_steps=1)  # nothing reads the states


# ---- Mixing caches by weight


@pytest.fixture(scope="module")
def halves(capture: Capture) -> tuple[Path, Path]:
    """Two caches of different documents; the second is about a sixth of the first."""
    old = capture(split="train[:85%]")
    return old, capture(split="train[85%:]", like=old, max_length=1024)


def test_a_weighted_run_resumes_as_uninterrupted(halves, train, tmp_path, monkeypatch):
    options = {"cache": (halves[0], Path(f"{halves[1]}=2.5")), "max_steps": 9}
    train(out=tmp_path / "whole", **options)
    train(out=tmp_path / "joined", cache=halves, max_steps=9)
    assert losses(tmp_path / "whole") != losses(tmp_path / "joined")
    SignalAt(monkeypatch, [4])
    with pytest.raises(Stopped):
        train(**options)
    train(threads=3, **options)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_an_epoch_of_a_weighted_run_reads_every_cache_through(halves, train):
    """The larger cache has most tokens per weight: once, and as many tokens of the other."""
    tokens = [int(open_cache(path).row_tokens.sum()) for path in halves]
    result = train(cache=tuple(Path(f"{p}=1") for p in halves), max_steps=0, batch_tokens=2000)
    assert result["steps"] == pytest.approx(2 * max(tokens) / 2000, rel=0.06)


def test_another_weight_is_another_run(halves, train):
    train(cache=(halves[0], Path(f"{halves[1]}=2")), max_steps=2)
    for caches, asked in (
        ((halves[0], Path(f"{halves[1]}=3")), "1.0, 3.0"),
        (halves, "no weight, no weight"),
    ):
        with pytest.raises(CacheMismatch, match=rf"this run has 1.0, 2.0, asked for {asked}"):
            train(cache=caches, max_steps=3)


@pytest.mark.parametrize(
    ("given", "path", "weights"),
    [
        ("data/a", "data/a", ()),
        ("data/a=2", "data/a", (2.0, 1.0)),
        ("data/a/=.5", "data/a", (0.5, 1.0)),
        ("runs/lr=2=1e-1", "runs/lr=2", (0.1, 1.0)),
        ("runs/kind=topk", "runs/kind=topk", ()),
    ],
)
def test_a_number_behind_the_last_equals_sign_is_a_weight(given, path, weights):
    config = TrainConfig(student="s", cache=(Path(given), Path("b")), out=Path("o"))
    assert config.cache_paths == (Path(path), Path("b"))
    assert config.cache_weights == weights


@pytest.mark.parametrize("given", ["a=0", "a=-1", "a=nan", "a=inf", "=2"])
def test_what_is_no_weight_is_refused(given):
    with pytest.raises(ConfigError, match=r"weight from 1e-06 to 1,000,000.*needs a weight behind"):
        TrainConfig(student="s", cache=(Path(given),), out=Path("o"))


@pytest.mark.parametrize(("ensemble", "warned"), [(False, True), (True, False)])
def test_teachers_on_the_same_rows_joined_by_mistake_are_noticed(dense, caplog, ensemble, warned):
    caches = [open_cache(path) for path in dense]
    config = TrainConfig(student="s", cache=dense, out=Path("run"), ensemble=ensemble)
    warn_of_same_rows(config, caches)
    assert ("2 caches hold the same rows" in caplog.text) == warned
    caplog.clear()
    warn_of_same_rows(config, caches[:1])
    assert not caplog.text
