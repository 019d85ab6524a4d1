"""A cache grows: new documents captured `--like` the old ones, and both trained on together."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from shared.cache import open_cache
from shared.errors import CacheMismatch, ConfigError
from student_train.data.cache_set import open_caches


def test_like_takes_over_what_decides_whether_caches_train_together(capture):
    hidden = {"hidden_layers": (-1,), "hidden_codec": "int8", "hidden_every": 2}
    old = capture(split="train[:60%]", top_k=5, temperature=(2.0,), **hidden)
    new = capture(split="train[60%:]", like=old, max_length=1024)
    one, two = open_cache(old).manifest, open_cache(new).manifest
    assert two.targets == one.targets
    assert two.hidden == one.hidden
    assert (one.hidden.codec, one.hidden.every) == ("int8", 2)
    assert two.preprocessing.max_length == one.preprocessing.max_length
    learnt = [name for name in one.side_files if name.startswith("learnt-")]
    assert two.side_files[learnt[0]] == one.side_files[learnt[0]]
    joined = open_caches([old, new], allow_partial=False)
    assert len(joined.row_tokens) == len(open_cache(old)) + len(open_cache(new))
    last = joined.read_block(len(joined.block_rows) - 1)
    expected = open_cache(new).read_block(open_cache(new).num_blocks - 1)
    assert (last.row_ids == expected.row_ids).all()


def test_like_refuses_another_teacher(capture, teacher_dir, tmp_path):
    old = capture(split="train[:50%]")
    other = Path(shutil.copytree(teacher_dir, tmp_path / "other"))
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    model.save_pretrained(other)
    with pytest.raises(CacheMismatch, match=r"would not train together with it. .*weights_digest"):
        capture(split="train[50%:]", like=old, teacher=str(other), max_length=1024)


def test_an_option_that_like_decides_is_refused_beside_it(capture):
    with pytest.raises(ConfigError, match="--top-k"):
        capture(split="train[50%:]", like=Path("anywhere"), top_k=5, max_length=1024)


def test_caches_that_do_not_fit_are_refused(capture, cache_dir):
    other = capture(top_k=3)
    with pytest.raises(CacheMismatch, match=r"do not train together: top_k is 8 in the first"):
        open_caches([cache_dir, other], allow_partial=False)
    fewer = capture(hidden_layers=(-1, 0), hidden_every=2, temperature=(2.0,))
    with pytest.raises(CacheMismatch, match=r"hidden_every, is 1 in the first and 2 in the second"):
        open_caches([cache_dir, fewer], allow_partial=False)


def test_training_sees_the_rows_of_both_and_resumes_on_both(capture, student_config_dir, tmp_path):
    from student_train.config import TrainConfig
    from student_train.run.run import run

    old = capture(split="train[:60%]")
    new = capture(split="train[60%:]", like=old, max_length=1024)
    config = TrainConfig(
        student=str(student_config_dir),
        cache=(old, new),
        out=tmp_path / "run",
        batch_tokens=1000,
        device="cpu",
    )
    result = run(config)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    positions = sum(line["positions"] for line in lines if line["kind"] == "train")
    both = sum(int(open_cache(path).row_positions.sum()) for path in (old, new))
    assert both <= positions < both + 1000  # one epoch, its last step filled up from the next
    assert result["cache_ids"] == [open_cache(path).cache_id for path in (old, new)]
    assert run(config) == result
