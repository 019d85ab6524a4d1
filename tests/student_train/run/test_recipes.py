"""Numbers left to the task: which, where they are written, and that a resumed run has the same."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import BertModel, Trainer

from shared.errors import CacheMismatch, ConfigError
from shared.options import load
from shared.tasks import TASKS
from student_train.config import TrainConfig
from student_train.run.assemble import with_numbers
from student_train.run.run import run
from student_train.tasks.table import STUDENT_TASKS
from tests.student_train.label_caches import bert_config, make_rows, make_teacher, write_cache

SEQUENCES = "sequence-classification"
NUMBERS = {"learning_rate", "epochs", "batch_tokens", "weight_decay", "warmup_ratio"}


@pytest.fixture(scope="module")
def classes_dir(tmp_path_factory, tokenizer_dir) -> Path:
    path = tmp_path_factory.mktemp("cache") / "classes"
    rows = make_rows(SEQUENCES, 40)
    return write_cache(path, tokenizer_dir, SEQUENCES, rows, make_teacher(SEQUENCES))


@pytest.fixture
def students(tmp_path) -> dict[str, Path]:
    bert_config().save_pretrained(tmp_path / "scratch")
    BertModel(bert_config()).save_pretrained(tmp_path / "pretrained")
    return {name: tmp_path / name for name in ("scratch", "pretrained")}


def config_of(student: Path, cache: Path, out: Path, **options: Any) -> TrainConfig:
    options = {"device": "cpu"} | options
    return TrainConfig(student=str(student), cache=(cache,), out=out, **options)


def test_numbers_go_by_task_and_start(students, classes_dir, cache_dir, teacher_dir, tmp_path):
    scratch = with_numbers(config_of(students["scratch"], classes_dir, tmp_path)).recipe
    pretrained = with_numbers(config_of(students["pretrained"], classes_dir, tmp_path)).recipe
    language = with_numbers(config_of(teacher_dir, cache_dir, tmp_path)).recipe
    adapted = with_numbers(config_of(teacher_dir, cache_dir, tmp_path, lora_rank=2)).recipe
    assert (pretrained.learning_rate, pretrained.epochs, pretrained.weight_decay) == (5e-5, 3, 0.01)
    assert (language.learning_rate, language.epochs, language.weight_decay) == (1e-4, 1, 0.0)
    assert scratch.learning_rate == 10 * pretrained.learning_rate
    assert adapted.learning_rate == 2 * language.learning_rate
    assert (language.batch_tokens, pretrained.batch_tokens) == (16384, 2048)


def test_every_task_has_numbers_that_are_options(tmp_path):
    for task in TASKS:
        for start in ("pretrained", "scratch", "adapters"):
            recipe = STUDENT_TASKS[task].recipes[start]
            config_of(tmp_path, tmp_path, tmp_path, **asdict(recipe))  # within all bounds
            assert set(asdict(recipe)) == NUMBERS


def test_a_number_that_is_given_stays(classes_dir, students, tmp_path):
    given = {"learning_rate": 0.0, "warmup_ratio": 0.0, "epochs": 7}
    config = with_numbers(config_of(students["scratch"], classes_dir, tmp_path, **given))
    assert {name: getattr(config, name) for name in given} == given
    assert config.batch_tokens == 2048


def test_the_trainer_gets_them_and_the_run_folder_says_which(
    classes_dir, students, tmp_path, monkeypatch, caplog
):
    seen: list[Any] = []
    original = Trainer.train

    def train(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        seen.append(self.args)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "train", train)
    config = config_of(students["scratch"], classes_dir, tmp_path / "run")
    with caplog.at_level(logging.INFO):
        result = run(config)
    assert "learning rate 0.0005, 10 epochs, 2,048 tokens a step" in caplog.text
    (arguments,) = seen
    assert (arguments.learning_rate, arguments.weight_decay) == (5e-4, 0.01)
    assert arguments.warmup_steps == round(0.1 * result["steps"])
    tokens = sum(len(row.ids) for row in make_rows(SEQUENCES, 40))
    assert result["steps"] == pytest.approx(10 * tokens / 2048, abs=1)
    path = tmp_path / "run" / "run.yaml"
    written = yaml.safe_load(path.read_text())
    assert {name: written[name] for name in NUMBERS} == asdict(
        STUDENT_TASKS[SEQUENCES].recipes["scratch"]
    )
    again = load(TrainConfig, {}, path)
    assert again == with_numbers(config)
    assert run(again) == result
    assert run(config) == result


def test_a_resumed_run_must_resolve_to_the_same_numbers(classes_dir, students, tmp_path):
    common = {"max_steps": 2}
    run(config_of(students["scratch"], classes_dir, tmp_path / "run", **common))
    run(config_of(students["scratch"], classes_dir, tmp_path / "run", learning_rate=5e-4, **common))
    with pytest.raises(
        CacheMismatch, match=r"learning_rate: this run has 0\.0005, asked for 0\.001"
    ):
        run(config_of(students["scratch"], classes_dir, tmp_path / "run", learning_rate=1e-3))
    run(config_of(students["scratch"], classes_dir, tmp_path / "own", learning_rate=1e-3, **common))
    with pytest.raises(
        CacheMismatch, match=r"learning_rate: this run has 0\.001, asked for 0\.0005"
    ):
        run(config_of(students["scratch"], classes_dir, tmp_path / "own"))
    seconds = json.loads((tmp_path / "own" / "result.json").read_text())["max_steps"]
    assert seconds == 2


@pytest.mark.parametrize(("name", "value"), [("epochs", "many"), ("learning_rate", "small")])
def test_another_word_is_refused(name, value, tmp_path):
    with pytest.raises(ConfigError, match=rf"--{name.replace('_', '-')} is '{value}', but must be"):
        config_of(tmp_path, tmp_path, tmp_path, **{name: value})


def test_pretrained_weights_are_not_fresh_because_of_a_missing_head(
    students, classes_dir, tmp_path
):
    torch.manual_seed(0)
    config = with_numbers(config_of(students["pretrained"], classes_dir, tmp_path))
    assert config.recipe == STUDENT_TASKS[SEQUENCES].recipes["pretrained"]
