"""A finished cache: nothing is loaded to say so, and another teacher is never taken for its own."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import teacher_cache.job.run as job
from shared import open_cache
from shared.errors import CacheMismatch
from shared.format.commits import commit_name
from shared.storage.local import LocalStorage
from teacher_cache.config import CaptureConfig
from teacher_cache.engines.teacher import Teacher
from tests.conftest import llama_config
from tests.shared.storage.test_local import tree

SMALL = {"limit_documents": 20, "shard_tokens": 700, "max_length": 64, "top_k": 8, "device": "cpu"}


@pytest.fixture
def teacher(teacher_dir, tmp_path) -> Path:
    return Path(shutil.copytree(teacher_dir, tmp_path / "teacher"))


@pytest.fixture
def loads(monkeypatch):
    """What is loaded as a teacher from here on."""
    found, original = [], Teacher.load.__func__

    def load(cls, name, **options):
        found.append(name)
        return original(cls, name, **options)

    monkeypatch.setattr(Teacher, "load", classmethod(load))
    return found


@pytest.fixture
def options(teacher, corpus_file, tmp_path):
    return SMALL | {
        "teacher": str(teacher),
        "corpus": str(corpus_file),
        "out": tmp_path / "cache",
    }


def run(options, **changes):
    job.run(CaptureConfig(**options | changes))


def change_weights(folder, name="model.norm.weight"):
    weights = load_file(folder / "model.safetensors")
    weights[name] = weights[name] + 0.01
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "changes", [{}, {"dtype": "bfloat16"}, {"hidden_layers": (-1,), "temperature": (2.0,)}]
)
def test_a_finished_cache_loads_no_teacher(options, loads, changes, caplog):
    run(options, **changes)
    before = {name: (options["out"] / name).read_bytes() for name in tree(options["out"])}
    assert loads == [options["teacher"]]
    with caplog.at_level("INFO"):
        run(options, **changes)
    assert loads == [options["teacher"]]
    assert {name: (options["out"] / name).read_bytes() for name in before} == before
    shards = len(open_cache(options["out"]).commits)
    assert f"{shards} of {shards} shards done" in caplog.text


def test_a_teacher_whose_head_is_its_embedding_is_not_loaded_either(options, loads, teacher):
    """The two share one tensor, which is in the files under one of its names."""
    model = LlamaForCausalLM(llama_config(tie_word_embeddings=True))
    model.save_pretrained(teacher)
    assert len(load_file(teacher / "model.safetensors")) == len(model.state_dict()) - 1
    for _ in range(2):
        run(options)
    assert len(loads) == 1


def test_a_teacher_in_several_files_is_not_loaded_either(options, loads, teacher):
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    (teacher / "model.safetensors").unlink()
    model.save_pretrained(teacher, max_shard_size="20KB")
    assert len(list(teacher.glob("*.safetensors"))) > 2
    for _ in range(2):
        run(options)
    assert len(loads) == 1


@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight"])
def test_other_weights_in_the_same_folder_are_refused(options, loads, teacher, name):
    run(options)
    change_weights(teacher, name)
    with pytest.raises(CacheMismatch, match=r"teacher\.weights_digest: the cache has "):
        run(options)
    assert len(loads) == 2


def test_an_adapter_that_was_put_beside_the_weights_is_looked_at(options, loads, teacher):
    run(options)
    (teacher / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(Exception, match=r"."):  # whatever loading it says
        run(options)
    assert len(loads) == 2


def test_a_teacher_that_wrote_the_targets_is_loaded(teacher, tmp_path, loads):
    """How it writes is in its generation_config.json, which may have been changed since."""
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"prompt": "the quick"}\n{"prompt": "brown fox"}\n')
    options = {"teacher": str(teacher), "corpus": str(corpus), "out": tmp_path / "cache"}
    options |= {"generate": True, "max_new_tokens": 4, "max_length": 32, "device": "cpu"}
    for _ in range(2):
        run(options)
    assert len(loads) == 2


def test_another_dtype_is_refused(options):
    run(options)
    with pytest.raises(CacheMismatch, match=r"teacher\.dtype: the cache has 'float32'"):
        run(options, dtype="bfloat16")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"top_k": 9}, r"targets\.top_k: the cache has 8"),
        ({"max_length": 32}, r"preprocessing\.max_length: the cache has 64"),
        ({"limit_documents": 19}, r"corpus\."),
        ({"temperature": (2.0,)}, r"targets\.temperatures"),
        ({"hidden_layers": (-1,)}, r"hidden\.layers"),
        ({"seed": 5}, "seed: the cache has"),
        ({"targets": "none", "top_k": None}, "teacher: the cache has"),
    ],
)
def test_other_options_are_refused_as_of_an_unfinished_cache(options, change, message):
    run(options)
    with pytest.raises(CacheMismatch, match=message) as of_finished:
        run(options, **change)
    LocalStorage(options["out"]).delete(commit_name(0))
    with pytest.raises(CacheMismatch) as of_unfinished:
        run(options, **change)
    assert str(of_finished.value) == str(of_unfinished.value)


def test_a_checkpoint_that_cannot_be_read_by_name_is_loaded(options, loads, teacher):
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    torch.save(model.state_dict(), teacher / "pytorch_model.bin")
    (teacher / "model.safetensors").unlink()
    for _ in range(2):
        run(options)
    assert len(loads) == 2
