"""Rows without labels: what the teacher says of them is cached as ever, and students learn from it.

Each kind of label space is captured with and without its labels; all else must be equal.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from safetensors.torch import load_file
from transformers import BertForTokenClassification

from shared.cache import Cache, open_cache
from shared.errors import CacheMismatch, ConfigError, CorpusError
from shared.format.limits import problems
from student_train.config import EvaluateConfig, ExportConfig, TrainConfig
from student_train.data.cache_set import CacheSet
from student_train.evaluate.evaluate import run as evaluate
from student_train.export.export import run as export
from student_train.loss.attachment import attach
from student_train.loss.objective import Objective
from student_train.loss.spec import LossSpec
from student_train.run.run import run as train
from student_train.student.build import build_student
from student_train.tasks.table import task_of
from teacher_cache.config import CheckConfig, InspectConfig, PlanConfig
from teacher_cache.tools.check.check import check
from teacher_cache.tools.inspect import inspect
from teacher_cache.tools.pages import write_plan
from teacher_cache.tools.plan import estimate
from teacher_cache.tools.report import inspect_text
from tests import plain_reader
from tests.conftest import WORDS
from tests.output_caches import HF, SCORES, TOPICS, bert, capture, make_tokenizer, save_teacher
from tests.student_train.loss.test_attachment import batches, sequences

TAGS = ("O", "B-thing", "I-thing")
KINDS = ("single_label", "multi_label", "regression", "tags")
NAMES = {"single_label": TOPICS, "multi_label": TOPICS, "regression": SCORES, "tags": TAGS}


def rows_of(kind: str) -> list[dict[str, Any]]:
    rng = np.random.default_rng(3)
    rows: list[dict[str, Any]] = []
    for index in range(50):
        picks = rng.integers(0, len(WORDS), 1 + index % 12)
        words = [WORDS[pick] for pick in picks]
        if kind == "tags":
            rows.append({"tokens": words, "tags": [TAGS[pick % 3] for pick in picks]})
            continue
        label = {
            "single_label": TOPICS[picks[0] % 8],
            "multi_label": [name for i, name in enumerate(TOPICS) if (picks % 8 == i).any()],
            "regression": [float(picks.mean()), float(len(picks))],
        }[kind]
        rows.append({"text": " ".join(words), "label": label})
    return rows


def options_of(kind: str) -> dict[str, Any]:
    return {"task": "token-classification"} if kind == "tags" else {"problem_type": kind}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of each kind a teacher, its corpus with and without labels, and a cache of either."""
    folder = tmp_path_factory.mktemp("unlabelled")
    bert((), initializer_range=0.05).save_pretrained(folder / "config")
    for kind in KINDS:
        teacher = folder / f"{kind}-teacher"
        if kind == "tags":
            torch.manual_seed(0)
            BertForTokenClassification(bert(TAGS)).save_pretrained(teacher)
            make_tokenizer().save_pretrained(teacher)
        else:
            problem = HF.get(kind, "single_label_classification")
            save_teacher(teacher, NAMES[kind], problem_type=problem)
        rows = rows_of(kind)
        for name, kept in (("labelled", rows), ("plain", [without_labels(row) for row in rows])):
            file = folder / f"{kind}-{name}.jsonl"
            file.write_text("\n".join(map(json.dumps, kept)) + "\n")
            capture(folder / f"{kind}-{name}", file, teacher=str(teacher), **options_of(kind))
    return folder


def without_labels(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("label", "tags")}


def same_but_for_labels(plain: Cache, labelled: Cache) -> None:
    assert len(plain) == len(labelled) > 0
    for row, other in zip(plain, labelled, strict=True):
        assert torch.equal(row.input_ids, other.input_ids)
        assert torch.equal(row.positions, other.positions)
        assert row.labels.shape == other.labels.shape
        assert not (row.labels >= 0).any()  # negative, or NaN
        assert (other.labels >= 0).all()
        if row.target_values is not None:
            assert torch.equal(row.target_values, other.target_values)
        else:
            assert torch.equal(row.targets.logprobs, other.targets.logprobs)


