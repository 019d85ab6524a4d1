"""Exported students: the same function from plain transformers and from ONNX, honest numbers."""

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
import yaml
from peft import PeftModel
from transformers import AutoTokenizer, BertModel, pipeline

from shared.cache import open_cache
from shared.errors import CacheMismatch, ConfigError, Refused
from student_train.config import ExportConfig, TrainConfig
from student_train.evaluate.evaluate import evaluate
from student_train.export.export import run
from student_train.export.onnx_files import write_onnx
from student_train.export.table import table
from student_train.run.run import run as train_run
from student_train.student.saved import load_student
from tests.student_train.label_caches import (
    TAGS,
    bert_config,
    make_rows,
    make_teacher,
    write_cache,
)

ROWS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("export")


@pytest.fixture(scope="module")
def tags_cache(folder, tokenizer_dir) -> Path:
    task = "token-classification"
    return write_cache(
        folder / "tags", tokenizer_dir, task, make_rows(task, ROWS), make_teacher(task)
    )


def trained(student: Path, cache: Path, out: Path, **options: Any) -> Path:
    defaults = {"max_steps": 20, "batch_tokens": 600, "learning_rate": 3e-3, "device": "cpu"}
    train_run(TrainConfig(student=str(student), cache=(cache,), out=out, **defaults | options))
    return out


@pytest.fixture(scope="module")
def lora_run(folder, tags_cache) -> Path:
    """Adapters and a new head on a pretrained body, with a checkpoint on the way."""
    torch.manual_seed(1)
    BertModel(bert_config()).save_pretrained(folder / "body")
    return trained(
        folder / "body",
        tags_cache,
        folder / "lora",
        lora_rank=4,
        save_every=10,
        validation_cache=tags_cache,
    )


@pytest.fixture(scope="module")
def rows_run(folder, tokenizer_dir) -> Path:
    """Sequence classification, all weights, from scratch."""
    task = "sequence-classification"
    cache = write_cache(
        folder / "rows", tokenizer_dir, task, make_rows(task, ROWS), make_teacher(task)
    )
    bert_config(num_hidden_layers=1).save_pretrained(folder / "scratch")
    return trained(folder / "scratch", cache, folder / "rows-run")


@pytest.fixture(scope="module")
def text_run(folder, teacher_dir, cache_dir) -> Path:
    """A causal student: the teacher's weights, trained further."""
    return trained(teacher_dir, cache_dir, folder / "text-run", max_steps=4, learning_rate=1e-3)


def export(student: Path, out: Path, **options: Any) -> dict[str, Any]:
    return run(ExportConfig(student=student, out=out, **{"rows": 16} | options))


def some_inputs(model: Any, shape: tuple[int, int], names: list[str]) -> dict[str, torch.Tensor]:
    """Random tokens; of several rows the first is padded."""
    generator = torch.Generator().manual_seed(shape[1])
    ids_BT = torch.randint(3, 300, shape, generator=generator)
    mask_BT = torch.ones_like(ids_BT)
    if shape[0] > 1:
        ids_BT[0, -2:], mask_BT[0, -2:] = model.config.pad_token_id or 0, 0
    every = {
        "input_ids": ids_BT,
        "attention_mask": mask_BT,
        "token_type_ids": (torch.arange(shape[1]) > 2).long().repeat(shape[0], 1),
        "decoder_input_ids": ids_BT.flip(1)[:, : max(1, shape[1] - 3)],
    }
    return {name: every[name] for name in names}


