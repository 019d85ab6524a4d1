"""Students that answer questions: loss, windows joined, heads, refusals, commands end to end."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForQuestionAnswering,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForTokenClassification,
    CLIPConfig,
)

from shared.cache import Cache, open_cache
from shared.errors import CacheMismatch
from student_train.cli import _evaluation_text
from student_train.compare.report import compare
from student_train.compare.table import table
from student_train.config import AdapterSpec, CompareConfig, EvaluateConfig, TrainConfig
from student_train.evaluate.evaluate import evaluate
from student_train.evaluate.evaluate import run as run_evaluate
from student_train.loss.attachment import attach
from student_train.loss.objective import Objective
from student_train.loss.spec import LossSpec
from student_train.metrics.spans import best_of, exact_match, f1
from student_train.run.run import run
from student_train.student.adapters import add_adapters
from student_train.student.build import build_student, load_config
from student_train.student.fit import check_fit
from student_train.tasks.table import task_of
from tests.questions import (
    MAX_LENGTH,
    bert_config,
    capture,
    make_documents,
    make_teacher,
    make_tokenizer,
    write_corpus,
    write_teacher,
)
from tests.student_train.loss.test_attachment import batches

KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "topk": {"targets": "topk", "top_k": 5},
    "adaptive": {"targets": "adaptive", "mean_entries": 4.0},
    "none": {"targets": "none"},
}


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "q.jsonl", make_documents(100))


@pytest.fixture(scope="module")
def caches(tmp_path_factory, teacher_dir, corpus) -> dict[str, Path]:
    """A cache of each kind of targets."""
    folder = tmp_path_factory.mktemp("caches")
    for kind, options in KINDS.items():
        capture(folder / kind, corpus, teacher=str(teacher_dir), **options)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    """A student from scratch that was configured for five labels, which is no head of ours."""
    config = bert_config(num_hidden_layers=1, id2label=dict(enumerate("abcde")))
    config.save_pretrained(tmp_path / "config")
    return tmp_path / "config"


def objective(cache: Cache, **changes: Any) -> Objective:
    options: dict[str, Any] = {
        "spec": LossSpec(),
        "num_classes": cache.manifest.targets.num_classes,
        "target_kind": cache.manifest.targets.kind,
        "outputs": task_of(cache.manifest).outputs,
        "soft_weight": 1.0,
        "hard_weight": 0.5,
    }
    return Objective(**options | changes)


def fresh(seed: int = 3) -> BertForQuestionAnswering:
    torch.manual_seed(seed)
    model = BertForQuestionAnswering(bert_config(initializer_range=0.2)).eval()
    with torch.no_grad():
        model.qa_outputs.weight.mul_(4)
    return model


def allowed_logits(model: Any, row: Any) -> tuple[list[torch.Tensor], list[int]]:
    """Start and end logits of one row alone at token 0 and its context, and which tokens these
    are."""
    output = model(row.input_ids[None], token_type_ids=row.token_type_ids[None])
    before, context = row.segments[:2]
    allowed = [0, *range(before, before + context)]
    return [output.start_logits[0, allowed], output.end_logits[0, allowed]], allowed


@pytest.mark.parametrize("loss", ["forward-kl", "reverse-kl", "jsd", "tvd"])
@pytest.mark.parametrize("temperature", [0.05, 1.0, 2.5, 20.0])
def test_loss_and_gradient_equal_those_of_rows_one_by_one(caches, loss, temperature):
    """The mean of start and end, as in transformers; dense formulas over the allowed tokens."""
    cache, teacher, student = open_cache(caches["dense"]), make_teacher(), fresh()
    batch = batches(cache, 400, temperature=temperature)[0]
    spec = LossSpec(soft_loss=loss, temperature=temperature)
    attachment = attach(student, objective(cache, spec=spec))
    output = student(**batch)
    output["loss"].backward()
    found = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    attachment.detach()
    student.zero_grad()

    of_rows = {row.row_id: row for row in cache}
    total, count = 0.0, 0
    for row_id in batch["row_ids"].tolist():
        row = of_rows[row_id]
        ours, allowed = allowed_logits(student, row)
        with torch.no_grad():
            theirs, _ = allowed_logits(teacher, row)
        for logits, taught, label in zip(ours, theirs, row.labels.tolist(), strict=True):
            logp = (taught.double() / temperature).log_softmax(-1)
            logq = (logits.double() / temperature).log_softmax(-1)
            p, q, mixed = logp.exp(), logq.exp(), (logp.exp() + logq.exp()) / 2
            soft = {
                "forward-kl": (p * (logp - logq)).sum(),
                "reverse-kl": (q * (logq - logp)).sum(),
                "jsd": (p * (logp - mixed.log()) + q * (logq - mixed.log())).nansum() / 2,
                "tvd": (p - q).abs().sum() / 2,
            }[loss] * temperature ** (1 if loss == "tvd" else 2)
            hard = torch.nn.functional.cross_entropy(
                logits.double()[None], torch.tensor([allowed.index(label)])
            )
            total, count = total + soft + 0.5 * hard, count + 1
    reference = total / count
    reference.backward()
    assert count == int(batch["num_positions"]) == 2 * len(batch["row_ids"])
    assert all(gradient.isfinite().all() for gradient in found.values())
    # The teacher's log-probabilities are float16: 2**-11 of numbers up to 10 times 1 / T.
    tolerance = 2e-2 if temperature == 0.05 else 2e-3
    torch.testing.assert_close(
        output["loss"].double(), reference.detach(), rtol=tolerance, atol=1e-6
    )
    if temperature == 0.05:
        return  # a softmax this sharp makes steps of what fp16 rounds
    for name, parameter in student.named_parameters():
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=5e-3 * largest + 1e-6)


def test_the_loss_on_labels_is_that_of_transformers(caches):
    """Which takes all tokens for classes: equal where nothing but the allowed has a logit."""
    cache, student = open_cache(caches["none"]), fresh()
    attachment = attach(student, objective(cache, soft_weight=0.0, hard_weight=1.0))
    batch = batches(cache, 400, targets=False)[1]
    found = float(student(**batch)["loss"].detach())
    attachment.detach()
    total, of_rows = 0.0, {row.row_id: row for row in cache}
    for row_id in batch["row_ids"].tolist():
        row = of_rows[row_id]
        logits, allowed = allowed_logits(student, row)
        both = torch.full((2, len(row.input_ids)), -1e30)
        for place in (0, 1):
            both[place, allowed] = logits[place].detach()
        labels = row.labels[:, None]
        losses = [torch.nn.functional.cross_entropy(both[i][None], labels[i]) for i in (0, 1)]
        total += float(sum(losses)) / 2
    assert found == pytest.approx(total / len(batch["row_ids"]), rel=1e-5)


@pytest.mark.parametrize("kind", ["dense", "topk", "adaptive"])
def test_the_teacher_as_its_own_student_agrees_everywhere(kind, caches):
    cache = open_cache(caches[kind])
    numbers = evaluate(make_teacher(), cache, batch_tokens=900)
    assert numbers["kl" if kind == "dense" else "kl_bucketed"] <= (
        1e-6 if kind == "dense" else 1e-3
    )
    assert numbers["agreement"] >= (1.0 if kind == "dense" else 0.98)  # 7 bits may swap neighbours
    assert numbers["loss"] == pytest.approx(numbers["teacher_loss"], rel=1e-3)
    assert numbers["metric"] == "f1"
    assert numbers["documents"] == 100
    if kind == "dense":
        assert numbers["f1"] == numbers["teacher_f1"]
        assert numbers["exact_match"] == numbers["teacher_exact_match"]
    assert 0 < numbers["f1"] < 1
    assert "perplexity" not in numbers


def answered_by(model: Any, cache: Cache, longest: int) -> dict[int, str]:
    """The answer to every question, by trying every span of every window of its text."""
    tokenizer, documents = make_tokenizer(), make_documents(100)
    best: dict[int, tuple[float, str]] = {}
    none: dict[int, float] = {}
    for row in cache:
        document, (before, context) = row.row_id >> 24, row.segments[:2]
        with torch.no_grad():
            logits, _ = allowed_logits(model, row)
        start, end = (each.double().log_softmax(-1).tolist() for each in logits)
        none[document] = min(none.get(document, 0.0), start[0] + end[0])
        encoded = tokenizer(documents[document]["context"], return_offsets_mapping=True)
        ids = encoded["input_ids"][1:-1]
        offsets = encoded["offset_mapping"][1:-1]
        step = MAX_LENGTH - before - 1 - 6  # windows share 6 tokens
        begin = (row.row_id & 0xFFFFFF) * step
        assert ids[begin : begin + context] == row.input_ids[before : before + context].tolist()
        for s in range(context):
            for e in range(s, min(context, s + longest)):
                score = start[1 + s] + end[1 + e]
                if score > best.get(document, (-torch.inf, ""))[0]:
                    text = documents[document]["context"]
                    text = text[offsets[begin + s][0] : offsets[begin + e][1]]
                    best[document] = score, text
    return {d: "" if none[d] > score else text for d, (score, text) in best.items()}


@pytest.mark.parametrize("longest", [2, 30])
def test_answers_are_the_best_spans_over_all_windows_of_a_document(caches, longest):
    cache, student = open_cache(caches["dense"]), fresh()
    numbers = evaluate(student, cache, batch_tokens=700, max_answer_tokens=longest)
    documents = make_documents(100)
    for model, prefix in ((student, ""), (make_teacher(), "teacher_")):
        answers = answered_by(model, cache, longest)
        golds = [documents[d]["answers"] for d in answers]
        pairs = [
            (said, () if gold is None else gold["text"])
            for said, gold in zip(answers.values(), golds, strict=True)
        ]
        assert len(pairs) == 100
        for name, metric in (("f1", f1), ("exact_match", exact_match)):
            mean = sum(best_of(metric, said, gold) for said, gold in pairs) / 100
            assert numbers[f"{prefix}{name}"] == pytest.approx(mean)


def test_a_micro_batch_without_rows_has_no_loss_and_no_gradient(caches):
    cache, student = open_cache(caches["dense"]), fresh()
    attach(student, objective(cache))
    batch = batches(cache, 1, world_size=2, rank=1)[0]
    assert len(batch["position_index"]) == 0
    output = student(**batch)
    output["loss"].backward()
    assert float(output["loss"].detach()) == 0.0
    assert not any(p.grad.any() for p in student.parameters() if p.grad is not None)


# ---- Commands


def train(cache: Path, student: Path, out: Path, **options: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "student": str(student),
        "cache": (cache,),
        "out": out,
        "batch_tokens": 1000,
        "learning_rate": 5e-3,
        "device": "cpu",
    }
    return run(TrainConfig(**defaults | options))


def test_a_teacher_is_trained_cached_and_distilled(caches, config_dir, corpus, tmp_path):
    """Labels only -> teacher -> its cache -> student, held out from both."""
    gold = {"soft_weight": 0.0, "hard_weight": 1.0, "max_steps": 120}
    train(caches["none"], config_dir, tmp_path / "teacher", **gold)
    held_out = write_corpus(tmp_path / "held.jsonl", make_documents(40, seed=7))
    teacher = {"teacher": str(tmp_path / "teacher")}
    capture(tmp_path / "train", corpus, **teacher)
    capture(tmp_path / "held", held_out, **teacher)
    before = evaluate(fresh(), open_cache(tmp_path / "held"), batch_tokens=2000)
    options = {"validation_cache": tmp_path / "held", "max_steps": 80, "eval_every": 40}
    after = train(tmp_path / "train", config_dir, tmp_path / "run", **options)["validation"]
    assert after["teacher_f1"] > 0.6
    assert after["kl"] < 0.5 * before["kl"]
    assert after["f1"] > before["f1"] + 0.2
    saved = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "run")
    assert saved.config.num_labels == 2
    config = EvaluateConfig(student=str(tmp_path / "run"), cache=tmp_path / "held", device="cpu")
    again = run_evaluate(config)
    assert again["f1"] == after["f1"]
    text = _evaluation_text(again)
    assert f"{after['f1']:.4f}  (95 % of resampled documents: " in text
    assert "documents" in text.splitlines()[-1]
    lines = table(compare(CompareConfig(runs=(tmp_path / "run",)))).splitlines()
    assert "answer F1" in lines[0]
    assert f"{after['teacher_f1']:.4f}" in lines[1]
    assert f"{after['f1']:.4f}" in lines[2]
    assert json.loads((tmp_path / "run" / "result.json").read_text())["validation"] == after
    shorter = run_evaluate(
        EvaluateConfig(
            student=str(tmp_path / "run"),
            cache=tmp_path / "held",
            device="cpu",
            max_answer_tokens=1,
        )
    )
    assert shorter["exact_match"] < after["exact_match"]


def test_a_pretrained_body_gets_a_new_head(caches, tmp_path, caplog):
    torch.manual_seed(5)
    BertForMaskedLM(bert_config()).save_pretrained(tmp_path / "body")
    five = bert_config(id2label=dict(enumerate("abcde")))
    BertForTokenClassification(five).save_pretrained(tmp_path / "tagger")
    cache = open_cache(caches["dense"])
    for name in ("body", "tagger"):
        folder = str(tmp_path / name)
        check_fit(folder, load_config(folder), cache)
        with caplog.at_level(logging.INFO):
            student = build_student(folder, cache, seed=1)
        assert "it has no head for question-answering, a new one is made" in caplog.text
        assert student.qa_outputs.out_features == 2


def test_adapters_and_head_are_saved_and_reload(caches, tmp_path):
    torch.manual_seed(5)
    BertForMaskedLM(bert_config()).save_pretrained(tmp_path / "body")
    options = {"lora_rank": 4, "max_steps": 20}
    train(caches["dense"], tmp_path / "body", tmp_path / "run", **options)
    cache = open_cache(caches["dense"])
    body, other_body = (build_student(str(tmp_path / "body"), cache, seed=0) for _ in range(2))
    adapted = add_adapters(other_body, AdapterSpec(rank=4), "question-answering")
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert any("qa_outputs" in name for name in trained)
    assert all("lora" in name or "qa_outputs" in name for name in trained)
    student = build_student(str(tmp_path / "run"), cache, seed=9)
    numbers = evaluate(student, cache, batch_tokens=2000)
    other = evaluate(build_student(str(tmp_path / "run"), cache, seed=8), cache, batch_tokens=2000)
    assert numbers["loss"] == other["loss"]
    assert numbers["loss"] < evaluate(body, cache, batch_tokens=2000)["loss"]


# ---- Refusals


def test_a_student_that_does_not_fit_is_refused(caches, tmp_path):
    cache = open_cache(caches["dense"])
    bert_config(max_position_embeddings=20).save_pretrained(tmp_path / "short")
    bert_config(vocab_size=50).save_pretrained(tmp_path / "few")
    CLIPConfig().save_pretrained(tmp_path / "clip")
    for name, message in (
        ("short", "takes 20 positions, but the longest row of"),
        ("few", "it knows 50 tokens, but the rows of"),
        ("clip", "transformers has no model of type clip for question-answering"),
    ):
        folder = str(tmp_path / name)
        with pytest.raises(CacheMismatch, match=message):
            check_fit(folder, load_config(folder), cache)


def test_hidden_states_are_refused(caches, config_dir, tmp_path):
    with pytest.raises(CacheMismatch, match="is of question-answering, whose targets are of a row"):
        train(caches["dense"], config_dir, tmp_path / "run", hidden_weight=1.0, max_steps=2)
