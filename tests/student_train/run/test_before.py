"""The student before its first step: evaluated once, kept over resumes, and without a trace."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.cache import open_cache
from shared.errors import Stopped
from student_train.evaluate.evaluate import evaluate
from student_train.run import finish
from student_train.student.build import build_student
from tests.student_train.run.test_trainer import SignalAt, losses, weights


def eval_steps(run: Path) -> list[int]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["kind"] == "eval"]


def test_before_is_an_evaluation_of_the_untouched_student(train, cache_dir, student_config_dir):
    cache = open_cache(cache_dir)
    student = build_student(str(student_config_dir), cache, seed=0)
    expected = evaluate(student, cache, batch_tokens=8192)
    result = train(validation_cache=cache_dir)
    assert result["before"] == expected
    assert result["validation"].keys() == expected.keys()
    assert result["validation"]["loss"] < expected["loss"]
    assert json.loads((Path(result["out"]) / "result.json").read_text())["before"] == expected


def test_looking_first_changes_no_step(train, cache_dir, tmp_path, monkeypatch):
    """Even where looking draws random numbers."""
    looked = []

    def draw(*args: Any, **kwargs: Any) -> dict[str, Any]:
        looked.append(torch.rand(3))
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(finish, "evaluate", draw)
    train(out=tmp_path / "looked", validation_cache=cache_dir)
    train(out=tmp_path / "plain")
    assert len(looked) == 2  # before, and at the end
    assert losses(tmp_path / "looked") == losses(tmp_path / "plain")
    ours, theirs = weights(tmp_path / "looked"), weights(tmp_path / "plain")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_resumed_run_keeps_what_it_saw_first(train, cache_dir, tmp_path, monkeypatch):
    whole = train(out=tmp_path / "whole", validation_cache=cache_dir)
    SignalAt(monkeypatch, [3])
    with pytest.raises(Stopped):
        train(validation_cache=cache_dir)
    assert eval_steps(tmp_path / "run") == [0]
    resumed = train(validation_cache=cache_dir)
    assert eval_steps(tmp_path / "run") == [0]
    assert resumed["before"] == whole["before"]
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_start_that_died_before_its_first_checkpoint_looks_once(train, cache_dir, tmp_path):
    """It leaves its snapshot and the line of step 0, and begins again at step 0."""
    train(validation_cache=cache_dir)
    run = tmp_path / "run"
    for path in run.iterdir():
        if path.name not in ("run.yaml", "snapshot.json", "metrics.jsonl"):
            if path.is_dir():
                for file in path.iterdir():
                    file.unlink()
                path.rmdir()
            else:
                path.unlink()
    lines = (run / "metrics.jsonl").read_text().splitlines()
    marked = json.loads(lines[0]) | {"loss": 123.0}  # to tell the kept line from a new one
    (run / "metrics.jsonl").write_text("\n".join([json.dumps(marked), *lines[1:]]) + "\n")
    assert train(validation_cache=cache_dir)["before"]["loss"] == 123.0
    assert eval_steps(run) == [0]


def test_numbers_of_another_held_out_cache_are_not_taken(train, cache_dir, capture, tmp_path):
    """A finished run goes on with another one, on which nobody looked at the first student."""
    train(validation_cache=cache_dir)
    other = capture(limit_documents=40)
    result = train(validation_cache=other, max_steps=8)
    assert "before" not in result
    assert result["validation"]["positions"] == open_cache(other).row_positions.sum()
