"""Weights and temperature that change over a run: formula, loss, log, resume, refusals."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from shared.errors import CacheMismatch, ConfigError, Stopped
from student_train.config import TrainConfig
from student_train.loss.schedule import LossSchedule
from tests.conftest import Capture
from tests.student_train.run.test_trainer import SignalAt, losses


@pytest.fixture(scope="module")
def dense(capture: Capture) -> Path:
    return capture(targets="dense", limit_documents=60)


def lines(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line["kind"] == "train"]


@pytest.mark.parametrize(("start", "end"), [(1.0, 0.2), (0.0, 3.0), (2.5, 2.5)])
@pytest.mark.parametrize("max_steps", [2, 3, 101])
def test_values_go_from_start_to_end(start, end, max_steps):
    linear, cosine = (
        LossSchedule(kind, max_steps, {"soft_weight": (start, end)})
        for kind in ("linear", "cosine")
    )
    for step in range(max_steps):
        x = step / (max_steps - 1)
        expected = start + (end - start) * x
        assert linear.at(step)["soft_weight"] == pytest.approx(expected, rel=1e-12, abs=1e-15)
        expected = end + (start - end) * (1 + math.cos(math.pi * x)) / 2
        assert cosine.at(step)["soft_weight"] == pytest.approx(expected, rel=1e-12, abs=1e-15)
    for schedule in (linear, cosine):
        assert schedule.at(0)["soft_weight"] == start
        assert schedule.at(max_steps - 1)["soft_weight"] == end


def test_a_run_of_one_step_has_the_start_values():
    assert LossSchedule("linear", 1, {"soft_weight": (1.0, 0.2)}).at(0) == {"soft_weight": 1.0}


def test_the_loss_follows_the_schedule_and_the_log_shows_it(train, tmp_path):
    train(
        loss_schedule="linear",
        soft_weight_end=0.0,
        hard_weight=0.0,
        hard_weight_end=1.0,
        hidden_weight=0.1,
    )
    found = lines(tmp_path / "run")
    assert [line["soft_weight"] for line in found] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
    assert [line["hard_weight"] for line in found] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    for line in found:
        assert "hidden_weight" not in line
        soft, hard = line["soft_weight"] * line["soft"], line["hard_weight"] * line["hard"]
        assert line["loss"] == pytest.approx(soft + hard + 0.1 * line["hidden"], rel=1e-5)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["scheduled"] == {"soft_weight": [1.0, 0.0], "hard_weight": [0.0, 1.0]}


def test_a_temperature_schedule_on_a_dense_cache_passes_every_temperature(train, tmp_path, dense):
    """The first step is that of a run at the start temperature, the last one at the end's."""
    options = {"cache": (dense,), "learning_rate": 0.0, "max_steps": 3, "hard_weight": 0.0}
    ends = {"temperature": 3.0, "temperature_end": 1.5, "loss_schedule": "linear"}
    train(out=tmp_path / "scheduled", **options, **ends)
    found = lines(tmp_path / "scheduled")
    assert [line["temperature"] for line in found] == [3.0, 2.25, 1.5]
    for step, temperature in enumerate([3.0, 2.25, 1.5]):
        out = tmp_path / f"at-{temperature}"
        train(out=out, temperature=temperature, **options)
        assert losses(out)[step] == losses(tmp_path / "scheduled")[step]


def test_a_scheduled_run_resumes_as_uninterrupted(train, tmp_path, monkeypatch, dense):
    options = {
        "cache": (dense,),
        "temperature": 2.0,
        "temperature_end": 1.0,
        "soft_weight_end": 0.3,
        "loss_schedule": "cosine",
        "max_steps": 7,
    }
    train(out=tmp_path / "whole", **options)
    SignalAt(monkeypatch, [3])
    with pytest.raises(Stopped):
        train(**options)
    train(**options)
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")


def test_another_end_value_is_another_run(train):
    options = {"loss_schedule": "linear", "max_steps": 2}
    train(soft_weight_end=0.3, **options)
    with pytest.raises(CacheMismatch, match=r"soft_weight_end: this run has 0\.3, asked for 0\.4"):
        train(soft_weight_end=0.4, **options)


def test_a_weight_that_is_0_only_at_the_start_is_learnt_from(train, tmp_path):
    zeros = {"soft_weight": 0.0, "hard_weight": 0.0}
    train(**zeros, hidden_weight_end=1.0, soft_weight_end=1.0, loss_schedule="linear", max_steps=3)
    found = lines(tmp_path / "run")
    assert found[0]["loss"] == 0.0
    assert found[-1]["loss"] == pytest.approx(found[-1]["soft"] + found[-1]["hidden"], rel=1e-5)


def test_a_temperature_schedule_needs_a_dense_cache(train):
    with pytest.raises(
        CacheMismatch, match=r"passes every temperature between 2 and there, and .*"
    ):
        train(temperature=2.0, temperature_end=1.0, loss_schedule="linear")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_schedule": "linear"}, "nothing changes over the run. Give an end value"),
        ({"soft_weight_end": 0.2}, "--soft-weight-end is only read with --loss-schedule"),
        (
            {"loss_schedule": "cosine", "temperature_end": 1.0, "ensemble": True},
            "--temperature-end with --ensemble",
        ),
        (
            {"loss_schedule": "cosine", "temperature_end": 2.0, "soft_loss": "mse"},
            "mse compares log-probabilities at temperature 1, not 2.0",
        ),
    ],
)
def test_a_schedule_that_means_nothing_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(student="s", cache=(Path("c"),), out=Path("o"), **options)
