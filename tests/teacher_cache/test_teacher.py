"""The teacher against the plain model: logits, hidden states, packing, and what is refused."""

import logging

import pytest
import torch
import transformers
from accelerate import dispatch_model
from tokenizers import Tokenizer, models
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from shared.errors import ConfigError, Refused
from teacher_cache.engines import streamed_head
from teacher_cache.engines.streamed_head import TeacherBatch
from teacher_cache.engines.teacher import Teacher, config_hash, load_tokenizer, weights_digest

V, NUM_IDS = 120, 110
_SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_GPT = {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_OPT = _SIZES | {"ffn_dim": 48}
_BART = {
    "vocab_size": V,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}

FAMILIES = {
    "llama": ("LlamaConfig", _GROUPED),
    "mistral": ("MistralConfig", _GROUPED | {"sliding_window": 4}),
    "mixtral": ("MixtralConfig", _GROUPED | {"num_local_experts": 4}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", _GROUPED | {"head_dim": 8}),
    "qwen3-moe": ("Qwen3MoeConfig", _GROUPED | _EXPERTS | {"head_dim": 8}),
    "gpt2": ("GPT2Config", _GPT),
    "gpt-j": ("GPTJConfig", _GPT | {"rotary_dim": 4}),
    "gpt-neox": ("GPTNeoXConfig", _SIZES),
    "opt": ("OPTConfig", _OPT),
    "opt-projected": (
        "OPTConfig",
        _OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    ),
    "bloom": ("BloomConfig", {"vocab_size": V, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "phi": ("PhiConfig", _GROUPED),
    "phi3": ("Phi3Config", _GROUPED),
    "gemma2": ("Gemma2Config", _GROUPED | {"head_dim": 8, "sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", _GROUPED | {"head_dim": 8, "sliding_window": 4}),
    "cohere": ("CohereConfig", _GROUPED | {"logit_scale": 0.25}),
    "granite": ("GraniteConfig", _GROUPED | {"logits_scaling": 3.0}),
    "olmo2": ("Olmo2Config", _GROUPED),
    "mamba": ("MambaConfig", {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2}),
    "bart": ("BartConfig", _BART),
}
PACKABLE = {
    "llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3-moe", "gpt2", "gpt-j", "gpt-neox",
    "phi", "phi3", "gemma2", "gemma3", "cohere", "granite", "olmo2",
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{i}": i for i in range(NUM_IDS)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "w0")))


def build(family: str, **changes):
    """Weights five times larger than usual, so that attention and caps have something to do."""
    name, fields = FAMILIES[family]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, name)(**fields | changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model.requires_grad_(False)  # Mamba computes otherwise where a gradient is wanted


def padded_batch() -> TeacherBatch:
    """Rows of 11, 6 and 1 tokens; positions out of order and not everywhere."""
    mask_BT = torch.zeros(3, 11, dtype=torch.long)
    for row, length in enumerate((11, 6, 1)):
        mask_BT[row, :length] = 1
    return TeacherBatch(
        input_ids=torch.randint(NUM_IDS, (3, 11), generator=torch.Generator().manual_seed(5)),
        attention_mask=mask_BT,
        position_index=torch.tensor([14, 0, 3, 10, 11, 5, 22, 16]),
    )


def rows_at_positions(value_BTX: Tensor, batch: TeacherBatch) -> Tensor:
    return value_BTX.flatten(0, 1)[batch.position_index]


@torch.no_grad()
def plain_forward(model, batch: TeacherBatch, **options):
    return model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **options
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_are_the_models_own(family, tokenizer):
    """2e-5 of the largest logit: one matrix product of another shape in float32."""
    model, batch = build(family), padded_batch()
    full_NV = rows_at_positions(plain_forward(model, batch).logits, batch)
    teacher = Teacher.wrap(model, tokenizer)
    assert teacher.streamed is not None
    for chunk_positions in (1, 3, 8, 100):
        chunks = list(teacher.forward(batch, chunk_positions=chunk_positions).chunks)
        places = [place for here, _ in chunks for place in range(here.start, here.stop)]
        assert places == list(range(8))
        streamed_NV = torch.cat([logits_nV for _, logits_nV in chunks])
        tolerance = 2e-5 * full_NV.abs().max().item()
        torch.testing.assert_close(streamed_NV, full_NV, rtol=0, atol=tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_the_model_reports(family, tokenizer):
    model, batch = build(family), padded_batch()
    reported = plain_forward(model, batch, output_hidden_states=True).hidden_states
    head_inputs: list[Tensor] = []
    handle = model.get_output_embeddings().register_forward_pre_hook(
        lambda _, arguments: head_inputs.append(arguments[0])
    )
    plain_forward(model, batch)
    handle.remove()
    teacher = Teacher.wrap(model, tokenizer)
    hidden = teacher.forward(batch, layers=(-1, 0, 1)).hidden
    assert sorted(hidden) == [-1, 0, 1]
    assert torch.equal(hidden[-1], rows_at_positions(head_inputs[0], batch))
    if family != "opt-projected":  # reports the state before its projection to the head's width
        assert torch.equal(hidden[-1], rows_at_positions(reported[-1], batch))
    after_block_0 = reported[0 if family == "mamba" else 1]  # mamba leaves the embedding out
    assert torch.equal(hidden[0], rows_at_positions(after_block_0, batch))
    for states_ND in hidden.values():
        assert states_ND.abs().sum(dim=1).min() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_packing_is_allowed_where_it_is_exact(family, tokenizer):
    assert Teacher.wrap(build(family), tokenizer).allows_packing() == (family in PACKABLE)


@pytest.mark.parametrize("family", sorted(PACKABLE))
def test_packed_documents_get_what_they_get_alone(family, tokenizer):
    """Through `forward`, as a job does it; 1e-4 of the largest logit: sums of other shapes."""
    teacher = Teacher.wrap(build(family), tokenizer)
    ids_BT = torch.randint(NUM_IDS, (1, 15), generator=torch.Generator().manual_seed(6))
    lengths = (4, 1, 7, 3)
    packed = TeacherBatch(
        input_ids=ids_BT,
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        position_index=torch.arange(15),
    )
    alone = [
        TeacherBatch(input_ids=part_BT, position_index=torch.arange(part_BT.numel()))
        for part_BT in ids_BT.split(lengths, dim=1)
    ]
    expected_NV = torch.cat([teacher.logits(batch) for batch in alone])
    tolerance = 1e-4 * expected_NV.abs().max().item()
    torch.testing.assert_close(teacher.logits(packed), expected_NV, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_pass_the_probes_and_still_tell_mixing(dtype, tokenizer):
    for family, allowed in (("llama", True), ("gpt2", True), ("qwen3-moe", True), ("opt", False)):
        teacher = Teacher.wrap(build(family).to(dtype), tokenizer)
        assert teacher.streamed is not None, family
        assert teacher.allows_packing() == allowed, family


class _ScaledByPlace(nn.Module):
    """A head that is no function of one position: chunks of positions must get it wrong."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head
        self.weight = head.weight

    def forward(self, states_BTD: Tensor) -> Tensor:
        place_T = torch.arange(states_BTD.shape[1]) + 1
        return self.head(states_BTD) * place_T[:, None]


def test_a_head_that_cannot_be_streamed_falls_back_to_full_logits(tokenizer, caplog):
    model, batch = build("llama"), padded_batch()
    model.set_output_embeddings(_ScaledByPlace(model.lm_head))
    full_NV = rows_at_positions(plain_forward(model, batch).logits, batch)
    with caplog.at_level(logging.WARNING):
        teacher = Teacher.wrap(model, tokenizer)
    assert teacher.streamed is None
    assert "LlamaForCausalLM" in caplog.text
    assert "much more memory" in caplog.text
    output = teacher.forward(batch, layers=(-1, 0), chunk_positions=3)
    assert torch.equal(torch.cat([logits_nV for _, logits_nV in output.chunks]), full_NV)
    assert sorted(output.hidden) == [-1, 0]


def test_the_head_never_sees_all_positions(tokenizer):
    teacher, batch = Teacher.wrap(build("llama"), tokenizer), padded_batch()
    widths: list[int] = []
    teacher.model.lm_head.register_forward_hook(
        lambda _, arguments, __: widths.append(arguments[0][..., 0].numel())
    )
    list(teacher.forward(batch, chunk_positions=4).chunks)
    assert widths == [3, 4, 4]  # one token of each row with the trunk, then the chunks


def test_the_model_is_left_as_it_was(tokenizer):
    model, batch = build("llama"), padded_batch()
    before = plain_forward(model, batch).logits
    teacher = Teacher.wrap(model, tokenizer)
    list(teacher.forward(batch, layers=(-1, 0)).chunks)
    assert torch.equal(plain_forward(model, batch).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


def test_classes_end_with_the_tokenizer_or_with_the_logits(tokenizer):
    assert Teacher.wrap(build("llama"), tokenizer).num_classes == NUM_IDS
    assert Teacher.wrap(build("llama", vocab_size=100), tokenizer).num_classes == 100


def test_layers_are_checked(tokenizer):
    teacher = Teacher.wrap(build("llama"), tokenizer)
    for family in ("llama", "gpt2", "gemma3", "mamba", "bart"):
        Teacher.wrap(build(family), tokenizer).check_layers((-1, 0, 1))
    for layer in (-2, 2):
        with pytest.raises(ConfigError, match=f"hidden_layers={layer}: expected -1 .* 0 to 1"):
            teacher.check_layers((layer,))
    with pytest.raises(Refused, match="hidden_layers=-1: 16 channels, where OPTForCausalLM has 32"):
        Teacher.wrap(build("opt-projected"), tokenizer).check_layers((-1,))


def test_hidden_states_of_a_model_split_over_devices(tokenizer, tmp_path):
    """Blocks on disk are loaded as they run; late layers have come back as zeros (#36636)."""
    from accelerate import dispatch_model

    model, batch = build("llama"), padded_batch()
    whole = Teacher.wrap(model, tokenizer).forward(batch, layers=(-1, 0, 1))
    expected_NV = torch.cat([logits_nV for _, logits_nV in whole.chunks])
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "disk", "model.rotary_emb": "cpu", "lm_head": "disk"}
    split_model = dispatch_model(
        model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True
    )
    split = Teacher.wrap(split_model, tokenizer).forward(batch, layers=(-1, 0, 1))
    for layer, states_ND in split.hidden.items():
        assert states_ND.any()
        assert torch.equal(states_ND, whole.hidden[layer])
    assert torch.equal(torch.cat([logits_nV for _, logits_nV in split.chunks]), expected_NV)


def test_a_bidirectional_model_is_refused(tokenizer):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers.BertConfig(**_SIZES))
    with pytest.raises(Refused, match=r"BertLMHeadModel: .* depends on later tokens"):
        Teacher.wrap(model, tokenizer)


def test_load_gives_the_saved_model(tokenizer, tmp_path):
    model, batch = build("gpt2"), padded_batch()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    teacher = Teacher.load(str(tmp_path), device="cpu")
    assert teacher.dtype == torch.float32
    assert teacher.revision is None
    full_NV = rows_at_positions(plain_forward(model, batch).logits, batch)
    torch.testing.assert_close(teacher.logits(batch), full_NV)
    assert weights_digest(teacher.model) == weights_digest(model)
    assert config_hash(teacher.model) == config_hash(model)
    half = Teacher.load(str(tmp_path), device="cpu", dtype="bfloat16", attn_implementation="eager")
    assert (half.dtype, half.attn_implementation) == (torch.bfloat16, "eager")
    assert config_hash(half.model) == config_hash(model)


def test_fingerprints_notice_one_bit_and_one_setting():
    model = build("llama")
    digest, settings = weights_digest(model), config_hash(model)
    with torch.no_grad():
        model.model.norm.weight.view(torch.int32)[0] ^= 1
    assert weights_digest(model) != digest
    model.config.rms_norm_eps = 1e-3
    assert config_hash(model) != settings


def test_load_refuses_what_is_not_there(tokenizer, tmp_path):
    with pytest.raises(Refused, match="no such folder"):
        Teacher.load(str(tmp_path / "missing"))
    with pytest.raises(Refused, match="no such folder"):
        Teacher.load("./missing")
    with pytest.raises(Refused, match=r"no config\.json here"):
        Teacher.load(str(tmp_path))
    config_only = tmp_path / "config-only"
    build("llama").config.save_pretrained(config_only)
    with pytest.raises(Refused, match="no tokenizer can be loaded; save one there"):
        Teacher.load(str(config_only))
    tokenizer.save_pretrained(config_only)
    with pytest.raises(Refused, match="cannot be loaded for causal-lm"):
        Teacher.load(str(config_only))


def test_load_refuses_a_tokenizer_made_up_from_nothing(tmp_path):
    """transformers builds a GPT-2 tokenizer of one token where there are no files."""
    build("gpt2").save_pretrained(tmp_path)
    with pytest.raises(Refused, match="special tokens only"):
        load_tokenizer(str(tmp_path))


def test_load_refuses_a_checkpoint_without_its_head(tokenizer, tmp_path):
    build("llama").model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(Refused, match=r"lacks 1 weights of LlamaForCausalLM \(lm_head.weight\)"):
        Teacher.load(str(tmp_path), device="cpu")


@pytest.mark.parametrize(
    "options", [{"dtype": "int3"}, {"device": "quantum"}, {"device": "cuda:99"}]
)
def test_load_refuses_unusable_options(options):
    if options.get("device") == "cuda:99" and torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    with pytest.raises(ConfigError, match=f"{next(iter(options))}="):
        Teacher.load("anything", **options)


def test_a_batch_is_padded_or_packed():
    ids_BT = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"padded.*packed"):
        TeacherBatch(
            input_ids=ids_BT, position_index=ids_BT[0], attention_mask=ids_BT, position_ids=ids_BT
        )


def test_a_batch_without_positions(tokenizer):
    teacher, full = Teacher.wrap(build("llama"), tokenizer), padded_batch()
    empty = TeacherBatch(
        input_ids=full.input_ids,
        attention_mask=full.attention_mask,
        position_index=torch.empty(0, dtype=torch.long),
    )
    output = teacher.forward(empty, layers=(-1,))
    assert list(output.chunks) == []
    assert output.hidden[-1].shape == (0, 32)


def test_private_names_we_lean_on_exist():
    """A transformers that renames these shall fail here and not in the middle of a job."""
    model = build("llama")
    assert model.config._attn_implementation
    assert streamed_head.accepts(model, "use_cache")
    assert "position_ids" in streamed_head.model_inputs(
        model,
        TeacherBatch(
            input_ids=torch.zeros(1, 2, dtype=torch.long),
            position_ids=torch.arange(2)[None],
            position_index=torch.arange(2),
        ),
    )


@pytest.mark.parametrize(
    ("family", "trunk", "blocks"),
    [("llama", "model", "layers"), ("qwen3", "model", "layers"), ("gpt2", "transformer", "h")],
)
def test_hidden_states_under_a_device_map_are_those_of_one_device(
    family, trunk, blocks, tokenizer, tmp_path
):
    """Half of the map: the second block's weights come from the disk for each forward, by the hooks
    that also move states between devices. Moving them needs two real devices."""
    layers = (0, 1, -1)
    one = Teacher.wrap(build(family), tokenizer).forward(padded_batch(), layers)
    spread = build(family)
    parts = [name for name, _ in spread.get_submodule(trunk).named_children() if name != blocks]
    places = {f"{trunk}.{name}": "cpu" for name in parts} | {"lm_head": "cpu"}
    places |= {f"{trunk}.{blocks}.0": "cpu", f"{trunk}.{blocks}.1": "disk"}
    dispatch_model(spread, places, main_device="cpu", offload_dir=tmp_path)
    assert {p.device.type for p in spread.parameters()} == {"cpu", "meta"}
    teacher = Teacher.wrap(spread, tokenizer)
    teacher.check_layers(layers)
    two = teacher.forward(padded_batch(), layers)
    assert teacher.streamed is not None
    for layer in layers:
        assert two.hidden[layer].any(dim=1).all()
        assert torch.equal(two.hidden[layer], one.hidden[layer])
    assert torch.equal(*(torch.cat([part for _, part in out.chunks]) for out in (one, two)))
