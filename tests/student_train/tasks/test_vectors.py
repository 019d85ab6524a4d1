"""Vectors of texts through both stages: live states, losses, metrics, the folder that serves."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer, BertForMaskedLM, BertModel

from shared.cache import open_cache
from shared.errors import CacheMismatch, ConfigError, Refused
from shared.models.pooling import pooled
from student_train.cli import _evaluation_text
from student_train.compare.report import compare
from student_train.compare.table import table
from student_train.config import CompareConfig, EvaluateConfig, TrainConfig
from student_train.data.cache_set import CacheSet
from student_train.data.ensemble import Ensemble
from student_train.evaluate.evaluate import evaluate
from student_train.evaluate.evaluate import run as run_evaluate
from student_train.loss.attachment import attach
from student_train.loss.layers import PROJECTIONS
from student_train.loss.objective import Objective
from student_train.loss.outputs import STATES
from student_train.loss.spec import LossSpec
from student_train.metrics.names import TITLES
from student_train.metrics.vectors import nearest_agreement, similarity_correlation
from student_train.run.run import run as train
from student_train.student.build import build_student
from teacher_cache.config import CaptureConfig, CheckConfig, InspectConfig, PlanConfig
from teacher_cache.job.run import run
from teacher_cache.tools.check.check import check
from teacher_cache.tools.inspect import inspect
from teacher_cache.tools.pages import write_inspection
from teacher_cache.tools.plan import estimate
from teacher_cache.tools.report import check_text, estimate_text, inspect_text
from tests.student_train.loss.test_attachment import batches
from tests.teacher_cache.tasks.test_masked import bert_config, tokenizer_of

POOLINGS = ("mean", "cls", "last", "none")
Capture = Callable[..., Path]


@pytest.fixture(scope="module")
def files(tmp_path_factory, corpus_file) -> Path:
    """A teacher without a pooler, students of its width and of another."""
    folder = tmp_path_factory.mktemp("vectors")
    tokenizer = tokenizer_of(corpus_file.read_text())
    torch.manual_seed(0)
    BertForMaskedLM(bert_config(len(tokenizer))).save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    for name, width in (("narrow", 16), ("equal", 32)):
        config = bert_config(len(tokenizer), hidden_size=width, num_hidden_layers=1)
        config.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def capture(files, corpus_file, tmp_path_factory) -> Capture:
    def make(**changes: Any) -> Path:
        options: dict[str, Any] = {
            "task": "feature-extraction",
            "teacher": str(files / "teacher"),
            "corpus": str(corpus_file),
            "out": tmp_path_factory.mktemp("vectors") / "cache",
            "max_length": 24,
            "limit_documents": 60,
            "shard_tokens": 3000,
            "device": "cpu",
        }
        config = CaptureConfig(**options | changes)
        run(config)
        return config.out

    return make


@pytest.fixture(scope="module")
def caches(capture) -> dict[str, Path]:
    made = {pooling: capture(pooling=pooling, hidden_layers=(-1, 0)) for pooling in POOLINGS}
    return made | {"held out": capture(limit_documents=0, split="train[60:100]")}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_cached_vectors_are_the_teacher_s(files, caches, corpus_file, pooling):
    """Of each text alone, tokenized by itself, pooled in plain torch."""
    cache = open_cache(caches[pooling])
    model = BertModel.from_pretrained(files / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(files / "teacher")
    documents = corpus_file.read_text().splitlines()[:60]
    assert cache.manifest.teacher is not None
    assert cache.manifest.targets.kind == "none"
    for row in cache:
        document, chunk = row.row_id >> 24, row.row_id & 0xFFFFFF
        ids = tokenizer(documents[document], add_special_tokens=False)["input_ids"]
        assert row.input_ids.tolist() == [2, *ids[22 * chunk : 22 * (chunk + 1)], 3]
        assert set(row.labels.tolist()) == {-1}
        with torch.no_grad():
            states = model(row.input_ids[None], output_hidden_states=True).hidden_states
        for layer, state in ((-1, states[-1][0]), (0, states[1][0])):
            expected = {
                "mean": state.mean(0, keepdim=True),
                "cls": state[:1],
                "last": state[-1:],
                "none": state[1:-1],
            }[pooling]
            torch.testing.assert_close(row.hidden[layer].float(), expected, rtol=2**-8, atol=1e-6)
    rows = sum(bool(text) for text in documents)
    assert len(cache) == rows if pooling != "none" else len(cache) > rows
    found = check(CheckConfig(cache=caches[pooling], teacher=str(files / "teacher"), device="cpu"))
    assert found.sound
    assert found.error_live_cached < 0.002
    assert "error live to cached" in check_text(found)


def test_another_teacher_s_vectors_are_found_out(caches, files, tmp_path):
    torch.manual_seed(1)
    other = BertForMaskedLM(bert_config(open_cache(caches["mean"]).manifest.tokenizer.num_ids))
    other.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(files / "teacher").save_pretrained(tmp_path)
    found = check(CheckConfig(cache=caches["mean"], teacher=str(tmp_path), device="cpu"))
    assert not found.sound
    assert found.error_live_cached > 0.5


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("hidden_loss", ["mse", "cosine", "contrastive"])
def test_loss_and_gradient_equal_plain_torch_on_rows_alone(files, caches, pooling, hidden_loss):
    cache = open_cache(caches[pooling])
    student = build_student(str(files / "narrow"), cache, seed=3).double()
    assert student.pooler is None
    objective = Objective(
        spec=LossSpec(),
        num_classes=cache.manifest.targets.num_classes,
        target_kind="none",
        soft_weight=0,
        hard_weight=0,
        hidden_weight=2.0,
        hidden_loss=hidden_loss,
        layer_pairs=((-1, -1),),
        deviations={-1: cache.channel_deviation(-1)},
        outputs=STATES,
        pooling=pooling,
    )
    batch = batches(cache, 300, targets=False, hidden_layers=(-1,))[1]
    batch["hidden.-1"] = batch["hidden.-1"].double()
    attachment = attach(student, objective)
    projection = student.get_submodule(PROJECTIONS)["m1_m1"].double()
    output = student(**batch)
    output["loss"].backward()
    found = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    attachment.detach()
    student.zero_grad()

    by_id = {row.row_id: row for row in cache}
    rows = [by_id[number] for number in batch["row_ids"].tolist()]
    ours, theirs = [], []
    for row in rows:
        state = student(row.input_ids[None]).last_hidden_state[0]
        kept = {"mean": state.mean(0, True), "cls": state[:1], "last": state[-1:]}
        ours.append(projection(kept.get(pooling, state[row.positions])))
        theirs.append(row.hidden[-1].double())
    s, t = torch.cat(ours), torch.cat(theirs)
    if hidden_loss == "mse":
        loss = ((s - t) / cache.channel_deviation(-1)).square().mean(1).mean()
    elif hidden_loss == "cosine":
        loss = (1 - torch.nn.functional.cosine_similarity(s, t)).mean()
    else:
        unit = [
            torch.nn.functional.normalize(torch.stack([one.mean(0) for one in some]), dim=1)
            for some in (ours, theirs)
        ]
        logits = unit[0] @ unit[1].T / 0.05
        per_row = torch.nn.functional.cross_entropy(
            logits, torch.arange(len(rows)), reduction="sum"
        )
        loss = per_row / int(batch["num_rows"])
    loss = 2 * loss
    loss.backward()
    assert len(rows) > 5
    # Counts divide in float32.
    torch.testing.assert_close(output["loss"].double(), loss.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(output["vectors"], s.detach(), rtol=1e-9, atol=1e-9)
    for name, parameter in student.named_parameters():
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-6 * largest + 1e-9)


def test_a_micro_batch_without_rows_has_no_loss(files, caches):
    cache = open_cache(caches["mean"])
    student = build_student(str(files / "equal"), cache, seed=3)
    objective = Objective(
        spec=LossSpec(),
        num_classes=300,
        soft_weight=0,
        hard_weight=0,
        hidden_weight=1,
        layer_pairs=((-1, -1),),
        deviations={-1: cache.channel_deviation(-1)},
        outputs=STATES,
        pooling="mean",
    )
    attach(student, objective)
    batch = batches(cache, 1, targets=False, hidden_layers=(-1,), world_size=2, rank=1)[0]
    output = student(**batch)
    output["loss"].backward()
    assert float(output["loss"].detach()) == 0
    assert not any(p.grad.any() for p in student.parameters() if p.grad is not None)


def trained(files: Path, caches: dict[str, Path], out: Path, **changes: Any) -> dict[str, Any]:
    options: dict[str, Any] = {
        "student": str(files / "narrow"),
        "cache": (caches["mean"],),
        "validation_cache": caches["held out"],
        "out": out,
        "max_steps": 30,
        "batch_tokens": 800,
        "learning_rate": 5e-3,
        "device": "cpu",
    }
    return train(TrainConfig(**options | changes))


def test_a_student_learns_and_its_folder_gives_its_vectors(files, caches, tmp_path):
    first = trained(files, caches, tmp_path / "first", max_steps=1)["validation"]
    result = trained(files, caches, tmp_path / "run", eval_every=15)
    after = result["validation"]
    assert result["weights"] == {"soft": 0, "hard": 0, "hidden": 1.0}
    assert after["cosine"] > first["cosine"] + 0.1
    assert after["loss"] == pytest.approx(1 - after["cosine"])
    assert after["cosine_low"] < after["cosine"] < after["cosine_high"]
    again = run_evaluate(
        EvaluateConfig(student=str(tmp_path / "run"), cache=caches["held out"], device="cpu")
    )
    for name in ("cosine", "nearest_agreement", "similarity_correlation"):
        assert again[name] == pytest.approx(after[name], abs=1e-5)
        assert name in _evaluation_text(again)
    text = table(compare(CompareConfig(runs=(tmp_path / "run",))))
    assert TITLES["cosine"] in text
    assert f"{after['cosine']:.4f}" in text
    assert "held-out loss is 1 - cosine" in text

    # As sentence-transformers does it: the modules of modules.json, one after another.
    folder = tmp_path / "run"
    modules = json.loads((folder / "modules.json").read_text())
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Dense"]
    modes = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert modes["word_embedding_dimension"] == 16
    assert [name for name, on in modes.items() if on is True] == ["pooling_mode_mean_tokens"]
    assert json.loads((folder / "sentence_bert_config.json").read_text())["max_seq_length"] == 24
    model, weight = AutoModel.from_pretrained(folder).eval(), "linear.weight"
    dense = load_file(folder / "2_Dense" / "model.safetensors")[weight]
    cosines = []
    for row in open_cache(caches["held out"]):
        with torch.no_grad():
            vector = dense @ model(row.input_ids[None]).last_hidden_state[0].mean(0)
        cosines.append(float(torch.cosine_similarity(vector, row.hidden[-1][0].float(), dim=0)))
    assert np.mean(cosines) == pytest.approx(after["cosine"], abs=1e-5)


def test_vectors_pooled_otherwise_judge_no_student(files, caches, capture, tmp_path):
    def refused(message: str, **changes: Any) -> None:
        with pytest.raises(CacheMismatch, match=message):
            trained(files, caches, tmp_path / "run", **changes)

    by_cls, by_token = caches["cls"], caches["none"]
    refused(
        f"--validation-cache {by_cls}: its pooling is cls, but that of .* is mean. Hold out rows",
        validation_cache=by_cls,
    )
    every_third = capture(pooling="none", hidden_layers=(-1,), hidden_every=3)
    refused(
        "its hidden_every is 3, but that of .* is 1",
        cache=(by_token,),
        validation_cache=every_third,
    )
    first_layer = capture(hidden_layers=(0,))
    refused(
        r"its deepest hidden layer is 0 with 32 channels, but that of .* is -1 with 32",
        validation_cache=first_layer,
    )


def test_vectors_pooled_otherwise_are_not_mixed(caches):
    mean, by_cls = (open_cache(caches[pooling]) for pooling in ("mean", "cls"))
    message = "how the states of a row become one, pooling, is 'mean' in the first and 'cls'"
    with pytest.raises(CacheMismatch, match=f"do not train together: {message}"):
        CacheSet([mean, by_cls])
    with pytest.raises(CacheMismatch, match=f"no two teachers on the same rows: {message}"):
        Ensemble([mean, by_cls])


def test_adapters_of_a_student_of_equal_width(files, caches, tmp_path):
    torch.manual_seed(4)
    BertModel(AutoModel.from_pretrained(files / "teacher").config).save_pretrained(tmp_path / "m")
    own = {"student": str(tmp_path / "m"), "lora_rank": 2, "hidden_loss": "cosine"}
    result = trained(files, caches, tmp_path / "run", **own)["validation"]
    assert not (tmp_path / "run" / "2_Dense").exists()
    config = EvaluateConfig(student=str(tmp_path / "run"), cache=caches["held out"], device="cpu")
    assert run_evaluate(config)["cosine"] == pytest.approx(result["cosine"], abs=1e-5)


def test_the_teacher_as_its_own_student_has_its_vectors(files, caches):
    model = BertModel.from_pretrained(files / "teacher")
    for pooling in POOLINGS:
        numbers = evaluate(model, open_cache(caches[pooling]), batch_tokens=400)
        assert numbers["cosine"] == pytest.approx(1, abs=1e-5)  # bfloat16: 0.17 % at right angles
        if pooling != "none":
            assert numbers["nearest_agreement"] > 0.95
            assert numbers["similarity_correlation"] > 0.999


def test_metrics_equal_their_definitions():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(size=(2, 30, 8))
    theirs[:, :5] = ours[:, :5]
    ours[3] = ours[4]

    def cosine(a, b):
        return a @ b / np.sqrt((a @ a) * (b @ b))

    same = 0
    for row in range(30):
        others = [other for other in range(30) if other != row]
        best = [
            max(others, key=lambda o, v=vectors, r=row: cosine(v[r], v[o]))
            for vectors in (ours, theirs)
        ]
        same += best[0] == best[1]
    tensors = torch.from_numpy(ours), torch.from_numpy(theirs)
    assert 0 < same < 30
    assert nearest_agreement(*tensors) == same / 30
    pairs = [(a, b) for a in range(30) for b in range(a)]
    values = [np.array([round(cosine(v[a], v[b]), 12) for a, b in pairs]) for v in (ours, theirs)]
    ranks = [
        np.array([(of < one).sum() + ((of == one).sum() - 1) / 2 for one in of]) for of in values
    ]
    centred = [rank - rank.mean() for rank in ranks]
    expected = centred[0] @ centred[1] / np.sqrt(np.prod([(c @ c) for c in centred]))
    assert similarity_correlation(*tensors) == pytest.approx(expected, abs=2e-3)


def test_padding_is_no_part_of_a_mean():
    states, mask = torch.randn(2, 5, 3), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    torch.testing.assert_close(pooled(states, mask, "mean")[1], states[1, :2].mean(0))
    assert torch.equal(pooled(states, mask, "last")[1], states[1, 1])
    assert torch.equal(pooled(states, mask, "cls")[1], states[1, 0])


def test_plan_and_inspect(files, corpus_file, caches, tmp_path):
    options: dict[str, Any] = {
        "task": "feature-extraction",
        "teacher": str(files / "teacher"),
        "corpus": str(corpus_file),
        "out": tmp_path / "c",
        "max_length": 24,
        "limit_documents": 60,
    }
    numbers = estimate(PlanConfig(**options))
    cache = open_cache(caches["mean"])
    assert numbers["rows"] == numbers["positions"] == len(cache)
    assert numbers["bytes_per_position"]["hidden"] > 0
    assert "positions" in estimate_text(numbers)
    text = inspect_text(inspect(InspectConfig(cache=caches["mean"], rows=2)))
    assert "hidden      layer -1: bf16, one for each row (mean); off by 0.1" in text
    assert "kept mass" not in text
    write_inspection(
        inspect(InspectConfig(cache=caches["mean"], html=tmp_path / "x.html")), tmp_path / "x.html"
    )
    assert "hidden states alone" in (tmp_path / "x.html").read_text()
    with pytest.raises(ConfigError, match="--calibrate compares kinds of targets"):
        PlanConfig(**options, calibrate=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "topk"}, "keeps hidden states and no distribution"),
        ({"top_k": 4}, "keeps hidden states and no distribution"),
        ({"teacher": None}, "--teacher is missing: --task feature-extraction keeps"),
        ({"pack": True}, "--pack is not there for --task feature-extraction"),
        ({"hidden_layers": (-1,), "hidden_every": 2}, "--hidden-every 2: a pooled row has one"),
        ({"task": "causal-lm", "pooling": "cls"}, "--pooling is only read with --task"),
    ],
)
def test_options_that_do_not_go_together_are_refused(tmp_path, changes, message):
    options = {"task": "feature-extraction", "teacher": "t", "corpus": "c", "out": tmp_path}
    with pytest.raises(ConfigError, match=message):
        CaptureConfig(**options | changes)


@pytest.mark.parametrize("name", ["soft_weight", "hard_weight"])
def test_weights_of_what_is_not_there_are_refused(files, caches, tmp_path, name):
    flag = name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"--{flag} 0.3: a cache of --task feature-extraction"):
        trained(files, caches, tmp_path / "run", **{name: 0.3})


def test_a_model_of_another_width_without_a_projection_is_refused(files, caches, tmp_path):
    torch.manual_seed(0)
    config = AutoModel.from_pretrained(files / "teacher").config
    config.hidden_size = 16
    BertModel(config).save_pretrained(tmp_path / "m")
    with pytest.raises(CacheMismatch, match=r"its vectors have 16 channels, those of .* 32, and"):
        run_evaluate(
            EvaluateConfig(student=str(tmp_path / "m"), cache=caches["mean"], device="cpu")
        )


def test_a_row_longer_than_the_teacher_s_positions_is_refused(capture):
    with pytest.raises(Refused, match="--max-length 65: BertModel takes rows of at most 64"):
        capture(max_length=65)
