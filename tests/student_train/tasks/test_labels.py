"""Students of label spaces: loss, padding, heads, refusals, runs; on caches written by hand."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForMaskedLM,
    CLIPConfig,
    DistilBertConfig,
    LlamaConfig,
    PretrainedConfig,
    RobertaConfig,
)

from shared.cache import Cache, open_cache
from shared.errors import CacheMismatch, Refused, Stopped
from student_train.cli import _evaluation_text
from student_train.compare.report import compare
from student_train.compare.table import table
from student_train.config import AdapterSpec, CompareConfig, EvaluateConfig, TrainConfig
from student_train.evaluate.evaluate import evaluate
from student_train.evaluate.evaluate import run as run_evaluate
from student_train.loss.attachment import attach
from student_train.loss.objective import Objective
from student_train.loss.spec import LossSpec
from student_train.run.run import run
from student_train.student.adapters import add_adapters
from student_train.student.build import build_student, load_config
from student_train.student.fit import check_fit
from student_train.tasks.table import task_of
from tests.conftest import llama_config
from tests.student_train.label_caches import (
    CLASSES,
    LABELS,
    TAGS,
    bert_config,
    logits_at,
    make_rows,
    make_teacher,
    write_cache,
)
from tests.student_train.loss.test_attachment import batches
from tests.student_train.run.test_trainer import SignalAt, losses, weights

TASKS = list(LABELS)
ROWS = 150
AUTO = {
    "token-classification": AutoModelForTokenClassification,
    "sequence-classification": AutoModelForSequenceClassification,
}


@pytest.fixture(scope="module")
def teachers() -> dict[str, Any]:
    return {task: make_teacher(task) for task in LABELS}


@pytest.fixture(scope="module")
def caches(tmp_path_factory, tokenizer_dir, teachers) -> dict[str, Path]:
    """A cache with dense targets for each task; `<task> held out`: of other rows."""
    folder = tmp_path_factory.mktemp("labels")
    made = {}
    for number, task in enumerate(TASKS):
        for name, seed in ((task, 0), (f"{task} held out", 1)):
            path = folder / f"{number}-{seed}"
            rows = make_rows(task, ROWS, seed)
            made[name] = write_cache(path, tokenizer_dir, task, rows, teachers[task])
    return made


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    """A student from scratch of one layer, with dropout, whose config names no labels."""
    config = bert_config(num_hidden_layers=1, hidden_dropout_prob=0.1)
    config.save_pretrained(tmp_path / "config")
    return tmp_path / "config"


@pytest.fixture
def train(caches, config_dir, tmp_path) -> Callable[..., dict[str, Any]]:
    """Trains a student; `task` names the cache, keyword arguments are options of TrainConfig."""

    def make(task: str, **options: Any) -> dict[str, Any]:
        defaults: dict[str, Any] = {
            "student": str(config_dir),
            "cache": (caches[task],),
            "out": tmp_path / "run",
            "max_steps": 6,
            "batch_tokens": 600,
            "learning_rate": 3e-3,
            "log_every": 2,
            "device": "cpu",
        }
        return run(TrainConfig(**defaults | options))

    return make


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


def fresh(config: PretrainedConfig, task: str, seed: int = 3) -> Any:
    """A random model of the task whose logits are far from constant."""
    names = LABELS[task]
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    torch.manual_seed(seed)
    model = AUTO[task].from_config(config).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(20)
        for name, parameter in model.named_parameters():
            if not name.startswith(model.base_model_prefix) and parameter.dim() == 2:
                parameter.mul_(20)
    return model


@pytest.mark.parametrize("task", TASKS)
def test_the_teacher_as_its_own_student_agrees_everywhere(task, caches, teachers):
    cache = open_cache(caches[task])
    numbers = evaluate(teachers[task], cache, batch_tokens=900)
    assert numbers["kl"] <= 1e-6  # float16 rounds log-probabilities to 2**-11 of their size
    assert numbers["agreement"] == 1.0
    assert numbers["loss"] == pytest.approx(numbers["teacher_loss"], rel=1e-4)
    metric = numbers["metric"]
    assert metric == {"token-classification": "entity_f1"}.get(task, "accuracy")
    assert 0 < numbers[metric] < 1  # the labels are not the teacher's own
    assert numbers[metric] == numbers[f"teacher_{metric}"]
    assert numbers[f"{metric}_low"] < numbers[metric] < numbers[f"{metric}_high"]
    assert "perplexity" not in numbers


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("task", TASKS)
def test_loss_and_gradient_equal_those_of_rows_one_by_one(task, caches, teachers, temperature):
    """Dense KL and cross-entropy by their formulas, on the live teacher's logits."""
    cache = open_cache(caches[task])
    rows, teacher, student = make_rows(task, ROWS), teachers[task], fresh(bert_config(), task)
    batch = batches(cache, 500, temperature=temperature)[0]
    spec = LossSpec(temperature=temperature)
    attachment = attach(student, objective(cache, spec=spec))
    output = student(**batch)
    output["loss"].backward()
    found = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    attachment.detach()
    student.zero_grad()

    some = [rows[row_id >> 24] for row_id in batch["row_ids"].tolist()]
    total, count = 0.0, 0
    for row in some:
        logits = logits_at(student, row).double()
        with torch.no_grad():
            logp = (logits_at(teacher, row).double() / temperature).log_softmax(-1)
        logq = (logits / temperature).log_softmax(-1)
        kl = (logp.exp() * (logp - logq)).sum() * temperature**2
        labels = torch.from_numpy(row.labels).long()
        hard = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
        total, count = total + kl + 0.5 * hard, count + len(labels)
    loss = total / count
    loss.backward()
    assert len(some) > 5
    assert count == int(batch["num_positions"])
    # The teacher's log-probabilities are float16: 2**-11 of numbers up to 10.
    torch.testing.assert_close(output["loss"].double(), loss.detach(), rtol=1e-3, atol=0)
    for name, parameter in student.named_parameters():
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=2e-3 * largest + 1e-7)


