"""The table of tasks: every task of the plain table is there, and one more is one line of it."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from shared.cache import open_cache
from shared.tasks import TASKS
from teacher_cache.config import CaptureConfig
from teacher_cache.engines.heads import HEADS
from teacher_cache.job.draft import resolve
from teacher_cache.select.kinds import asked_targets
from teacher_cache.tasks.base import RowContext, TeacherTask
from teacher_cache.tasks.causal import CausalTask
from teacher_cache.tasks.table import TEACHER_TASKS, task_for
from tests.conftest import Capture

ALWAYS = ["row_ids", "num_tokens", "num_positions", "input_ids"]
TARGETS, REFERENCES = ["label_logprob", "entropy"], ["reference_bytes", "reference"]
SEGMENTS = ["num_segments", "segments"]


def test_every_task_is_known_in_stage_one_and_has_a_head():
    assert TEACHER_TASKS.keys() == TASKS.keys()
    assert {task.name for task in TEACHER_TASKS.values()} == TASKS.keys()
    assert {task.head for task in TEACHER_TASKS.values()} == HEADS.keys()


@pytest.mark.parametrize(
    ("name", "problem_type", "roles", "expected"),
    [
        ("causal-lm", "single_label", ["text"], [*ALWAYS, *TARGETS]),
        ("causal-lm", "single_label", ["messages"], [*ALWAYS, "positions", *TARGETS]),
        ("masked-lm", "single_label", ["text"], [*ALWAYS, "positions", "labels", *TARGETS]),
        (
            "seq2seq-lm",
            "single_label",
            ["source", "target"],
            [*ALWAYS, *SEGMENTS, "positions", *TARGETS, *REFERENCES],
        ),
        (
            "token-classification",
            "single_label",
            ["tokens", "tags"],
            [*ALWAYS, "positions", "labels", *TARGETS],
        ),
        (
            "sequence-classification",
            "single_label",
            ["text", "text_pair", "label"],
            [*ALWAYS, "token_type_ids", "positions", "labels", *TARGETS],
        ),
        (
            "sequence-classification",
            "multi_label",
            ["text", "label"],
            [*ALWAYS, "labels", *TARGETS],
        ),
        (
            "question-answering",
            "single_label",
            ["question", "context", "answers"],
            [
                *ALWAYS,
                "token_type_ids",
                *SEGMENTS,
                "positions",
                "labels",
                *TARGETS,
                *REFERENCES,
            ],
        ),
    ],
)
def test_the_columns_of_a_task(name, problem_type, roles, expected, corpus_file, tokenizer_dir):
    config = CaptureConfig(
        out=Path("unused"), corpus=str(corpus_file), tokenizer=str(tokenizer_dir), targets="none"
    )
    preprocessing = resolve(config).preprocessing
    column_of = {role: role for role in roles}
    task = task_for(name, problem_type)
    given = {"labelled": task.labelled(column_of), "distributions": True}
    assert sorted(task.columns(preprocessing, column_of, **given)) == sorted(expected)


def test_a_regression_has_numbers_and_no_probabilities(corpus_file, tokenizer_dir):
    config = CaptureConfig(
        out=Path("unused"), corpus=str(corpus_file), tokenizer=str(tokenizer_dir), targets="none"
    )
    preprocessing = resolve(config).preprocessing
    task = task_for("sequence-classification", "regression")
    columns = task.columns(preprocessing, {"label": "x"}, labelled=True, distributions=False)
    assert columns == [*ALWAYS, "label_values"]


@pytest.mark.parametrize(
    ("name", "problem_type", "classes", "kind"),
    [
        ("causal-lm", "single_label", 30_000, "sample"),
        ("causal-lm", "single_label", 200, "dense"),
        ("question-answering", "single_label", 384, "dense"),
        ("token-classification", "single_label", 300, "dense"),
        ("sequence-classification", "multi_label", 2, "dense"),
        ("sequence-classification", "regression", 1, "values"),
        ("feature-extraction", "single_label", 30_000, "none"),
    ],
)
def test_what_a_task_keeps_where_nothing_is_asked_for(name, problem_type, classes, kind):
    config = CaptureConfig(out=Path("unused"), corpus="c", teacher="t", task=name)
    assert asked_targets(config, task_for(name, problem_type), classes).kind == kind


class Backwards(CausalTask):
    """Texts are predicted from their end to their beginning."""

    def build_rows(self, documents, context: RowContext, counters: Counter[str]) -> Iterator:
        for row in super().build_rows(documents, context, counters):
            yield replace(row, input_ids=row.input_ids[::-1].copy())


def test_a_task_of_one_s_own_is_a_class_and_a_line_of_the_table(
    capture: Capture, monkeypatch: pytest.MonkeyPatch
):
    forwards = open_cache(capture(limit_documents=20))
    monkeypatch.setitem(TEACHER_TASKS, "causal-lm", Backwards("causal-lm"))
    backwards = open_cache(capture(limit_documents=20))
    assert len(backwards) == len(forwards) > 0
    for row, other in zip(backwards, forwards, strict=True):
        assert row.input_ids.tolist() == other.input_ids.tolist()[::-1]


def test_a_task_that_cannot_be_written_for_says_so():
    task: TeacherTask = task_for("masked-lm")
    with pytest.raises(Exception, match="--generate is not there for --task masked-lm"):
        task.sources([], None, None, Counter())
