"""Students of rows with several labels, or with numbers: loss, runs, metrics, refusals."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForSequenceClassification, BertModel, pipeline

from shared.cache import open_cache
from shared.errors import CacheMismatch, ConfigError
from student_train.cli import _evaluation_text
from student_train.compare.page import write_html
from student_train.compare.report import compare
from student_train.compare.table import table
from student_train.config import CompareConfig, EvaluateConfig, ExportConfig, TrainConfig
from student_train.data.cache_set import CacheSet
from student_train.data.ensemble import Ensemble
from student_train.evaluate.evaluate import evaluate
from student_train.evaluate.evaluate import run as run_evaluate
from student_train.export.export import run as run_export
from student_train.export.table import table as export_table
from student_train.loss.attachment import attach
from student_train.loss.objective import Objective
from student_train.loss.spec import LossSpec
from student_train.run.run import run
from student_train.student.build import build_student
from student_train.tasks.table import task_of
from tests.output_caches import (
    HF,
    NAMES,
    SCORES,
    TOPICS,
    bert,
    capture,
    live_logits,
    make_tokenizer,
    save_teacher,
    write_corpus,
)
from tests.student_train.loss.test_attachment import batches

PROBLEMS = ("multi_label", "regression")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Of each problem type a teacher, a cache of it, one held out, and one of hard labels."""
    folder = tmp_path_factory.mktemp("outputs")
    make_tokenizer().save_pretrained(folder / "tokenizer")
    bert((), initializer_range=0.05).save_pretrained(folder / "config")
    for problem in PROBLEMS:
        teacher = save_teacher(
            folder / f"{problem}-teacher", NAMES[problem], problem_type=HF[problem]
        )
        for seed, name in enumerate((problem, f"{problem}-held-out")):
            write_corpus(folder / f"{name}.jsonl", problem, pairs=True, seed=seed)
            capture(folder / name, folder / f"{name}.jsonl", teacher=teacher)
        capture(
            folder / f"{problem}-hard",
            folder / f"{problem}.jsonl",
            targets="none",
            tokenizer=str(folder / "tokenizer"),
            labels=None,
        )
    return folder


@pytest.fixture
def train(folder, tmp_path) -> Callable[..., dict[str, Any]]:
    def make(problem: str, **options: Any) -> dict[str, Any]:
        defaults: dict[str, Any] = {
            "student": str(folder / "config"),
            "cache": (folder / problem,),
            "out": tmp_path / "run",
            "max_steps": 6,
            "batch_tokens": 200,
            "learning_rate": 3e-3,
            "log_every": 2,
            "device": "cpu",
        }
        return run(TrainConfig(**defaults | options))

    return make


def objective(cache: Any, **changes: Any) -> Objective:
    options: dict[str, Any] = {
        "spec": LossSpec(),
        "num_classes": cache.manifest.targets.num_classes,
        "target_kind": cache.manifest.targets.kind,
        "outputs": task_of(cache.manifest).outputs,
        "soft_weight": 0.7,
        "hard_weight": 0.4,
    }
    return Objective(**options | changes)


def dense_reference(problem: str, logits_BC, teacher_BC, labels_BC, temperature: float):
    """Per-class binary KL and binary cross-entropy, or squared errors; means over all cells."""
    if problem == "regression":
        soft, hard = F.mse_loss(logits_BC, teacher_BC), F.mse_loss(logits_BC, labels_BC)
        return 0.7 * soft + 0.4 * hard
    p, z = (teacher_BC / temperature).sigmoid(), logits_BC / temperature
    q = z.sigmoid()
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    hard = F.binary_cross_entropy_with_logits(logits_BC, labels_BC)
    return 0.7 * temperature**2 * kl.mean() + 0.4 * hard