def load(out: Path, **options: Any) -> Any:
    architecture = json.loads((out / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(out, **options).eval()


def test_merged_adapters_compute_what_the_adapters_do(lora_run, tmp_path):
    out = tmp_path / "out"
    export(lora_run, out)
    plain, adapters = load(out), load_student(lora_run)
    assert isinstance(adapters, PeftModel)
    names = ["input_ids", "attention_mask", "token_type_ids"]
    inputs = some_inputs(plain, (3, 20), names)
    with torch.no_grad():
        found, expected = plain(**inputs).logits, adapters(**inputs).logits
        with adapters.disable_adapter():
            assert (adapters(**inputs).logits - expected).abs().max() > 1e-2  # they do something
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not [path.name for path in out.rglob("*adapter*")]
    kinds = {path.suffix for path in out.rglob("*") if path.is_file()}
    assert kinds == {".json", ".safetensors", ".md"}


def test_pipelines_load_the_folders(lora_run, rows_run, text_run, tmp_path):
    for student, task in (
        (lora_run, "token-classification"),
        (rows_run, "text-classification"),
        (text_run, "text-generation"),
    ):
        export(student, tmp_path / task)
        assert f"pipeline_tag: {task}\n" in (tmp_path / task / "README.md").read_text()
    tags = pipeline("token-classification", model=str(tmp_path / "token-classification"))
    assert tags.model.config.id2label == dict(enumerate(TAGS))
    assert {each["entity"] for each in tags("the word of a day")} <= set(TAGS)
    rows = pipeline("text-classification", model=str(tmp_path / "text-classification"))
    assert rows("the word of a day")[0]["label"] in ("bad", "fair", "good")
    text = pipeline("text-generation", model=str(tmp_path / "text-generation"))
    made = text("the word", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    assert made.startswith("the word")
    assert len(made) > len("the word")
    assert text.model.config.use_cache


def test_a_checkpoint_can_be_exported(lora_run, tmp_path):
    found = export(lora_run / "checkpoint-10", tmp_path / "out", cache=None)
    assert found["files"][0]["check"]["max_difference"] < 1e-5
    early, late = load(tmp_path / "out"), load_student(lora_run)
    inputs = some_inputs(early, (1, 9), ["input_ids", "attention_mask"])
    (tmp_path / "unfinished" / "checkpoint-10").mkdir(parents=True)
    for name in ("run.yaml", "snapshot.json"):
        shutil.copy(lora_run / name, tmp_path / "unfinished")
    for path in (lora_run / "checkpoint-10").iterdir():
        shutil.copy(path, tmp_path / "unfinished" / "checkpoint-10")
    export(tmp_path / "unfinished" / "checkpoint-10", tmp_path / "other")
    assert torch.equal(early(**inputs).logits, load(tmp_path / "other")(**inputs).logits)
    assert (early(**inputs).logits - late(**inputs).logits).abs().max() > 1e-3


def test_the_scores_are_those_of_evaluate(lora_run, tags_cache, tmp_path):
    """Over all rows of a cache: another path through the data, another sum."""
    found = export(lora_run, tmp_path / "out", cache=tags_cache, rows=10 * ROWS)
    expected = evaluate(load_student(lora_run), open_cache(tags_cache), batch_tokens=500)
    check = found["files"][0]["check"]
    for scores in (check["student"], check["artefact"]):
        assert scores["metric"] == "entity_f1"
        assert scores["value"] == pytest.approx(expected["entity_f1"], abs=1e-9)
        assert scores["loss"] == pytest.approx(expected["loss"], abs=1e-5)
    assert check["decisions"] == open_cache(tags_cache).row_tokens.sum()
    assert found["checked_on"].startswith(f"{ROWS} rows of ")


@pytest.mark.parametrize("name", ["rows_run", "text_run"])
def test_the_loss_of_the_other_tasks_is_that_of_evaluate(name, request, tmp_path):
    student = request.getfixturevalue(name)
    found = export(student, tmp_path / "out", rows=10_000)
    config = yaml.safe_load((student / "run.yaml").read_text())
    cache = open_cache(Path(config["cache"][0]))
    expected = evaluate(load_student(student), cache, batch_tokens=2000)
    scores = found["files"][0]["check"]["artefact"]
    assert scores["loss"] == pytest.approx(expected["loss"], abs=1e-4)
    assert scores["value"] == pytest.approx(expected.get("accuracy"), abs=1e-9)


def test_differences_are_measured_on_the_rows(text_run, cache_dir, tmp_path):
    """bfloat16 weights, against both models run row by row, without padding."""
    out = tmp_path / "out"
    found = export(text_run, out, dtype="bfloat16", cache=cache_dir, rows=7)
    rounded, exact, cache = load(out, dtype="auto"), load_student(text_run), open_cache(cache_dir)
    assert rounded.dtype == torch.bfloat16
    numbers = np.linspace(0, cache.num_rows - 1, 7).astype(int)
    ids = [cache[int(number)].input_ids[None] for number in numbers]
    with torch.no_grad():
        pairs = [(exact(each).logits[0], rounded(each).logits[0].float()) for each in ids]
    differences = torch.cat([(one - other).abs().flatten() for one, other in pairs])
    equal = torch.cat([one.argmax(-1) == other.argmax(-1) for one, other in pairs])
    check = found["files"][0]["check"]
    # Rows of another length are rounded in another order.
    assert check["max_difference"] == pytest.approx(float(differences.max()), rel=0.2)
    assert check["mean_difference"] == pytest.approx(float(differences.mean()), rel=0.02)
    assert check["agreement"] == pytest.approx(float(equal.double().mean()), abs=0.02)
    assert check["decisions"] == len(equal)
    assert 0 < check["mean_difference"] < check["max_difference"]


@pytest.mark.parametrize("name", ["lora_run", "rows_run", "text_run"])
def test_onnx_and_int8_are_the_student_at_any_batch_and_length(name, request, tmp_path):
    student, out = request.getfixturevalue(name), tmp_path / "out"
    numbers = export(student, out, format=("onnx", "int8"), rows=30)
    assert not list(out.glob("*.safetensors"))
    exact = load_student(student)
    sessions = [
        onnxruntime.InferenceSession(out / "onnx" / file)
        for file in ("model.onnx", "model_int8.onnx")
    ]
    names = [each.name for each in sessions[0].get_inputs()]
    assert names == AutoTokenizer.from_pretrained(out).model_input_names
    for shape in ((1, 1), (1, 30), (3, 8), (5, 17)):
        inputs = some_inputs(exact, shape, names)
        with torch.no_grad():
            expected = exact(**inputs).logits.numpy()
        arrays = {key: tensor.numpy() for key, tensor in inputs.items()}
        (found,), (rounded,) = (session.run(["logits"], arrays) for session in sessions)
        assert found.shape == expected.shape
        real = inputs["attention_mask"].bool().numpy() if found.ndim == 3 else slice(None)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(found[real], expected[real], atol=1e-5 * scale, rtol=0)
        if found[real].size > 50:
            assert np.corrcoef(rounded[real].ravel(), expected[real].ravel())[0, 1] > 0.99
    of_onnx, of_int8 = numbers["files"]
    assert of_onnx["check"]["agreement"] == 1.0
    assert of_onnx["check"]["max_difference"] < 1e-4
    assert of_int8["check"]["agreement"] > 0.9
    assert of_int8["check"]["max_difference"] > of_onnx["check"]["max_difference"]
    assert of_int8["files"] == ("onnx/model_int8.onnx",)
    assert of_int8["bytes"] == (out / "onnx" / "model_int8.onnx").stat().st_size
    assert json.loads((out / "export.json").read_text()) == json.loads(json.dumps(numbers))


SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
BART: dict[str, Any] = {
    "vocab_size": 300,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForMaskedLM": ("BertConfig", SIZES),
    "BertForQuestionAnswering": ("BertConfig", SIZES),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128},
    ),
    "Qwen2ForCausalLM": ("Qwen2Config", SIZES | {"num_key_value_heads": 2}),
    "T5ForConditionalGeneration": (
        "T5Config",
        {"vocab_size": 300, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2},
    ),
    "MarianMTModel": ("MarianConfig", BART),
    "BartForConditionalGeneration": ("BartConfig", BART),
}


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FAMILIES)
def test_families_export_with_free_batch_and_length(architecture, tmp_path, tokenizer_dir):
    config_class, options = FAMILIES[architecture]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**options)
    model = getattr(transformers, architecture)(config).eval()
    model.save_pretrained(tmp_path / "student")
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "student")
    numbers = export(tmp_path / "student", tmp_path / "out", format=("onnx", "int8"))
    session = onnxruntime.InferenceSession(tmp_path / "out" / "onnx" / "model.onnx")
    names = [each.name for each in session.get_inputs()]
    outputs = [each.name for each in session.get_outputs()]
    for shape in ((1, 1), (2, 9), (4, 40)):
        inputs = some_inputs(model, shape, names)
        with torch.no_grad():
            expected = model(**inputs)
        found = session.run(None, {key: tensor.numpy() for key, tensor in inputs.items()})
        for name, array in zip(outputs, found, strict=True):
            np.testing.assert_allclose(array, expected[name].numpy(), atol=1e-5, rtol=0)
    assert numbers["files"][0]["check"]["agreement"] == 1.0


