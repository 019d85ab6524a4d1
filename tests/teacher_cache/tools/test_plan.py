"""What `plan` says against what a run then makes."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from shared import open_cache
from shared.errors import ConfigError
from teacher_cache.config import PlanConfig
from teacher_cache.tools.plan import estimate
from tests.conftest import Capture

SMALL = {"limit_documents": 30, "shard_tokens": 600, "max_length": 64, "top_k": 8, "device": "cpu"}


@pytest.fixture
def options(teacher_dir: Path, corpus_file: Path, tmp_path: Path) -> dict[str, Any]:
    """Options of a job of 30 documents."""
    paths = {"teacher": str(teacher_dir), "corpus": str(corpus_file), "out": tmp_path / "cache"}
    return SMALL | paths


@pytest.fixture(scope="module")
def small_dir(capture: Capture) -> Path:
    return capture(**SMALL)


def plan_of(options: dict[str, Any], **more: Any) -> dict[str, Any]:
    return estimate(PlanConfig(**options | more))


@pytest.mark.parametrize("pack", [False, True])
def test_a_small_corpus_is_counted_exactly(options, capture, pack):
    numbers = plan_of(options, pack=pack)
    cache = open_cache(capture(**SMALL, pack=pack))
    assert numbers["documents"] == numbers["sampled_documents"] == 30
    assert numbers["tokens"] == int(cache.row_tokens.sum())
    assert numbers["positions"] == int(cache.row_positions.sum())
    assert numbers["documents_per_shard"] == cache.manifest.plan.documents_per_shard
    assert numbers["shards"] == cache.manifest.plan.num_shards
    assert (numbers["classes"], numbers["targets"], numbers["asked"]) == (300, "topk", "topk 8")
    if not pack:  # rows are packed inside a shard, and in another order in the sample
        assert numbers["rows"] == len(cache)


def test_a_plan_without_calibration_reads_no_weights_and_writes_nothing(options, tmp_path):
    teacher = tmp_path / "no-weights"
    shutil.copytree(options["teacher"], teacher, ignore=shutil.ignore_patterns("*.safetensors"))
    numbers = plan_of(options, teacher=str(teacher))
    assert not numbers["calibrated"]
    assert set(numbers) & {"hours", "kept_mass", "tokens_per_s"} == set()
    assert not options["out"].exists()
    json.dumps(numbers)  # everything in it is JSON


def test_the_table_of_bytes_grows_with_the_size_and_holds_the_asked_one(options):
    choices = plan_of(options, top_k=24)["choices"]
    sizes = {choice["size"]: choice["bytes_per_position"] for choice in of_kind(choices, "topk")}
    assert list(sizes) == [8, 16, 24, 32, 64, 128]
    for kind in ("topk", "adaptive", "sample"):
        found = [choice["bytes_per_position"] for choice in of_kind(choices, kind)]
        assert found == sorted(found)
    assert [choice["text"] for choice in choices if choice["asked"]] == ["topk 24"]


def test_hidden_states_count_by_codec_and_by_how_often_they_are_kept(options):
    """32 channels of two layers, of which no weights are read."""

    def extra(**hidden):
        return plan_of(options, hidden_layers=(-1, 0), **hidden)["bytes_per_position"]["hidden"]

    assert extra() == pytest.approx(2 * 32 * 1.4, abs=0.11)
    assert extra(hidden_codec="fp8") == pytest.approx(2 * 32 * 0.85, abs=0.11)
    assert extra(hidden_every=4) == pytest.approx(2 * 32 * 1.4 / 4, abs=0.11)


def of_kind(choices: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [choice for choice in choices if choice["kind"] == kind]


def test_more_bits_take_more_bytes(options):
    narrow, wide = (plan_of(options, value_bits=bits)["choices"] for bits in (7, 16))
    for kind in ("topk", "adaptive", "sample"):
        for one, other in zip(of_kind(narrow, kind), of_kind(wide, kind), strict=True):
            grown = other["bytes_per_position"] - one["bytes_per_position"]
            assert grown == pytest.approx(one["size"] * 9 / 8, abs=0.11)


def test_label_only_costs_its_tokens_and_nothing_else(options, labels_dir, tokenizer_dir):
    label_only = {"teacher": None, "targets": "none", "top_k": None, "limit_documents": 0}
    numbers = plan_of(options, tokenizer=str(tokenizer_dir), **label_only)
    assert numbers["choices"] == []
    assert numbers["targets"] == "none"
    columns = sum(sum(commit.column_bytes.values()) for commit in open_cache(labels_dir).commits)
    assert numbers["bytes"] == pytest.approx(columns, rel=0.05)  # blocks cut elsewhere


@pytest.fixture(scope="module")
def calibrated(teacher_dir: Path, corpus_file: Path, tmp_path_factory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("plan") / "cache"
    paths = {"teacher": str(teacher_dir), "corpus": str(corpus_file), "out": out}
    numbers = plan_of(SMALL | paths, calibrate=True, temperature=(2.0,))
    assert list(out.parent.iterdir()) == []  # the disk probe is gone, too
    return numbers


def test_a_calibrated_plan_measures(calibrated):
    assert calibrated["calibrated"]
    assert calibrated["tokens_per_s"] > 0
    assert calibrated["hours"] == pytest.approx(
        calibrated["tokens"] / calibrated["tokens_per_s"] / 3600, rel=0.01
    )
    assert calibrated["disk_mb_per_s"] > 0


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_kept_mass_is_that_of_the_dense_teacher(
    calibrated, small_dir, teacher_dir, temperature
):
    teacher = LlamaForCausalLM.from_pretrained(teacher_dir, dtype=torch.float64)
    kept: dict[int, list[torch.Tensor]] = {8: [], 32: []}
    for row in open_cache(small_dir):
        with torch.no_grad():
            logits_TV = teacher(row.input_ids[None]).logits[0, :-1]
        p_TV = (logits_TV / temperature).softmax(-1)
        for k, masses in kept.items():
            masses.append(p_TV.topk(k).values.sum(-1))
    for k, masses in kept.items():
        expected = float(torch.cat(masses).mean())
        # float32 against float64 logits of size 10
        choice = next(c for c in calibrated["choices"] if c["text"] == f"topk {k}")
        assert choice["kept_mass"][f"{temperature:g}"] == pytest.approx(expected, abs=1e-5)
        by_k = calibrated["kept_mass_by_k"][f"{temperature:g}"]
        assert by_k[str(k)] == pytest.approx(expected, abs=1e-5)


KINDS: dict[str, dict[str, Any]] = {
    "topk": {"targets": "topk", "top_k": 8, "temperature": (2.0,)},
    "adaptive": {"targets": "adaptive", "mean_entries": 6.0},
    "sample": {"targets": "sample", "mean_entries": 6.0},
    "dense": {"targets": "dense"},
    "hidden": {"targets": "topk", "top_k": 4, "hidden_layers": (-1, 0)},
}


@pytest.mark.parametrize("name", KINDS)
def test_the_bytes_of_every_kind_are_those_of_its_cache(options, capture, name):
    kind = KINDS[name]
    plain = {key: value for key, value in options.items() if key != "top_k"} | kind
    cache = open_cache(capture(**plain | {"shard_tokens": 10**6, "out": options["out"]}))
    columns = Counter()
    for commit in cache.commits:
        columns.update(commit.column_bytes)
    positions = int(cache.row_positions.sum())
    targets = sum(size for column, size in columns.items() if column.startswith("target_"))
    numbers = plan_of(plain, out=options["out"].parent / "other", calibrate=True)
    assert numbers["bytes"] == pytest.approx(sum(columns.values()), rel=0.02)
    asked = next(choice for choice in numbers["choices"] if choice["asked"])
    # the rows of one block in another order, and another draw
    assert asked["bytes_per_position"] == pytest.approx(targets / positions, rel=0.05)
    if name == "hidden":
        states = sum(size for column, size in columns.items() if column.startswith("hidden"))
        assert numbers["bytes_per_position"]["hidden"] == pytest.approx(
            states / positions, rel=0.01
        )
        table = plan_of(plain, out=options["out"].parent / "other")["bytes_per_position"]
        assert table["hidden"] == pytest.approx(states / positions, rel=0.4)


def test_a_plan_like_a_cache_is_of_its_targets(options, small_dir):
    plain = {k: v for k, v in options.items() if k not in ("top_k", "max_length")}
    numbers = plan_of(plain, like=small_dir)
    assert numbers["asked"] == "topk 8"
    assert [c["text"] for c in numbers["choices"] if c["asked"]] == ["topk 8"]


def test_a_page_needs_something_measured(options):
    with pytest.raises(ConfigError, match="--html draws what --calibrate measures: give both"):
        PlanConfig(**options, html=options["out"] / "plan.html")