@pytest.mark.parametrize(
    ("problem", "temperature"), [("multi_label", 1.0), ("multi_label", 2.5), ("regression", 1.0)]
)
def test_loss_and_gradient_equal_a_dense_reference(problem, temperature, folder):
    cache = open_cache(folder / problem)
    teacher = str(folder / f"{problem}-teacher")
    torch.manual_seed(5)
    student = AutoModelForSequenceClassification.from_config(bert(NAMES[problem])).eval()
    batch = batches(cache, 150, temperature=temperature)[1]
    attachment = attach(student, objective(cache, spec=LossSpec(temperature=temperature)))
    output = student(**batch)
    output["loss"].backward()
    found = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    attachment.detach()
    student.zero_grad()

    of_row = dict(zip([row.row_id for row in cache], live_logits(teacher, cache), strict=True))
    rows = {row.row_id: row for row in cache}
    chosen = batch["row_ids"].tolist()
    logits = torch.cat(
        [
            student(
                rows[i].input_ids[None], token_type_ids=rows[i].token_type_ids[None]
            ).logits.double()
            for i in chosen
        ]
    )
    teacher_BC = torch.stack([of_row[i] for i in chosen]).double()
    labels_BC = torch.stack([rows[i].labels.double() for i in chosen])
    loss = dense_reference(problem, logits, teacher_BC, labels_BC, temperature)
    loss.backward()
    assert len(chosen) > 5
    # Log-probabilities are float16, numbers exact; some gradients are sums that cancel to 0.
    tolerance = 1e-3 if problem == "multi_label" else 1e-5
    torch.testing.assert_close(output["loss"].double(), loss.detach(), rtol=tolerance, atol=0)
    for name, parameter in student.named_parameters():
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(
            found[name], parameter.grad, rtol=0, atol=2 * tolerance * largest + 1e-6
        )


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_micro_batch_without_rows_has_loss_0(problem, folder):
    cache = open_cache(folder / problem)
    student = build_student(str(folder / "config"), cache, seed=0)
    attach(student, objective(cache))
    found = batches(cache, 10**6, accumulation=2, world_size=40, rank=39)
    empty = [batch for batch in found if not len(batch["labels"])]
    assert empty
    output = student(**empty[0])
    output["loss"].backward()
    assert float(output["loss"]) == 0
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_teacher_as_its_own_student_agrees_everywhere(problem, folder):
    cache = open_cache(folder / f"{problem}-held-out")
    teacher = str(folder / f"{problem}-teacher")
    student = AutoModelForSequenceClassification.from_pretrained(teacher)
    numbers = evaluate(student, cache, batch_tokens=300)
    logits = live_logits(teacher, cache).double().numpy()
    labels = np.stack([row.labels.numpy() for row in cache])
    metric = numbers["metric"]
    assert numbers[metric] == pytest.approx(numbers[f"teacher_{metric}"], abs=1e-6)
    assert numbers[f"{metric}_low"] <= numbers[metric] <= numbers[f"{metric}_high"]
    assert numbers["loss"] == pytest.approx(numbers["teacher_loss"], rel=2e-4)
    if problem == "regression":
        assert metric == "pearson"
        expected = np.corrcoef(logits[:, 0], labels[:, 0])[0, 1]
        assert numbers["pearson"] == pytest.approx(expected, abs=1e-5)
        assert numbers["mse_to_teacher"] < 1e-9
        assert numbers["mse"] == pytest.approx(np.square(logits - labels).mean(), rel=1e-5)
        assert not {"kl", "agreement", "ece", "accuracy", "student_entropy"} & numbers.keys()
    else:
        assert metric == "micro_f1"
        yes = logits > 0
        both = (yes & (labels == 1)).sum()
        assert numbers["micro_f1"] == pytest.approx(2 * both / (yes.sum() + labels.sum()))
        assert numbers["subset_accuracy"] == np.mean((yes == labels).all(axis=1))
        assert numbers["kl"] < 1e-6
        assert numbers["agreement"] == 1.0
    text = _evaluation_text(numbers)
    assert f"teacher_{metric}" in text
    assert "95 % of resampled rows" in text


@pytest.mark.parametrize("problem", PROBLEMS)
def test_from_hard_labels_to_a_student_that_serves(problem, train, folder, tmp_path):
    """A teacher of hard labels, a cache of it, a student of that, evaluated and compared."""
    train(
        problem,
        cache=(folder / f"{problem}-hard",),
        out=tmp_path / "teacher",
        soft_weight=0.0,
        hard_weight=1.0,
    )
    saved = json.loads((tmp_path / "teacher" / "config.json").read_text())
    assert saved["problem_type"] == HF[problem]
    for name in (problem, f"{problem}-held-out"):
        capture(tmp_path / name, folder / f"{name}.jsonl", teacher=str(tmp_path / "teacher"))
    result = train(
        problem,
        cache=(tmp_path / problem,),
        validation_cache=tmp_path / f"{problem}-held-out",
        eval_every=3,
        early_stopping_patience=5,
        early_stopping_metric="metric",
    )
    numbers = result["validation"]
    again = run_evaluate(
        EvaluateConfig(
            student=str(tmp_path / "run"), cache=tmp_path / f"{problem}-held-out", device="cpu"
        )
    )
    assert again["loss"] == pytest.approx(numbers["loss"], rel=1e-5)
    comparison = compare(CompareConfig(runs=(tmp_path / "run",)))
    shown = table(comparison)
    assert {"multi_label": "micro F1", "regression": "Pearson"}[problem] in shown
    assert ("mean squared error over" in shown) == (problem == "regression")
    assert ("100.0%" in shown) == (problem == "multi_label")  # of the teacher with itself
    write_html(comparison, tmp_path / "c.html")
    serve = pipeline("text-classification", model=str(tmp_path / "run"), device="cpu", top_k=None)
    text = "the cat sat"
    answers = {answer["label"]: answer["score"] for answer in serve([text])[0]}
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad():
        logits = model(**make_tokenizer()(text, return_tensors="pt")).logits[0]
    expected = logits.sigmoid() if problem == "multi_label" else logits
    named = {model.config.id2label[i]: value for i, value in enumerate(expected.tolist())}
    assert answers == pytest.approx(named, abs=1e-5)