def test_what_cannot_be_traced_is_refused(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, input_ids):
            return {"logits": input_ids if input_ids.sum() > 0 else -input_ids}

    with pytest.raises(Refused, match=r"Odd: torch.onnx cannot trace this architecture"):
        write_onnx(Odd(), {"input_ids": torch.ones(2, 3).long()}, ["logits"], tmp_path / "m.onnx")


def test_the_code_of_the_card_runs(lora_run, text_run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for student in (lora_run, text_run):
        export(student, Path(student.name), format=("safetensors", "int8"))
        card = Path(student.name, "README.md").read_text()
        blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
        assert len(blocks) == 2
        for block in blocks:
            space: dict[str, Any] = {}
            exec(block, space)
        assert space["logits"].shape[-1] == (5 if student == lora_run else 300)
    assert "generated_text" in capsys.readouterr().out


def test_the_card_says_what_was_learnt_and_no_path(lora_run, tags_cache, folder, tmp_path):
    out = tmp_path / "fine-tags"
    numbers = export(lora_run, out)
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "library_name": "transformers",
        "tags": ["distillation", "teacher-cache"],
        "pipeline_tag": "token-classification",
    }
    result = json.loads((lora_run / "result.json").read_text())
    teacher = open_cache(tags_cache).manifest.teacher
    for fact in (
        "# fine-tags",
        f"| teacher | `{teacher.id}` ({teacher.parameters} parameters), revision `abc` |",
        f"| cache | `{open_cache(tags_cache).cache_id}` |",
        "| task | token-classification |",
        "| targets | dense |",
        "| losses | 1 x forward-kl at temperature 1; 0.5 x hard labels |",
        "| steps | 20 of 600 tokens |",
        "| adapters | LoRA of rank 4, merged |",
        f"| entity F1 | {result['validation']['teacher_entity_f1']:.4f} | "
        f"{result['validation']['entity_f1']:.4f} |",
        f"| `model.safetensors` | float32 | {numbers['files'][0]['bytes']:,} |",
    ):
        assert fact in card
    for path in out.rglob("*"):
        if path.suffix in (".md", ".json"):
            assert str(folder) not in path.read_text()
            assert str(tmp_path) not in path.read_text()


