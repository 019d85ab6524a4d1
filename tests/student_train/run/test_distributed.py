"""A student over two processes against one process with the joined batch: DDP and FSDP2."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shared.cache import open_cache
from shared.errors import Refused
from student_train.config import TrainConfig
from student_train.data.cache_set import CacheSet
from student_train.run.arguments import refuse_what_breaks
from tests.student_train.label_caches import make_rows, make_teacher, write_cache
from tests.student_train.run.two_ranks import (
    CASES,
    first_batch,
    half_labelled_batch,
    step,
    student_of,
    tagger_numbers,
    tagger_of,
)


@pytest.fixture(scope="module")
def tags_dir(tmp_path_factory, tokenizer_dir):
    task = "token-classification"
    path = tmp_path_factory.mktemp("tags") / "cache"
    return write_cache(path, tokenizer_dir, task, make_rows(task, 41), make_teacher(task))


@pytest.fixture(scope="module")
def untagged_dir(tmp_path_factory, tokenizer_dir):
    """More rows than have tags, and of other lengths."""
    task = "token-classification"
    path, rows = tmp_path_factory.mktemp("untagged") / "cache", make_rows(task, 60, seed=1)
    return write_cache(path, tokenizer_dir, task, rows, make_teacher(task), labelled=False)


@pytest.fixture(scope="module")
def ranks(cache_dir, tags_dir, untagged_dir, tmp_path_factory):
    """The folder of what two ranks computed."""
    out = tmp_path_factory.mktemp("ranks")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
    ]
    command += ["-m", "tests.student_train.run.two_ranks"]
    command += list(map(str, (cache_dir, tags_dir, untagged_dir, out)))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(("case", "tied"), CASES.items())
def test_two_ranks_compute_what_one_does(ranks, cache_dir, case, tied):
    cache = open_cache(cache_dir)
    alone = step(
        student_of(cache, tied=tied), first_batch(cache, rank=0, world_size=1), world_size=1
    )
    found = [torch.load(ranks / f"{case}-{rank}.pt", weights_only=True) for rank in range(2)]
    assert sum(each["positions"] for each in found) == alone["positions"]
    assert found[0]["positions"] != found[1]["positions"]
    torch.testing.assert_close(sum(each["loss"] for each in found), alone["loss"])
    assert any("projections" in name for name in alone["gradients"])
    for what in ("gradients", "weights"):
        assert found[0][what].keys() == alone[what].keys()
        for name, expected in alone[what].items():
            assert torch.equal(found[0][what][name], found[1][what][name]), name
            largest = float(expected.abs().max())
            assert largest > 0
            # Sums of float32 in another order.
            torch.testing.assert_close(found[0][what][name], expected, rtol=0, atol=1e-5 * largest)


def test_ranks_of_unequal_counts_of_labels_compute_what_one_does(ranks, tags_dir, untagged_dir):
    caches = CacheSet([open_cache(tags_dir), open_cache(untagged_dir)])
    batch = half_labelled_batch(caches, rank=0, world_size=1)
    alone = step(tagger_of(caches.first), batch, world_size=1)
    found = [torch.load(ranks / f"labels-{rank}.pt", weights_only=True) for rank in range(2)]
    for count in ("positions", "labelled"):
        assert sum(each[count] for each in found) == alone[count]
    assert 0 < alone["labelled"] < alone["positions"]
    assert found[0]["labelled"] != found[1]["labelled"]
    torch.testing.assert_close(sum(each["loss"] for each in found), alone["loss"])
    # Sums of float32 in another order; the bias of the keys in attention has a gradient of 0.
    largest = max(float(gradient.abs().max()) for gradient in alone["gradients"].values())
    for name, expected in alone["gradients"].items():
        for each in found:
            torch.testing.assert_close(
                each["gradients"][name], expected, rtol=1e-4, atol=1e-6 * largest
            )


def test_two_ranks_evaluate_as_one(ranks, tags_dir):
    """The metrics of a task are of all answers, however many each rank has."""
    alone = tagger_numbers(open_cache(tags_dir))
    assert 0 < alone["entity_f1_low"] < alone["entity_f1_high"] < 1
    for rank in range(2):
        found = json.loads((ranks / f"numbers-{rank}.json").read_text())
        assert found == {
            n: v if isinstance(v, str) else pytest.approx(v, rel=1e-5) for n, v in alone.items()
        }


def test_a_student_that_is_sharded_already_is_refused(ranks):
    for rank in range(2):
        said = (ranks / f"refused-{rank}.txt").read_text()
        assert "is sharded (fully_shard, FSDP2) already" in said
        assert "Call attach on the whole student first, then fully_shard." in said


def config(**options):
    return TrainConfig(student="s", cache=(Path("c"),), out=Path("o"), device="cpu", **options)


@pytest.mark.parametrize(
    "settings", [("fsdp=full_shard",), ("fsdp=true",), ("fsdp_config={version: 2}",)]
)
def test_fsdp_of_the_trainer_is_refused_on_a_cpu(settings, monkeypatch):
    """Even where there is a GPU that this run does not use."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(Refused) as error:
        refuse_what_breaks(config(settings=settings))
    assert "this run trains on the CPU, where the Trainer silently uses DDP instead" in (
        str(error.value)
    )
    assert "call fully_shard in a script of your own" in str(error.value)


def test_fsdp_asked_for_by_the_environment_is_refused_on_a_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "True")
    with pytest.raises(Refused, match="ACCELERATE_USE_FSDP"):
        refuse_what_breaks(config())
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    refuse_what_breaks(config(settings=("fsdp=false",)))