@pytest.mark.parametrize("kind", KINDS)
def test_without_labels_the_teacher_says_the_same(kind, folder):
    plain, labelled = (open_cache(folder / f"{kind}-{name}") for name in ("plain", "labelled"))
    assert (plain.manifest.labelled, labelled.manifest.labelled) == (False, True)
    assert not {"labels", "label_values", "label_logprob"} & set(plain.manifest.columns)
    assert plain.manifest.labels == labelled.manifest.labels == NAMES[kind]  # the teacher's
    same_but_for_labels(plain, labelled)


@pytest.mark.parametrize("kind", KINDS)
def test_labels_that_are_there_are_not_read(kind, folder, tmp_path):
    """Also where they are of another set, which the teacher's classes could not name."""
    rows = [row | {"label": "of another set"} for row in rows_of(kind) if "text" in row]
    rows = rows or [row | {"tags": ["X"] * len(row["tokens"])} for row in rows_of(kind)]
    file = tmp_path / "other.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    options = {"teacher": str(folder / f"{kind}-teacher"), **options_of(kind)}
    if kind != "regression":
        with pytest.raises(CorpusError):
            capture(tmp_path / "c", file, **options)
    cache = capture(tmp_path / "d", file, unlabelled=True, **options)
    same_but_for_labels(cache, open_cache(folder / f"{kind}-labelled"))


def test_a_column_file_without_its_tags(folder, tmp_path):
    lines = [
        "".join(f"{word}\tX\n" for word in row["tokens"])
        for row in rows_of("tags")
        if row["tokens"]
    ]
    (tmp_path / "words.conll").write_text("\n".join(lines))
    options = {"teacher": str(folder / "tags-teacher"), "task": "token-classification"}
    cache = capture(tmp_path / "c", tmp_path / "words.conll", unlabelled=True, **options)
    same_but_for_labels(cache, open_cache(folder / "tags-labelled"))


def test_a_column_that_nobody_took_for_labels_is_named(folder, tmp_path, caplog):
    rows = [{"text": row["text"], "topic": row["label"]} for row in rows_of("single_label")]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    teacher = str(folder / "single_label-teacher")
    cache = capture(tmp_path / "c", tmp_path / "c.jsonl", teacher=teacher)
    assert not cache.manifest.labelled
    assert "no column of labels" in caplog.text
    assert "--columns label=topic" in caplog.text
    columns = ("label=topic",)
    assert capture(
        tmp_path / "d", tmp_path / "c.jsonl", teacher=teacher, columns=columns
    ).manifest.labelled


@pytest.mark.parametrize("tokens", ["the way", ["the", None], [1, 2]])
def test_words_that_are_none_are_refused(tokens, folder, tmp_path):
    """A text would be cut into its letters: without tags nothing says how many words there are."""
    (tmp_path / "c.jsonl").write_text(json.dumps({"tokens": tokens}) + "\n")
    options = {"teacher": str(folder / "tags-teacher"), "task": "token-classification"}
    with pytest.raises(CorpusError, match=r"document 0 has .* where a list of words is expected"):
        capture(tmp_path / "d", tmp_path / "c.jsonl", unlabelled=True, **options)


def test_a_teacher_without_names_has_those_of_the_first_cache(folder, tmp_path):
    """The corpus gave them there, and this one has none; other names would not train together."""
    teacher = save_teacher(tmp_path / "t", tuple(f"LABEL_{i}" for i in range(8)))
    features = {"text": Value("string"), "label": ClassLabel(names=list(TOPICS))}
    rows = [row | {"label": TOPICS.index(row["label"])} for row in rows_of("single_label")]
    named = Dataset.from_list(rows, features=Features(features))
    named.to_parquet(tmp_path / "c.parquet")
    options = {"teacher": teacher, "unlabelled": True}
    first = capture(tmp_path / "a", tmp_path / "c.parquet", teacher=teacher)
    like = {"max_length": 1024}  # the default: with --like it is not read
    more = capture(tmp_path / "b", tmp_path / "c.parquet", like=tmp_path / "a", **options, **like)
    assert first.manifest.labels == more.manifest.labels == TOPICS
    CacheSet([first, more])
    alone = capture(tmp_path / "d", tmp_path / "c.parquet", **options)
    assert alone.manifest.labels[0] == "LABEL_0"
    with pytest.raises(CacheMismatch, match=r"--like .*labels: the cache has .*'LABEL_0'"):
        capture(
            tmp_path / "e", tmp_path / "c.parquet", teacher=teacher, like=tmp_path / "d", **like
        )