def test_without_a_cache_random_tokens_are_used_and_said(text_run, tmp_path, caplog):
    """A model that no run made, with its tokenizer."""
    export(text_run, tmp_path / "alone")
    with caplog.at_level(logging.WARNING):
        found = export(tmp_path / "alone", tmp_path / "out")
    assert found["checked_on"] == "16 rows of random tokens"
    assert "name a held-out one with --cache" in caplog.text
    assert found["files"][0]["check"]["student"] == {"loss": None, "metric": None, "value": None}
    lines = table(found).splitlines()
    assert lines[0].split() == ["size", "max", "diff", "mean", "diff", "argmax", "equal", "time"]
    assert lines[2].split()[:3] == [
        "safetensors,",
        "float32",
        f"{found['files'][0]['bytes'] / 1e6:.1f}",
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Training" not in card
    assert "on 16 rows of random tokens" in card


def refuse(kind: type[Exception], message: str, student: Path, out: Path, **options: Any) -> None:
    with pytest.raises(kind, match=message):
        export(student, out, **options)
    assert not out.exists()
    assert not [path for path in out.parent.iterdir() if path.name.startswith(".tmp")]


def test_what_is_no_student_is_refused(text_run, cache_dir, tmp_path):
    out = tmp_path / "out"
    refuse(Refused, "no such folder. Name the folder of a finished run", tmp_path / "no", out)
    refuse(Refused, "this is a cache, no student", cache_dir, out)
    (tmp_path / "empty").mkdir()
    refuse(Refused, r"expected config.json and \*.safetensors", tmp_path / "empty", out)
    started = tmp_path / "started"
    (started / "checkpoint-4").mkdir(parents=True)
    (started / "run.yaml").write_text((text_run / "run.yaml").read_text())
    refuse(Refused, r"no model yet.*or name one of its checkpoints \(checkpoint-4\)", started, out)


def test_what_does_not_fit_is_refused(lora_run, text_run, folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    other = tmp_path / "other"
    tokenizer = AutoTokenizer.from_pretrained(lora_run)
    tokenizer.add_tokens(["more"])
    write_cache(
        other,
        _saved(tokenizer, tmp_path),
        "token-classification",
        make_rows("token-classification", 9),
    )
    refuse(CacheMismatch, "its rows are of another tokenizer", lora_run, out, cache=other)
    with pytest.raises(ConfigError, match="--dtype bfloat16: it is the number type of"):
        ExportConfig(student=lora_run, out=out, format=("onnx",), dtype="bfloat16")
    monkeypatch.setattr("student_train.export.onnx_files.find_spec", lambda name: None)
    refuse(
        ConfigError,
        r"need onnx, onnxscript, onnxruntime: pip install 'teacher-cache\[onnx\]'",
        text_run,
        out,
        format=("int8",),
    )
    (folder / "body").rename(folder / "moved")
    try:
        refuse(Refused, r"adapters belong on the weights of .*body, which cannot", lora_run, out)
    finally:
        (folder / "moved").rename(folder / "body")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(Refused, match=r"not empty. Nothing is overwritten"):
        export(text_run, tmp_path / "full")


def _saved(tokenizer: Any, folder: Path) -> Path:
    tokenizer.save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"