def test_a_token_without_a_label_has_no_gradient(caches):
    cache = open_cache(caches["token-classification"])
    student = fresh(bert_config(), "token-classification")
    kept: list[torch.Tensor] = []
    student.classifier.register_forward_hook(lambda module, args, out: kept.append(out))
    attach(student, objective(cache))
    batch = batches(cache, 500)[0]
    output = student(**batch)
    (gradient,) = torch.autograd.grad(output["loss"], kept)
    touched = gradient.flatten(0, 1).abs().sum(-1) > 0
    assert touched.nonzero()[:, 0].tolist() == batch["position_index"].tolist()
    assert 0 < touched.sum() < batch["attention_mask"].sum()


MODELS: dict[str, PretrainedConfig] = {
    "bert": bert_config(pad_token_id=9),
    "distilbert": DistilBertConfig(
        vocab_size=300, dim=32, hidden_dim=64, n_layers=1, n_heads=2, max_position_embeddings=64
    ),
    "roberta": RobertaConfig(
        vocab_size=300,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        type_vocab_size=1,
    ),
    "llama": LlamaConfig(**llama_config().to_dict() | {"pad_token_id": 299}),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("task", TASKS)
def test_padding_and_neighbours_do_not_matter(task, kind, caches):
    """Each model over batches against the same model on every row alone, unpadded."""
    cache, rows = open_cache(caches[task]), make_rows(task, ROWS)
    student = fresh(MODELS[kind], task)
    attach(student, objective(cache))
    checked = 0
    for batch in batches(cache, 400)[:6]:
        with torch.no_grad():
            found = student(**batch)["logits"]
            of_rows = [rows[row_id >> 24] for row_id in batch["row_ids"].tolist()]
            expected = torch.cat([logits_at(student, row) for row in of_rows])
        assert expected.std(dim=0).min() > 0.1
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        checked += int((batch["attention_mask"] == 0).any())
    assert checked


def test_the_two_texts_of_a_pair_reach_the_model(caches):
    cache = open_cache(caches["sequence-classification"])
    student = fresh(bert_config(), "sequence-classification")
    with torch.no_grad():
        student.bert.embeddings.token_type_embeddings.weight.mul_(50)
    attach(student, objective(cache))
    batch = batches(cache, 400)[0]
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    assert not batch["token_type_ids"][batch["attention_mask"] == 0].any()
    with torch.no_grad():
        found = student(**batch)["hard"]
        without = student(**batch | {"token_type_ids": torch.zeros_like(batch["input_ids"])})
    assert abs(float(found - without["hard"])) > 1e-2


@pytest.mark.parametrize("task", TASKS)
def test_a_micro_batch_without_positions_has_no_loss_and_no_gradient(task, caches):
    cache = open_cache(caches[task])
    student = fresh(bert_config(), task)
    attach(student, objective(cache))
    batch = batches(cache, 1, world_size=2, rank=1)[0]
    assert len(batch["position_index"]) == 0
    output = student(**batch)
    output["loss"].backward()
    assert float(output["loss"].detach()) == 0.0
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("task", TASKS)
def test_a_student_from_scratch_learns(task, train, caches, tmp_path, config_dir):
    held_out = caches[f"{task} held out"]
    cache = open_cache(held_out)
    before = evaluate(build_student(str(config_dir), cache, seed=0), cache, batch_tokens=2000)
    result = train(task, max_steps=60, validation_cache=held_out, eval_every=30, soft_weight=0.2)
    after = result["validation"]
    metric = after["metric"]
    assert after["loss"] < 0.8 * before["loss"]
    assert after[metric] > before[metric] + 0.1
    saved = AUTO[task].from_pretrained(tmp_path / "run")
    assert tuple(saved.config.id2label.values()) == LABELS[task]
    config = EvaluateConfig(student=str(tmp_path / "run"), cache=held_out, device="cpu")
    again = run_evaluate(config)
    assert {n: v for n, v in again.items() if n in after} == {
        n: v if isinstance(v, str) else pytest.approx(v, rel=1e-5) for n, v in after.items()
    }
    text = _evaluation_text(again)
    assert f"{after[metric]:.4f}  (95 % of resampled rows: " in text
    lines = table(compare(CompareConfig(runs=(tmp_path / "run",)))).splitlines()
    assert {"entity_f1": "entity F1", "accuracy": "accuracy"}[metric] in lines[0]
    assert f"{after[f'teacher_{metric}']:.4f}" in lines[1]
    assert f"{after[metric]:.4f}" in lines[2]
    saved_numbers = json.loads((tmp_path / "run" / "result.json").read_text())["validation"]
    assert saved_numbers == after


@pytest.mark.parametrize("task", TASKS)
def test_early_stopping_by_the_metric_of_the_task_keeps_the_best_model(
    task, train, caches, tmp_path
):
    result = train(
        task,
        max_steps=40,
        learning_rate=0.3,  # goes astray after some steps
        scheduler="constant",
        warmup_ratio=0.0,
        eval_every=1,
        early_stopping_patience=4,
        early_stopping_metric="metric",
        validation_cache=caches[f"{task} held out"],
    )
    lines = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    name = result["validation"]["metric"]
    found = {line["step"]: line[name] for line in lines if line["kind"] == "eval"}
    best = max(found, key=lambda step: (found[step], -step))  # the first of equal ones
    assert list(found) == list(range(result["steps"] + 1))  # 0: before training
    assert result["steps"] == best + 4 < 40
    assert result["validation"][name] == found[best] > min(found.values())
    config = EvaluateConfig(
        student=str(tmp_path / "run"), cache=caches[f"{task} held out"], device="cpu"
    )
    assert run_evaluate(config)[name] == found[best]


@pytest.mark.parametrize("task", TASKS)
def test_stopped_and_resumed_equals_uninterrupted(task, train, tmp_path, monkeypatch):
    train(task, out=tmp_path / "whole")
    SignalAt(monkeypatch, [3])
    with pytest.raises(Stopped, match="after step 3 of 6"):
        train(task)
    train(task)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    ours, theirs = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.fixture
def body_dir(tmp_path: Path) -> Path:
    """Pretrained weights without a head for any of the tasks, and without a pooler."""
    torch.manual_seed(5)
    BertForMaskedLM(bert_config()).save_pretrained(tmp_path / "body")
    return tmp_path / "body"


@pytest.mark.parametrize("task", TASKS)
def test_a_pretrained_body_gets_a_new_head(task, caches, body_dir, caplog):
    cache = open_cache(caches[task])
    check_fit(str(body_dir), load_config(str(body_dir)), cache)
    with caplog.at_level(logging.INFO):
        one, same, other = (build_student(str(body_dir), cache, seed=seed) for seed in (1, 1, 2))
    assert f"it has no head for {task}, a new one is made" in caplog.text
    body = AutoModel.from_pretrained(body_dir)
    assert torch.equal(
        one.bert.embeddings.word_embeddings.weight, body.get_input_embeddings().weight
    )
    assert one.classifier.out_features == len(LABELS[task])
    assert torch.equal(one.classifier.weight, same.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    assert tuple(one.config.id2label.values()) == LABELS[task]
    assert one.config.label2id == {name: index for index, name in enumerate(LABELS[task])}


def test_a_head_for_another_task_is_replaced(caches, tmp_path, teachers):
    """Both are called `classifier`; one has 5 rows, the other 3."""
    teachers["token-classification"].save_pretrained(tmp_path / "tagger")
    cache = open_cache(caches["sequence-classification"])
    student = build_student(str(tmp_path / "tagger"), cache, seed=0)
    assert student.classifier.out_features == len(CLASSES)


def test_weights_that_are_not_those_of_the_config_are_refused(caches, body_dir):
    config = json.loads((body_dir / "config.json").read_text())
    (body_dir / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(Refused, match=r"have another shape than its config.json says"):
        build_student(str(body_dir), open_cache(caches["token-classification"]), seed=0)


def test_a_decoder_is_told_what_padding_is(caches, tmp_path):
    """Its own where it has one; else the tokenizer's, which here is the end of a text."""
    cache = open_cache(caches["sequence-classification"])
    llama_config().save_pretrained(tmp_path / "config")
    assert build_student(str(tmp_path / "config"), cache, seed=0).config.pad_token_id == 0
    fresh(MODELS["llama"], "sequence-classification").save_pretrained(tmp_path / "own")
    assert build_student(str(tmp_path / "own"), cache, seed=0).config.pad_token_id == 299


@pytest.mark.parametrize("kind", ["bert", "distilbert", "llama"])
@pytest.mark.parametrize("task", TASKS)
def test_adapters_and_head_are_saved_and_reload(task, kind, train, caches, tmp_path):
    """On a body whose head, and whose pooler, did not exist before."""
    torch.manual_seed(6)
    no_pooler = {"add_pooling_layer": False} if kind == "bert" else {}
    AutoModel.from_config(MODELS[kind], **no_pooler).save_pretrained(tmp_path / "body")
    result = train(
        task,
        student=str(tmp_path / "body"),
        lora_rank=2,
        seed=4,
        validation_cache=caches[f"{task} held out"],
    )
    assert not (tmp_path / "run" / "model.safetensors").exists()
    cache = open_cache(caches[f"{task} held out"])
    check_fit(str(tmp_path / "run"), load_config(str(tmp_path / "run")), cache)
    reloaded = build_student(str(tmp_path / "run"), cache, seed=0)
    again = evaluate(reloaded, cache, batch_tokens=2000)
    assert again["loss"] == pytest.approx(result["validation"]["loss"], rel=1e-5)
    trained = {n for n, p in reloaded.named_parameters() if "modules_to_save.default" in n}
    assert trained


def test_the_trunk_of_an_adapted_student_is_frozen_and_its_head_is_not(caches):
    task = "sequence-classification"
    student = add_adapters(fresh(bert_config(), task), AdapterSpec(rank=2), task)
    trainable = {name for name, p in student.named_parameters() if p.requires_grad}
    assert any(".classifier.modules_to_save" in name for name in trainable)
    assert any(".pooler.modules_to_save" in name for name in trainable)
    assert all("lora_" in name or "modules_to_save" in name for name in trainable)
    assert not any("lora_" in name and "classifier" in name for name in trainable)


def refused(student: Path, cache: Path) -> str:
    with pytest.raises(CacheMismatch) as error:
        check_fit(str(student), load_config(str(student)), open_cache(cache))
    return str(error.value)


def test_a_head_of_other_labels_is_refused(caches, tmp_path, teachers, tokenizer_dir):
    tagger = teachers["token-classification"]
    tagger.save_pretrained(tmp_path / "tagger")
    task, rows = "token-classification", make_rows("token-classification", 4)
    swapped = ("O", "B-LOC", "I-PER", "B-PER", "I-LOC")
    other = write_cache(tmp_path / "swapped", tokenizer_dir, task, rows, labels=swapped)
    assert (
        f"label 1 is 'B-PER', but in {other} label 1 is 'B-LOC'. Its head was trained for other "
        "labels. Save its body alone" in refused(tmp_path / "tagger", other)
    )
    more = write_cache(tmp_path / "more", tokenizer_dir, task, rows, labels=(*TAGS, "B-X"))
    assert (
        f"its head has 5 labels (O, B-PER, I-PER, B-LOC, I-LOC), but {more} was cached over 6 "
        "(O, B-PER, I-PER, B-LOC, I-LOC, ...)" in refused(tmp_path / "tagger", more)
    )
    check_fit(str(tmp_path / "tagger"), tagger.config, open_cache(caches[task]))


def test_labels_without_names_are_taken_in_their_order(caches, tmp_path, teachers, caplog):
    task = "sequence-classification"
    student = AutoModelForSequenceClassification.from_config(bert_config(num_labels=3))
    student.save_pretrained(tmp_path / "unnamed")
    cache = open_cache(caches[task])
    check_fit(str(tmp_path / "unnamed"), student.config, cache)
    built = build_student(str(tmp_path / "unnamed"), cache, seed=0)
    assert tuple(built.config.id2label.values()) == LABELS[task]
    assert "LABEL_0, LABEL_1, LABEL_2, those of" in caplog.text
    assert "taken to be the same, in this order" in caplog.text


def test_a_student_keeps_its_names_where_the_cache_has_none(tmp_path, teachers, tokenizer_dir):
    task = "sequence-classification"
    teachers[task].save_pretrained(tmp_path / "named")
    unnamed = tuple(f"LABEL_{index}" for index in range(3))
    path = write_cache(tmp_path / "c", tokenizer_dir, task, make_rows(task, 4), labels=unnamed)
    built = build_student(str(tmp_path / "named"), open_cache(path), seed=0)
    assert tuple(built.config.id2label.values()) == CLASSES
    assert built.config.problem_type == "single_label_classification"


def test_what_a_student_cannot_read_is_refused(caches, tmp_path):
    cache = caches["token-classification"]
    bert_config(vocab_size=299).save_pretrained(tmp_path / "narrow")
    assert "it knows 299 tokens, but the rows of" in refused(tmp_path / "narrow", cache)
    bert_config(max_position_embeddings=16).save_pretrained(tmp_path / "short")
    assert "takes 16 positions, but the longest row" in refused(tmp_path / "short", cache)
    CLIPConfig().save_pretrained(tmp_path / "clip")
    found = refused(tmp_path / "clip", cache)
    assert "transformers has no model of type clip for token-classification" in found


def test_hidden_states_of_whole_rows_are_refused(train):
    expected = "is of sequence-classification, whose targets are of a row as a whole"
    with pytest.raises(CacheMismatch, match=expected):
        train("sequence-classification", hidden_weight=1.0)


def test_states_of_blocks_that_are_one_block_are_refused(caches):
    """An ALBERT runs one block several times."""
    task = "token-classification"
    config = AlbertConfig(
        vocab_size=300, embedding_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    options = {"layer_pairs": ((0, 0),), "deviations": {0: torch.ones(32)}}
    with pytest.raises(Refused, match="no list of 2 blocks was found in AlbertForTokenClass"):
        attach(fresh(config, task), objective(open_cache(caches[task]), **options))


def test_a_held_out_cache_of_other_labels_is_refused(train, caches, tmp_path, tokenizer_dir):
    task = "sequence-classification"
    rows = make_rows(task, 4)
    other = write_cache(tmp_path / "o", tokenizer_dir, task, rows, labels=("bad", "good", "fair"))
    expected = "--validation-cache .*: its label 1 is 'good', but that of .* is 'fair'"
    with pytest.raises(CacheMismatch, match=expected):
        train(task, validation_cache=other)
    with pytest.raises(CacheMismatch, match="its task is token-classification, but that of"):
        train(task, validation_cache=caches["token-classification"])
    one = write_cache(tmp_path / "p", tokenizer_dir, task, rows)
    with pytest.raises(CacheMismatch, match="the names of the classes is"):
        train(task, cache=(one, other), soft_weight=0.0, hard_weight=1.0)


@pytest.mark.parametrize("task", TASKS)
def test_hard_labels_alone_train_and_evaluate(task, train, tmp_path, tokenizer_dir):
    path = write_cache(tmp_path / "hard", tokenizer_dir, task, make_rows(task, 60))
    with pytest.raises(CacheMismatch, match="holds hard labels only"):
        train(task, cache=(path,))
    result = train(task, cache=(path,), soft_weight=0.0, hard_weight=1.0, validation_cache=path)
    numbers = result["validation"]
    assert numbers["metric"] in numbers
    assert not {"kl", "teacher_accuracy", "teacher_entity_f1"} & numbers.keys()