def test_the_page_of_a_plan_has_no_chart_of_errors_that_are_none(folder, tmp_path):
    """Of few classes every one is kept."""
    options = {"teacher": str(folder / "tags-teacher"), "task": "token-classification"}
    corpus, page = folder / "tags-plain.jsonl", tmp_path / "plan.html"
    config = PlanConfig(
        corpus=str(corpus), out=tmp_path / "c", calibrate=True, html=page, device="cpu", **options
    )
    write_plan(estimate(config), page)
    text = page.read_text()
    assert "Entropy of the teacher" in text
    assert "Gradient error, student" not in text


def test_without_labels_and_teacher_nothing_is_left(folder, tmp_path):
    plain, tokenizer = folder / "tags-plain.jsonl", str(folder / "tags-teacher")
    options = {"targets": "none", "tokenizer": tokenizer, "task": "token-classification"}
    with pytest.raises(CorpusError, match="tokens and tags"):
        capture(tmp_path / "c", plain, **options)
    with pytest.raises(ConfigError, match="nothing would be left to learn from"):
        capture(tmp_path / "c", plain, unlabelled=True, **options)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_checked_and_shown_like_any_other(kind, folder):
    path, teacher = folder / f"{kind}-plain", str(folder / f"{kind}-teacher")
    assert check(CheckConfig(cache=path, teacher=teacher, device="cpu")).sound
    numbers = inspect(InspectConfig(cache=path, rows=1))
    assert numbers["teacher_loss"] is None
    assert numbers["teacher_mse"] is None
    text = inspect_text(numbers)
    assert "nan" not in text.lower()
    assert "no hard labels" in text
    assert "not known" in text
    assert any(name in text for name in NAMES[kind])


def test_a_job_goes_on_only_with_or_only_without_labels(folder, tmp_path):
    options = {"teacher": str(folder / "single_label-teacher")}
    capture(tmp_path / "c", folder / "single_label-labelled.jsonl", **options)
    with pytest.raises(CacheMismatch, match="labelled"):
        capture(tmp_path / "c", folder / "single_label-labelled.jsonl", unlabelled=True, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labelled": True}, "labels is missing"),
        ({"more": "labels"}, "found labels, but labelled is false"),
        ({"more": "label_logprob"}, "found label_logprob, but labelled is false"),
        ({"task": "causal-lm"}, "found false, but causal-lm"),
    ],
)
def test_a_manifest_that_does_not_hold_together_is_refused(folder, changes, message):
    manifest = open_cache(folder / "single_label-plain").manifest
    assert not list(problems(manifest))
    if "more" in changes:
        changes = {"columns": (*manifest.columns, changes["more"])}
    assert message in "; ".join(problems(replace(manifest, **changes)))


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_of_the_format_is_enough_to_read_them(kind, folder):
    cache = open_cache(folder / f"{kind}-plain")
    for found, row in zip(plain_reader.read_cache(cache.path), cache, strict=True):
        assert found["positions"].tolist() == row.positions.tolist()
        np.testing.assert_array_equal(found["labels"], row.labels)


# ---- students


def objective_of(cache: Any, **weights: float) -> Objective:
    manifest = cache.manifest
    return Objective(
        spec=LossSpec(),
        num_classes=manifest.targets.num_classes,
        target_kind=manifest.targets.kind,
        outputs=task_of(manifest).outputs,
        **weights,
    )