def test_training_learns_the_labels(train, folder, tmp_path):
    """Of rows it has seen a student says what they are, so positions and labels belong together."""
    result = train(
        "multi_label",
        cache=(folder / "multi_label-hard",),
        validation_cache=folder / "multi_label-hard",
        soft_weight=0.0,
        hard_weight=1.0,
        max_steps=250,
        learning_rate=5e-3,
        batch_tokens=300,
    )
    labels = np.stack([row.labels.numpy() for row in open_cache(folder / "multi_label-hard")])
    assert 2 * labels.sum() / (labels.size + labels.sum()) < 0.75  # yes to everything
    assert result["validation"]["micro_f1"] > 0.85


@pytest.mark.parametrize("problem", PROBLEMS)
def test_adapters_on_a_pretrained_body_are_saved_with_their_head(problem, train, folder, tmp_path):
    torch.manual_seed(6)
    BertModel(bert(())).save_pretrained(tmp_path / "body")
    held_out = folder / f"{problem}-held-out"
    result = train(problem, student=str(tmp_path / "body"), lora_rank=2, validation_cache=held_out)
    cache = open_cache(held_out)
    reloaded = build_student(str(tmp_path / "run"), cache, seed=0)
    assert reloaded.config.problem_type == HF[problem]
    assert reloaded.config.num_labels == len(NAMES[problem])
    again = evaluate(reloaded, cache, batch_tokens=2000)
    assert again["loss"] == pytest.approx(result["validation"]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 2.0}, "--temperature 2.0: .* is of a regression"),
        ({"soft_loss": "reverse-kl"}, "--soft-loss reverse-kl: .* squared error alone"),
        ({"soft_loss": "jsd"}, "--soft-loss jsd: .* is of a regression"),
        ({"tail": "label"}, "--tail label: .* is of a regression"),
        ({"label_smoothing": 0.1}, "--label-smoothing 0.1: .* is of a regression"),
    ],
)
def test_what_is_of_probabilities_is_refused(options, message, train):
    with pytest.raises(CacheMismatch, match=message):
        train("regression", **options)


def test_other_problem_types_are_refused(train, folder):
    single = str(folder / "multi_label-teacher")
    with pytest.raises(CacheMismatch, match="its head is for multi_label_classification, but"):
        train("regression", student=single)
    with pytest.raises(CacheMismatch, match="its problem type is regression, but that of"):
        train("multi_label", validation_cache=folder / "regression-held-out")
    with pytest.raises(CacheMismatch, match=r"--early-stopping-metric kl: .* holds numbers"):
        train(
            "regression",
            validation_cache=folder / "regression-held-out",
            eval_every=2,
            early_stopping_patience=1,
            early_stopping_metric="kl",
        )
    one, other = (open_cache(folder / problem) for problem in PROBLEMS)
    with pytest.raises(CacheMismatch, match="the kind of targets is 'dense'"):
        CacheSet([one, other])
    with pytest.raises(CacheMismatch, match="holds hard labels only"):
        train("regression", cache=(folder / "regression-hard",))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_two_teachers_are_mixed(problem, folder, tmp_path):
    second = save_teacher(
        tmp_path / "t", NAMES[problem], problem_type=HF[problem], initializer_range=0.6
    )
    capture(tmp_path / "c", folder / f"{problem}.jsonl", teacher=second, shard_tokens=10**6)
    caches = [open_cache(folder / problem), open_cache(tmp_path / "c")]
    mixed = Ensemble(caches, (1.0, 3.0))
    one, other = ({row.row_id: row for row in cache} for cache in caches)
    seen = 0
    for number in range(len(mixed.block_rows)):
        block = mixed.read_block(number)
        ids = block.row_ids.tolist()
        if problem == "regression":
            found = block.target_values
            pairs = [(one[i].target_values, other[i].target_values) for i in ids]
        else:
            found = np.exp(block.target.logprobs[:, 1])
            pairs = [
                (one[i].targets.logprobs[:, 1].exp(), other[i].targets.logprobs[:, 1].exp())
                for i in ids
            ]
        expected = torch.cat([0.25 * a + 0.75 * b for a, b in pairs]).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
        seen += len(ids)
    assert seen == len(caches[0])


