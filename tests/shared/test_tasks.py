"""The tables of tasks and of problem types: what they name is there, and they are open."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from shared.errors import ConfigError, CorruptCache
from shared.format.layouts import LAYOUTS
from shared.format.manifest import Manifest
from shared.format.schema import COLUMN_OF
from shared.strict import build
from shared.targets.kinds import KINDS
from shared.tasks import DEFAULT_TASK, PROBLEMS, TASKS, tasks_where
from teacher_cache.config import CaptureConfig
from tests.shared.format.test_manifest import make_manifest


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_the_layout_of_a_task_is_in_the_table(task):
    assert task.layout in LAYOUTS
    assert task.named_classes or not task.unlabelled
    assert task.named_classes or not task.has_problem_type


@pytest.mark.parametrize("problem", PROBLEMS.values(), ids=PROBLEMS)
def test_a_problem_type_names_a_layout_and_a_kind_that_are_there(problem):
    assert COLUMN_OF[problem.label_column].needs_labels
    if problem.layout is not None:
        assert LAYOUTS[problem.layout].positions_per_row(3) == 3
        assert KINDS[problem.kind].numbers == problem.numbers
        assert KINDS[problem.kind].fewest_classes == problem.num_classes


@pytest.mark.parametrize("task", ["unheard-of", 3, None, ["causal-lm"]])
def test_an_unknown_task_is_refused_with_the_names_there_are(task):
    raw = json.loads(make_manifest().to_json()) | {"task": task}
    names = ", ".join(TASKS)
    with pytest.raises(CorruptCache, match=f"here: task: found .*, expected one of {names}"):
        build(Manifest, raw, "here")


def test_a_task_in_the_table_is_one_that_a_manifest_and_an_option_may_name(monkeypatch):
    options = {"teacher": "t", "corpus": "c", "out": Path("o"), "task": "own-lm"}
    with pytest.raises(ConfigError, match="own-lm"):
        CaptureConfig(**options)
    monkeypatch.setitem(TASKS, "own-lm", TASKS["causal-lm"])
    raw = json.loads(make_manifest().to_json()) | {"task": "own-lm"}
    manifest = build(Manifest, raw, "here")
    assert (manifest.layout, manifest.hard_labels) == (LAYOUTS["tokens"], "next")
    assert asdict(manifest)["task"] == CaptureConfig(**options).task == "own-lm"


def test_what_a_task_is_like_says_which_options_it_reads():
    assert DEFAULT_TASK == "causal-lm"
    assert tasks_where(lambda task: task.is_written) == ("causal-lm", "seq2seq-lm")
    assert tasks_where(lambda task: task.masks) == ("masked-lm",)
    assert tasks_where(lambda task: task.keeps_states) == ("feature-extraction",)
    heads = ("token-classification", "sequence-classification", "question-answering")
    assert tasks_where(lambda task: not task.over_vocabulary) == heads