def whole_step(
    folder: Path, labelled: Cache, source: Any, soft: float, hard: float, **cut: int
) -> dict[str, torch.Tensor]:
    """Loss and gradient of one step over all rows, cut into micro-batches of one or several ranks.

    Both are summed over the micro-batches; `hard` is the sum of the hard losses.
    """
    student = build_student(str(folder / "config"), labelled, seed=1).eval()
    objective = objective_of(labelled, soft_weight=soft, hard_weight=hard)
    attachment = attach(student, objective)
    sums = {"loss": torch.zeros(()), "hard": torch.zeros(())}
    for rank in range(cut.get("world_size", 1)):
        options = {"rank": rank, **cut}
        some = batches(source, 100_000, **options)
        assert len(some) == cut.get("accumulation", 1)
        for batch in some:
            output = student(**batch)
            output["loss"].backward()
            sums = {name: total + output[name].detach() for name, total in sums.items()}
    attachment.detach()
    grads = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
    return sums | {"gradient": torch.cat(grads)}


@pytest.mark.parametrize("times", [1, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_each_term_is_a_mean_over_the_positions_that_have_it(kind, times, folder):
    """However much unlabelled text comes with them, labels weigh what --hard-weight says."""
    plain, labelled = (open_cache(folder / f"{kind}-{name}") for name in ("plain", "labelled"))
    alone = whole_step(folder, labelled, plain, 0.7, 0.4)
    assert alone["hard"] == 0
    soft = whole_step(folder, labelled, labelled, 0.7, 0.0)
    hard = whole_step(folder, labelled, labelled, 0.0, 0.4)
    torch.testing.assert_close(alone["loss"], soft["loss"])
    torch.testing.assert_close(alone["gradient"], soft["gradient"], rtol=1e-4, atol=1e-6)
    both = whole_step(folder, labelled, CacheSet([labelled, *[plain] * times]), 0.7, 0.4)
    torch.testing.assert_close(both["loss"], soft["loss"] + hard["loss"])
    expected = soft["gradient"] + hard["gradient"]
    torch.testing.assert_close(both["gradient"], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("accumulation", "world_size"), [(2, 1), (4, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_rows_with_and_without_labels_may_be_cut_anyhow(
    kind, accumulation, world_size, folder
):
    """In the natural order some micro-batches have labels at every position, others at none."""
    plain, labelled = (open_cache(folder / f"{kind}-{name}") for name in ("plain", "labelled"))
    source = CacheSet([labelled, plain, plain])
    cut = {"accumulation": accumulation, "world_size": world_size}
    whole = whole_step(folder, labelled, source, 0.7, 0.4)
    found = whole_step(folder, labelled, source, 0.7, 0.4, **cut)
    # Sums of float32 in another order.
    largest = float(whole["gradient"].abs().max())
    torch.testing.assert_close(found["loss"], whole["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["gradient"], whole["gradient"], rtol=0, atol=1e-5 * largest)


@pytest.mark.parametrize("kind", KINDS)
def test_the_log_gives_the_mean_over_what_has_labels(kind, folder, tmp_path):
    """Of runs that accumulate over 1, 2 and 4 micro-batches, which end at the same weights too."""
    plain, labelled = folder / f"{kind}-plain", folder / f"{kind}-labelled"
    source = CacheSet([open_cache(labelled), open_cache(plain), open_cache(plain)])
    hard = whole_step(folder, open_cache(labelled), open_cache(labelled), 0.0, 1.0)["loss"]
    runs = []
    for accumulation in (1, 2, 4):
        out = tmp_path / str(accumulation)
        tokens = int(source.row_tokens.sum())
        train(
            TrainConfig(
                cache=(labelled, plain, plain),
                student=str(folder / "config"),
                out=out,
                seed=1,
                max_steps=1,
                batch_tokens=tokens,
                micro_batch_tokens=-(-tokens // accumulation),
                learning_rate=0.1,
                dropout=0.0,
                device="cpu",
                settings=("optim=sgd",),
            )
        )
        lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        (step,) = (line for line in lines if line["kind"] == "train")
        assert step["positions"] == source.row_positions.sum()
        assert step["hard"] == pytest.approx(float(hard), rel=1e-5)
        assert step["loss"] == pytest.approx(step["soft"] + 0.5 * step["hard"], rel=1e-5)
        runs.append(load_file(out / "model.safetensors"))
    for other in runs[1:]:
        for name, weight in runs[0].items():
            torch.testing.assert_close(other[name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_trains_on_them_as_they_are(kind, folder, tmp_path):
    """The usual hard weight finds nothing to do; held-out rows have labels."""
    options: dict[str, Any] = {
        "student": str(folder / "config"),
        "max_steps": 4,
        "batch_tokens": 100,
        "device": "cpu",
        "validation_cache": folder / f"{kind}-labelled",
    }
    plain, labelled = folder / f"{kind}-plain", folder / f"{kind}-labelled"
    alone = train(TrainConfig(cache=(plain,), out=tmp_path / "a", **options))
    assert alone["validation"]["loss"] > 0
    same = train(TrainConfig(cache=(labelled,), out=tmp_path / "b", hard_weight=0.0, **options))
    for name, value in same["validation"].items():
        assert alone["validation"][name] == (
            value if isinstance(value, str) else pytest.approx(value, rel=1e-4)
        )
    train(TrainConfig(cache=(labelled, plain), out=tmp_path / "c", **options))
    report = export(
        ExportConfig(
            student=tmp_path / "a", out=tmp_path / "e", cache=plain, format=("safetensors",)
        )
    )
    assert report["files"][0]["check"]["student"]["metric"] is None


def test_pairs_are_read_beside_texts_in_any_order(folder, tmp_path):
    """Of a text alone all tokens are of the first one."""
    rows = [without_labels(row) | {"text_pair": "the way"} for row in rows_of("single_label")]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    teacher = str(folder / "single_label-teacher")
    pairs = capture(tmp_path / "c", tmp_path / "p.jsonl", teacher=teacher)
    texts = open_cache(folder / "single_label-labelled")
    expected = sorted(sequences(pairs) + sequences(texts))
    assert any(1 in types for _, types in expected)
    for caches in ([pairs, texts], [texts, pairs]):
        assert sequences(CacheSet(caches)) == expected


def test_what_needs_labels_is_refused(folder, tmp_path):
    plain, labelled = folder / "single_label-plain", folder / "single_label-labelled"
    options: dict[str, Any] = {
        "student": str(folder / "config"),
        "out": tmp_path / "run",
        "max_steps": 2,
        "device": "cpu",
    }
    with pytest.raises(ConfigError, match=r"--hard-weight 0.7: no row of these caches has"):
        train(TrainConfig(cache=(plain,), hard_weight=0.7, **options))
    with pytest.raises(ConfigError, match=r"--label-smoothing 0.1: no row of these caches has"):
        train(TrainConfig(cache=(plain,), label_smoothing=0.1, **options))
    with pytest.raises(ConfigError, match=r"--soft-weight 0: no row of these caches has"):
        train(TrainConfig(cache=(plain,), soft_weight=0.0, **options))
    with pytest.raises(CacheMismatch, match=r"whether rows have hard labels is True in the first"):
        train(TrainConfig(cache=(labelled, plain), ensemble=True, **options))
    with pytest.raises(CacheMismatch, match=r"--soft-weight 0: .*plain has no hard labels"):
        train(TrainConfig(cache=(labelled, plain), soft_weight=0.0, hard_weight=1.0, **options))
    with pytest.raises(CacheMismatch, match="no hard labels, and every metric needs them"):
        train(TrainConfig(cache=(labelled,), validation_cache=plain, **options))
    train(TrainConfig(cache=(plain,), **options))
    with pytest.raises(CacheMismatch, match="no hard labels, and every metric needs them"):
        evaluate(EvaluateConfig(student=str(tmp_path / "run"), cache=plain))
