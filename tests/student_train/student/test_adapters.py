"""Adapters of every kind, on a language model and on a classifier; dropout of the student."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, BertModel, GPT2Config, LlamaForCausalLM, MambaConfig, T5Config

from shared.cache import open_cache
from shared.errors import ConfigError, Stopped
from student_train.config import AdapterSpec, TrainConfig
from student_train.run import finish
from student_train.run.run import run
from student_train.student.adapters import add_adapters
from student_train.student.build import build_student, set_dropout
from tests.conftest import llama_config
from tests.student_train.label_caches import bert_config, make_rows, make_teacher, write_cache
from tests.student_train.run.test_trainer import SignalAt, losses

KINDS = ("lora", "dora", "rslora")
IDS = torch.arange(5, 29).reshape(2, 12)
SEQUENCES = "sequence-classification"


@pytest.fixture(scope="module")
def students(tmp_path_factory, teacher_dir) -> dict[str, Path]:
    """Pretrained weights: a language model, and a body that gets a new head."""
    folder = tmp_path_factory.mktemp("students")
    shutil.copytree(teacher_dir, folder / "llama")
    torch.manual_seed(7)
    BertModel(bert_config()).save_pretrained(folder / "bert")
    return {"llama": folder / "llama", "bert": folder / "bert"}


@pytest.fixture(scope="module")
def caches(tmp_path_factory, tokenizer_dir, cache_dir) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("cache") / "classes"
    write_cache(path, tokenizer_dir, SEQUENCES, make_rows(SEQUENCES, 60), make_teacher(SEQUENCES))
    return {"llama": cache_dir, "bert": path}


@pytest.fixture
def train(students, caches, tmp_path) -> Callable[..., dict[str, Any]]:
    """Trains adapters on the `llama` or `bert` student."""

    def make(model: str, **options: Any) -> dict[str, Any]:
        defaults: dict[str, Any] = {
            "student": str(students[model]),
            "cache": (caches[model],),
            "out": tmp_path / "run",
            "max_steps": 4,
            "batch_tokens": 600,
            "learning_rate": 1e-2,
            "lora_rank": 3,
            "device": "cpu",
        }
        return run(TrainConfig(**defaults | options))

    return make


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", ["llama", "bert"])
def test_every_kind_trains_loads_again_and_merges(
    model, kind, train, students, caches, tmp_path, monkeypatch
):
    trained: list[torch.Tensor] = []
    save = finish._save

    def look_and_save(path: Path, student: Any, cache: Any) -> None:
        trained.append(logits_of(student))
        save(path, student, cache)

    monkeypatch.setattr(finish, "_save", look_and_save)
    train(model, adapter=kind)
    cache = open_cache(caches[model])
    again = build_student(str(tmp_path / "run"), cache, seed=9)
    torch.testing.assert_close(logits_of(again), trained[0], rtol=0, atol=0)
    untrained = build_student(str(students[model]), cache, seed=0)
    assert not torch.allclose(trained[0], logits_of(untrained), atol=1e-3)
    merged = again.merge_and_unload()
    assert type(merged) is type(untrained)
    scale = float(trained[0].abs().max())
    torch.testing.assert_close(logits_of(merged), trained[0], rtol=0, atol=1e-5 * max(1.0, scale))


def test_what_each_kind_computes():
    """One layer by the formulas of the papers: s B A, with s alpha / r or alpha / sqrt(r)."""
    for kind in KINDS:
        torch.manual_seed(0)
        base = LlamaForCausalLM(llama_config())
        frozen = base.model.layers[0].mlp.up_proj.weight.detach().clone()
        spec = AdapterSpec(rank=4, kind=kind, alpha=6.0, targets=("up_proj",))
        student = add_adapters(base, spec, "causal-lm")
        layer = student.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
        a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
        with torch.no_grad():
            b.normal_()
        weight = frozen + (3.0 if kind == "rslora" else 1.5) * (b @ a)
        if kind == "dora":  # the length of each row stays what it was before the first step
            weight = weight * (frozen.norm(dim=1) / weight.norm(dim=1))[:, None]
        states = torch.randn(5, 32)
        torch.testing.assert_close(layer(states), states @ weight.t(), rtol=1e-4, atol=1e-5)


def test_targets_and_alpha_are_what_was_asked_for(students, caches):
    cache = open_cache(caches["bert"])
    student = build_student(str(students["bert"]), cache, seed=0)
    spec = AdapterSpec(rank=2, targets=("query", "attention.output.dense"))
    adapted = add_adapters(student, spec, SEQUENCES)
    names = {n for n, p in adapted.named_parameters() if p.requires_grad and "lora_A" in n}
    of_layer = [".attention.self.query.", ".attention.output.dense."]
    assert len(names) == 4
    assert all(any(part in name for part in of_layer) for name in names)
    assert adapted.peft_config["default"].lora_alpha == 4


@pytest.mark.parametrize(("model", "target"), [("bert", "q_proj"), ("bert", "classifier")])
def test_a_target_that_is_no_layer_of_the_trunk_is_refused(model, target, train):
    with pytest.raises(ConfigError) as error:
        train(model, lora_targets=("query", target))
    assert str(error.value) == (
        f"--lora-targets {target}: no linear layer of the student has this name, or one that ends "
        "so. There are dense, key, query, value."
    )


@pytest.mark.parametrize(
    "options",
    [
        {"adapter": "dora"},
        {"lora_alpha": 8.0},
        {"lora_dropout": 0.1},
        {"lora_targets": ("q_proj",)},
    ],
)
def test_options_of_adapters_are_refused_without_them(options):
    with pytest.raises(ConfigError, match="is only read with --lora-rank, but --lora-rank is 0"):
        TrainConfig(student="s", cache=(Path("c"),), out=Path("o"), **options)


def test_dropout_of_adapters_goes_on_where_a_stopped_run_left_it(train, tmp_path, monkeypatch):
    options = {"lora_dropout": 0.5, "adapter": "dora", "max_steps": 6}
    train("llama", out=tmp_path / "whole", **options)
    train("llama", out=tmp_path / "none", **options | {"lora_dropout": 0.0})
    SignalAt(monkeypatch, [3])
    with pytest.raises(Stopped, match="after step 3 of 6"):
        train("llama", **options)
    train("llama", **options)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole") != losses(tmp_path / "none")


@pytest.mark.parametrize("model", ["llama", "bert"])
def test_early_stopping_saves_the_best_adapters(model, train, caches):
    result = train(
        model,
        learning_rate=3.0,
        scheduler="constant",
        warmup_ratio=0.0,
        max_steps=30,
        eval_every=1,
        early_stopping_patience=3,
        validation_cache=caches[model],
    )
    assert result["steps"] < 30
    path = Path(result["out"]) / "metrics.jsonl"
    lines = map(json.loads, path.read_text().splitlines())
    found = [line["loss"] for line in lines if line["kind"] == "eval" and line["step"]]
    assert result["validation"]["loss"] == pytest.approx(min(found), rel=1e-6)
    assert min(found) < found[-1]


# Dropout of the student


@pytest.mark.parametrize(
    ("config", "fields"),
    [
        (bert_config(), {"hidden_dropout_prob", "attention_probs_dropout_prob"}),
        (llama_config(), {"attention_dropout"}),
        (GPT2Config(), {"attn_pdrop", "embd_pdrop", "resid_pdrop", "summary_first_dropout"}),
        (T5Config(), {"dropout_rate", "classifier_dropout"}),
    ],
    ids=["bert", "llama", "gpt2", "t5"],
)
def test_dropout_is_set_wherever_the_config_has_one(config, fields):
    before = config.to_dict()
    set_dropout("s", config, 0.37)
    after = config.to_dict()
    assert {name for name in after if after[name] != before[name]} == fields
    assert {after[name] for name in fields} == {0.37}


def test_a_model_without_dropout_is_refused():
    with pytest.raises(ConfigError) as error:
        set_dropout("some/mamba", MambaConfig(), 0.1)
    assert str(error.value) == (
        "--dropout 0.1: the config of some/mamba (mamba) has no dropout to set, no number whose "
        "name ends in dropout, dropout_prob, dropout_rate, pdrop. Leave the option out."
    )


def test_a_student_is_trained_with_the_dropout_asked_for(train, tmp_path):
    options = {"learning_rate": 0.0, "max_steps": 2}
    train("bert", out=tmp_path / "own", **options)
    train("bert", out=tmp_path / "none", dropout=0.0, **options)
    train("bert", out=tmp_path / "much", dropout=0.5, **options)
    assert losses(tmp_path / "own") == losses(tmp_path / "none") != losses(tmp_path / "much")
    assert AutoConfig.from_pretrained(tmp_path / "much").hidden_dropout_prob == 0.5
