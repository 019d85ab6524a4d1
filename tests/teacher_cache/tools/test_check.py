"""`check` passes on a good cache and fails where cache and teacher do not belong together."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.cache import Cache, open_cache
from shared.format.blocks import Block
from shared.format.writer import ShardWriter, encode_block
from teacher_cache.config import CheckConfig
from teacher_cache.tools.check.check import check


def checked(cache: Path, teacher: Path) -> object:
    return check(CheckConfig(cache=cache, teacher=str(teacher), rows=24, device="cpu"))


def test_a_good_cache_passes(cache_dir, teacher_dir):
    found = checked(cache_dir, teacher_dir)
    assert found.sound
    assert found.kl_live_cached <= 1e-4
    assert found.agreement_live_cached > 0.99
    assert found.kl_live_live < 1e-9


def test_a_packed_cache_passes(capture, teacher_dir):
    assert checked(capture(pack=True), teacher_dir).sound


def rewritten(cache: Cache, out: Path, change: object) -> Path:
    """The same cache with every block changed, and all its checksums right."""
    for name in ("shards", "commits"):
        shutil.rmtree(out / name)
    for index, commit in enumerate(cache.commits):
        first, last = cache.shard_blocks(index)
        with ShardWriter(
            cache_storage(out), cache.manifest, cache.cache_id, commit.shard
        ) as writer:
            for number in range(first, last):
                block = cache.read_block(number, hidden_layers=cache.manifest.hidden.layers)
                change(block)
                writer.write(encode_block(block, number - first, cache.manifest, cache.ranks))
            writer.statistics = commit.statistics
    return out


def cache_storage(path: Path) -> object:
    from shared.storage.local import LocalStorage

    return LocalStorage(path)


def shift(block: Block) -> None:
    move(block, np.roll(np.arange(len(block.target.log_tail)), 1))


def reverse_rows(block: Block) -> None:
    move(block, np.arange(len(block.target.log_tail))[::-1])


def move(block: Block, order: np.ndarray) -> None:
    block.target = block.target.at(order)
    block.target.random_bits = np.zeros(len(order), np.uint64)


@pytest.mark.parametrize("change", [shift, reverse_rows])
def test_targets_out_of_place_fail(cache_dir, cache_copy, teacher_dir, change):
    found = checked(rewritten(open_cache(cache_dir), cache_copy, change), teacher_dir)
    assert not found.sound
    assert found.kl_live_cached > 0.1
    assert found.differences == ()


@pytest.mark.parametrize("kind", ["adaptive", "sample", "dense"])
def test_every_kind_passes_and_fails_once_shifted(kind, capture, teacher_dir, tmp_path):
    asked = {} if kind == "dense" else {"mean_entries": 10.0}
    good = capture(targets=kind, limit_documents=60, **asked)
    found = checked(good, teacher_dir)
    assert found.sound
    assert found.kl_live_cached <= 5e-4
    copy = Path(shutil.copytree(good, tmp_path / "copy"))
    found = checked(rewritten(open_cache(good), copy, shift), teacher_dir)
    assert not found.sound
    assert found.kl_live_cached > 0.02  # this teacher is flat: 10 entries have little of its mass


def test_other_weights_fail(cache_dir, teacher_dir, tmp_path):
    other = Path(shutil.copytree(teacher_dir, tmp_path / "other"))
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.2)
    model.save_pretrained(other)
    found = checked(cache_dir, other)
    assert not found.sound
    assert found.kl_live_cached > 1e-3
    assert any("weights_digest" in line for line in found.differences)


def test_another_chat_template_fails(cache_dir, teacher_dir, tmp_path):
    other = Path(shutil.copytree(teacher_dir, tmp_path / "other"))
    (other / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    found = checked(cache_dir, other)
    assert not found.sound
    assert [line for line in found.differences if "template_hash" in line]