def test_names(folder):
    assert open_cache(folder / "multi_label-hard").manifest.labels == tuple(sorted(TOPICS))
    hard = open_cache(folder / "regression-hard")
    assert hard.manifest.labels == ("LABEL_0",)
    assert SCORES[:1] == open_cache(folder / "regression").manifest.labels
    assert hard.manifest.targets.kind == "none"


def test_details_of_several_labels_are_those_of_rows_alone(folder, tmp_path):
    """Counts of each label, and the rows of the highest loss, against plain torch."""
    cache = open_cache(folder / "multi_label")
    student = save_teacher(tmp_path / "student", TOPICS, problem_type=HF["multi_label"])
    found = run_evaluate(
        EvaluateConfig(
            student=student,
            cache=cache.path,
            device="cpu",
            batch_tokens=100,
            html=tmp_path / "page.html",
            worst=5,
        )
    )
    logits_RC = live_logits(student, cache).double()
    labels_RC = torch.stack([row.labels for row in cache]).double()
    said_RC, there_RC = (logits_RC > 0).numpy(), (labels_RC == 1).numpy()
    classes = {each["name"]: each for each in found["details"]["classes"]}
    for number, name in enumerate(TOPICS):
        both = (said_RC & there_RC)[:, number].sum()
        assert classes[name]["support"] == there_RC[:, number].sum()
        assert classes[name]["recall"] == both / there_RC[:, number].sum()
        if said_RC[:, number].any():
            assert classes[name]["precision"] == both / said_RC[:, number].sum()
    assert found["details"]["confusions"] == []
    loss_RC = F.binary_cross_entropy_with_logits(logits_RC, labels_RC, reduction="none").numpy()
    loss_R = loss_RC.mean(axis=1)
    worst = np.argsort(-loss_R, kind="stable")[:5]
    shown = found["details"]["worst"]
    assert [row["row_id"] for row in shown] == [cache[int(r)].row_id for r in worst]
    for row, r in zip(shown, worst, strict=True):
        assert row["loss"] == pytest.approx(loss_R[r], abs=1e-5)
        # The student is the teacher: it says what the teacher says.
        listed = said_RC[r] | there_RC[r]
        listed[loss_RC[r].argmax()] = True
        expected = [
            (f"{name}: {_yes(there_RC[r, i])}", f"{name}: {_yes(said_RC[r, i])}")
            for i, name in enumerate(TOPICS)
            if listed[i]
        ]
        assert [(answer["label"], answer["student"]) for answer in row["answers"]] == expected
        assert all(answer["token"] is None for answer in row["answers"])
    assert f"answered by '{TOPICS[loss_RC[worst[0]].argmax()]}: " in _evaluation_text(found)
    page = (tmp_path / "page.html").read_text()
    assert "micro F1" in page
    assert "rows with every label right" in page
    assert f"{TOPICS[0]}: yes" in page


def _yes(said: bool) -> str:
    return "yes" if said else "no"


def test_details_of_numbers_are_refused(folder, tmp_path):
    for options in ({"html": tmp_path / "page.html"}, {"worst": 3}):
        config = EvaluateConfig(
            student=str(folder / "regression-teacher"), cache=folder / "regression", **options
        )
        with pytest.raises(ConfigError, match=r"is of a regression.*neither sure nor wrong"):
            run_evaluate(config)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("problem", PROBLEMS)
def test_an_export_is_checked_on_all_outputs(problem, train, folder, tmp_path):
    """Its scores are those of evaluate, and every yes or no is a decision of its own."""
    train(problem, validation_cache=folder / f"{problem}-held-out")
    out = tmp_path / "out"
    config = ExportConfig(
        student=tmp_path / "run", out=out, rows=1000, format=("safetensors", "int8")
    )
    found = run_export(config)
    held_out = open_cache(folder / f"{problem}-held-out")
    student = build_student(str(tmp_path / "run"), held_out, seed=0)
    expected = evaluate(student, held_out, batch_tokens=500)
    for each in found["files"]:
        scores, check = each["check"]["student"], each["check"]
        assert scores["metric"] == expected["metric"]
        # Numbers that hardly differ leave their correlation few digits of float32.
        assert scores["value"] == pytest.approx(expected[expected["metric"]], abs=1e-4)
        assert scores["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        outputs = len(NAMES[problem]) * len(held_out)
        if problem == "multi_label":
            assert check["decisions"] == outputs
            assert 0.9 < check["agreement"] <= 1.0
        else:
            assert check["agreement"] is None
    assert ("argmax equal" in export_table(found)) == (problem == "multi_label")
    assert json.loads((out / "config.json").read_text())["problem_type"] == HF[problem]
    card = (out / "README.md").read_text()
    assert ("mean squared error" in card) == (problem == "regression")
    assert ("squared error to the teacher's numbers" in card) == (problem == "regression")
