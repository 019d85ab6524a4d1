"""Smaller models of picked blocks: equal to the teacher with its other blocks left out."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoTokenizer

from shared.errors import ConfigError, Refused
from student_train.config import TrainConfig
from student_train.run.run import run as train
from teacher_cache.config import StudentConfig
from teacher_cache.tools.layers import run
from tests.conftest import llama_config

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
}
BART: dict[str, Any] = {
    "vocab_size": 300,
    "d_model": 32,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 128,
}
KINDS = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
# Class of the model -> class and values of its config: 4 blocks of 32 channels each.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "BertForTokenClassification": ("BertConfig", SIZES | {"num_labels": 5}),
    "BertForMaskedLM": ("BertConfig", SIZES),
    "RobertaForSequenceClassification": ("RobertaConfig", SIZES),
    "DistilBertForQuestionAnswering": (
        "DistilBertConfig",
        {"vocab_size": 300, "dim": 32, "hidden_dim": 64, "n_layers": 4, "n_heads": 2},
    ),
    "ModernBertForMaskedLM": ("ModernBertConfig", SIZES | {"pad_token_id": 0}),
    "GPT2LMHeadModel": (
        "GPT2Config",
        {"vocab_size": 300, "n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 128},
    ),
    "LlamaForCausalLM": ("LlamaConfig", SIZES),
    "Qwen2ForCausalLM": (
        "Qwen2Config",
        SIZES
        | {
            "num_key_value_heads": 2,
            "use_sliding_window": True,
            "sliding_window": 4,
            "max_window_layers": 2,
        },
    ),
    "Qwen3ForCausalLM": ("Qwen3Config", SIZES | {"head_dim": 16, "num_key_value_heads": 2}),
    "Gemma3ForCausalLM": (
        "Gemma3TextConfig",
        SIZES
        | {"head_dim": 16, "num_key_value_heads": 2, "sliding_window": 4, "layer_types": KINDS},
    ),
    "T5ForConditionalGeneration": (
        "T5Config",
        {
            "vocab_size": 300,
            "d_model": 32,
            "d_kv": 16,
            "d_ff": 64,
            "num_layers": 4,
            "num_decoder_layers": 4,
            "num_heads": 2,
        },
    ),
    "BartForConditionalGeneration": ("BartConfig", BART),
    "MarianMTModel": ("MarianConfig", BART | {"pad_token_id": 0, "decoder_start_token_id": 0}),
}


def make_teacher(architecture: str, folder: Path, tokenizer_dir: Path, **changes: Any) -> Any:
    """A random one with weights large enough that each block matters."""
    config_class, options = MODELS[architecture]
    config = getattr(transformers, config_class)(**options | changes)
    torch.manual_seed(0)
    model = getattr(transformers, architecture)(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.mul_(4)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder)
    return model


def outputs(model: Any) -> torch.Tensor:
    ids = torch.randint(3, 300, (2, 11), generator=torch.Generator().manual_seed(3))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids[:, :7].flip(1)
    with torch.no_grad():
        return model.eval()(**inputs)[0]


def pick(teacher: Path, out: Path, layers: str, **options: Any) -> Any:
    """The student as plain transformers loads it, with nothing missing and nothing left over."""
    made = run(StudentConfig(teacher=str(teacher), out=out, layers=layers, **options))
    model, loaded = getattr(transformers, made.architecture).from_pretrained(
        out, output_loading_info=True
    )
    assert not loaded["missing_keys"]
    assert not loaded["unexpected_keys"]
    return model


@pytest.mark.parametrize("architecture", MODELS)
def test_all_blocks_are_the_teacher_bit_for_bit(architecture, tmp_path, tokenizer_dir):
    teacher = make_teacher(architecture, tmp_path / "teacher", tokenizer_dir)
    student = pick(tmp_path / "teacher", tmp_path / "out", "0,1,2,3")
    assert torch.equal(outputs(student), outputs(teacher))
    ours, theirs = student.config.to_dict(), teacher.config.to_dict()
    assert ours | {"_name_or_path": ""} == theirs
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()


def lists_of(model: Any, teacher: Any) -> list[torch.nn.ModuleList]:
    """Every list of blocks of a kind that the teacher has 4 of, in the order of the model."""
    lists = [
        [m for m in x.modules() if isinstance(m, torch.nn.ModuleList)] for x in (model, teacher)
    ]
    kinds = {type(each[0]) for each in lists[1] if len(each) == 4}
    return [each for each in lists[0] if type(each[0]) in kinds]


@pytest.mark.parametrize("architecture", MODELS)
def test_picked_blocks_are_the_teachers(architecture, tmp_path, tokenizer_dir, caplog):
    teacher = make_teacher(architecture, tmp_path / "teacher", tokenizer_dir)
    # Block 0 of ModernBERT has no norm of its own, so no other one can take its place.
    picked = (0, 3) if architecture.startswith("ModernBert") else (1, 3)
    student = pick(tmp_path / "teacher", tmp_path / "out", ",".join(map(str, picked)))
    pairs = list(zip(lists_of(student, teacher), lists_of(teacher, teacher), strict=True))
    assert len(pairs) == (2 if teacher.config.is_encoder_decoder else 1)
    for ours, theirs in pairs:
        for block, source in zip(ours, (theirs[number] for number in picked), strict=True):
            weights = block.state_dict()
            for name, weight in source.state_dict().items():
                assert torch.equal(weights[name], weight), name
    # The same function as the teacher when its other blocks hand on what they get.
    assert not caplog.records
    assert not torch.allclose(outputs(student), outputs(teacher), atol=1e-3)


def test_lists_over_layers_are_cut_with_them(tmp_path, tokenizer_dir):
    make_teacher("Gemma3ForCausalLM", tmp_path / "teacher", tokenizer_dir)
    student = pick(tmp_path / "teacher", tmp_path / "out", "0,1,3")
    assert student.config.layer_types == [KINDS[0], KINDS[1], KINDS[3]]
    assert student.config.num_hidden_layers == 3


def test_a_block_that_fits_no_other_place_is_refused(tmp_path, tokenizer_dir):
    make_teacher("ModernBertForMaskedLM", tmp_path / "teacher", tokenizer_dir)
    with pytest.raises(Refused, match=r"layers.1.attn_norm.weight has no place.*Keep block 0"):
        pick(tmp_path / "teacher", tmp_path / "out", "1,3")
    assert not (tmp_path / "out").exists()


def test_encoder_and_decoder_are_picked_apart(tmp_path, tokenizer_dir):
    teacher = make_teacher("MarianMTModel", tmp_path / "teacher", tokenizer_dir)
    student = pick(tmp_path / "teacher", tmp_path / "out", "0,1,2", decoder_layers="3")
    assert (len(student.get_encoder().layers), len(student.get_decoder().layers)) == (3, 1)
    for name, weight in teacher.get_decoder().layers[3].state_dict().items():
        assert torch.equal(student.get_decoder().layers[0].state_dict()[name], weight)


def test_t5_without_block_0_keeps_its_position_bias(tmp_path, tokenizer_dir):
    teacher = make_teacher("T5ForConditionalGeneration", tmp_path / "teacher", tokenizer_dir)
    student = pick(tmp_path / "teacher", tmp_path / "out", "2,3")
    name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert torch.equal(student.state_dict()[name], teacher.state_dict()[name])


def test_a_block_that_knows_its_number_is_warned_of(tmp_path, tokenizer_dir, caplog):
    """This GPT-2 divides the attention of block n by n + 1."""
    make_teacher(
        "GPT2LMHeadModel",
        tmp_path / "teacher",
        tokenizer_dir,
        scale_attn_by_inverse_layer_idx=True,
    )
    pick(tmp_path / "teacher", tmp_path / "out", "0,3")
    assert "they depend on their number" in caplog.text


def test_weights_keep_their_type_and_stay_tied(tmp_path, tokenizer_dir):
    model = make_teacher("GPT2LMHeadModel", tmp_path / "float32", tokenizer_dir)
    model.bfloat16().save_pretrained(tmp_path / "teacher")
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "teacher")
    pick(tmp_path / "teacher", tmp_path / "out", "0,3")
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in saved


def test_a_run_takes_the_folder_as_its_student(teacher_dir, cache_dir, tmp_path):
    made = run(StudentConfig(teacher=str(teacher_dir), layers="1", out=tmp_path / "student"))
    assert f"1 of 2; {made.parameters:,} of " in made.text
    result = train(
        TrainConfig(
            student=str(tmp_path / "student"),
            cache=(cache_dir,),
            out=tmp_path / "run",
            max_steps=2,
            batch_tokens=500,
            device="cpu",
        )
    )
    assert result["parameters"] == made.parameters


@pytest.mark.parametrize("layers", ["3,1", "1,1", "", "1,x", "-1", "0-3", "0,,1"])
def test_numbers_that_do_not_ascend_are_refused(layers, tmp_path):
    with pytest.raises(ConfigError, match=r"--layers .*ascending and each once, such as 0,3,5"):
        StudentConfig(teacher="t", layers=layers, out=tmp_path)
    with pytest.raises(ConfigError, match="--decoder-layers"):
        StudentConfig(teacher="t", layers="0", decoder_layers=layers, out=tmp_path)


def test_what_cannot_be_picked_is_refused(teacher_dir, tokenizer_dir, tmp_path):
    def refuse(message: str, kind: type[Refused] = Refused, **options: Any) -> None:
        defaults = {"teacher": str(teacher_dir), "layers": "0", "out": tmp_path / "out"}
        with pytest.raises(kind, match=message):
            run(StudentConfig(**defaults | options))
        assert not (tmp_path / "out").exists()

    refuse(r"--layers 0,2: there is no block 2, LlamaForCausalLM has 2 \(0 to 1\)", layers="0,2")
    refuse("--decoder-layers: LlamaForCausalLM is no encoder-decoder", decoder_layers="0")
    refuse("no model could be loaded", teacher=str(tokenizer_dir))
    config = llama_config(architectures=["NoSuchModel"])
    config.save_pretrained(tmp_path / "unknown")
    refuse("architecture NoSuchModel, which is none of", teacher=str(tmp_path / "unknown"))
    albert = transformers.AlbertForMaskedLM(
        transformers.AlbertConfig(**SIZES | {"embedding_size": 16})
    )
    albert.save_pretrained(tmp_path / "shared")
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(tmp_path / "shared")
    refuse("config speaks of 4 blocks, but the model has 0 lists", teacher=str(tmp_path / "shared"))


def test_a_folder_that_is_not_empty_is_refused(teacher_dir, tmp_path):
    (tmp_path / "mine").write_text("mine")
    with pytest.raises(Refused, match="Nothing is overwritten"):
        run(StudentConfig(teacher=str(teacher_dir), layers="0", out=tmp_path))
    assert (tmp_path / "mine").read_text() == "mine"
