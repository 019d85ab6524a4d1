"""Encoder-decoders as students: batches, loss and gradient, fit, runs, what they write."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from shared.cache import Cache, open_cache
from shared.errors import CacheMismatch, ConfigError
from student_train.cli import _evaluation_text
from student_train.compare.report import compare
from student_train.compare.table import table
from student_train.config import AdapterSpec, CompareConfig, EvaluateConfig, TrainConfig
from student_train.data.arrange import PAIRS
from student_train.data.collate import Counts, Shape, columns_of, without_rows
from student_train.evaluate.evaluate import evaluate
from student_train.evaluate.evaluate import run as run_evaluate
from student_train.evaluate.writing import Writing, sources_of, write
from student_train.loss.attachment import attach
from student_train.loss.objective import Objective
from student_train.loss.spec import LossSpec
from student_train.run.run import run
from student_train.student.adapters import add_adapters
from student_train.student.build import build_student, load_config
from student_train.student.fit import check_fit
from tests.conftest import llama_config
from tests.seq2seq import (
    END,
    FAMILIES,
    PAD,
    capture,
    make_config,
    make_corpus,
    make_model,
    make_teachers,
    make_tokenizer,
    sides,
)
from tests.student_train.loss.test_attachment import batches

KINDS: dict[str, dict[str, Any]] = {
    "dense": {"hidden_layers": (-1, 0)},
    "topk": {"top_k": 6, "targets": "topk"},
    "adaptive": {"targets": "adaptive"},
    "sample": {"targets": "sample"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    return make_teachers(tmp_path_factory.mktemp("seq2seq"))


@pytest.fixture(scope="module")
def caches(tmp_path_factory, files) -> dict[str, Path]:
    """What a T5 says, in every kind; `held out` of other rows."""
    folder = tmp_path_factory.mktemp("caches")
    corpus = make_corpus(folder / "corpus.jsonl")
    teacher = str(files / "t5")
    made = {
        kind: capture(folder / kind, corpus, teacher=teacher, **options).path
        for kind, options in KINDS.items()
    }
    other = make_corpus(folder / "other.jsonl", 20, seed=1)
    made["held out"] = capture(folder / "held-out", other, teacher=teacher).path
    return made


@pytest.fixture
def config_dir(tmp_path: Path) -> Path:
    """A BART from scratch whose own tokens are not those of the caches."""
    config = make_config("bart", decoder_layers=1, forced_eos_token_id=7, decoder_start_token_id=9)
    config.save_pretrained(tmp_path / "config")
    return tmp_path / "config"


@pytest.fixture
def train(caches, config_dir, tmp_path):
    """Trains a student; keyword arguments are options of TrainConfig."""

    def make(**options: Any) -> dict[str, Any]:
        defaults: dict[str, Any] = {
            "student": str(config_dir),
            "cache": (caches["dense"],),
            "out": tmp_path / "run",
            "max_steps": 4,
            "batch_tokens": 400,
            "learning_rate": 3e-3,
            "device": "cpu",
        }
        return run(TrainConfig(**defaults | options))

    return make


def objective(cache: Cache, **changes: Any) -> Objective:
    options: dict[str, Any] = {
        "spec": LossSpec(),
        "num_classes": cache.manifest.targets.num_classes,
        "target_kind": cache.manifest.targets.kind,
        "soft_weight": 1.0,
        "hard_weight": 0.5,
    }
    return Objective(**options | changes)


def stream(cache: Cache, batch_tokens: int = 400, **spec: Any) -> list[dict[str, torch.Tensor]]:
    return batches(cache, batch_tokens, **spec)


def test_both_sides_of_a_row_reach_the_model_and_positions_are_the_decoder_s(caches):
    cache = open_cache(caches["dense"])
    rows = {row.row_id: row for row in cache}
    for batch in stream(cache):
        assert "position_ids" not in batch
        at = batch["position_index"]
        labels = list(batch["labels"].tolist())
        for line in range(len(batch["row_ids"])):
            row = rows.pop(int(batch["row_ids"][line]))
            source, target = row.input_ids.split(row.segments)
            for prefix, expected in (("", source), ("decoder_", target)):
                ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}attention_mask"]
                assert ids[line, : len(expected)].tolist() == expected.tolist()
                assert mask[line].sum() == len(expected)
                assert not ids[line, len(expected) :].any()
            here = at[at // batch["decoder_input_ids"].shape[1] == line]
            assert here.tolist() == [
                line * batch["decoder_input_ids"].shape[1] + place
                for place in range(len(target) - 1)
            ]
            assert [labels.pop(0) for _ in here] == target[1:].tolist()
    assert not rows


def row_loss(logp_PC: torch.Tensor, row: Any, kind: str) -> torch.Tensor:
    """Soft loss over the entries and one cell for the rest, with half of the hard loss."""
    soft = logp_PC.new_zeros(())
    for place, label in enumerate(row.labels.tolist()):
        ids, lp = row.targets.entries(place)
        ids, lp, q = ids.long(), lp.to(logp_PC.dtype), logp_PC[place]
        if kind == "sample":
            soft = soft - (lp.exp() * q[ids]).sum()
        else:
            soft = soft + (lp.exp() * (lp - q[ids])).nan_to_num(0).sum()
        if kind in ("topk", "adaptive"):
            tail = row.targets.tail_mass[place].to(logp_PC.dtype)
            rest = q.scatter(0, ids, -torch.inf).logsumexp(0)
            soft = soft + tail * (tail.log() - rest)
        soft = soft - 0.5 * q[label]
    return soft


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_equal_those_of_rows_one_by_one(kind, family, caches, caplog):
    cache = open_cache(caches[kind])
    student = make_model(family, seed=3).double()
    attachment = attach(student, objective(cache))
    assert "full logits" not in caplog.text  # also where BART adds a bias behind its head
    batch = {
        name: tensor.double() if tensor.is_floating_point() else tensor
        for name, tensor in stream(cache)[1].items()
    }
    output = student(**batch)
    output["loss"].backward()
    trained = {name: p for name, p in student.named_parameters() if p.requires_grad}
    found = {name: parameter.grad.clone() for name, parameter in trained.items()}
    attachment.detach()
    student.zero_grad()
    rows = {row.row_id: row for row in cache}
    chosen = [rows[row] for row in batch["row_ids"].tolist()]
    assert len({row.segments for row in chosen}) > 2  # padding on both sides
    losses, classes = [], cache.manifest.targets.num_classes
    assert classes < student.config.vocab_size
    for row in chosen:
        source, target = sides(row)
        logits = student(input_ids=source, decoder_input_ids=target, use_cache=False).logits[0]
        # The head is wider than the tokenizer has tokens.
        losses.append(row_loss(logits[:, :classes].log_softmax(-1), row, kind))
    positions = sum(len(row.labels) for row in chosen)
    loss = torch.stack(losses).sum() / positions
    loss.backward()
    if kind == "sample":  # reported as KL: less what the teacher's entropy is, a constant
        loss = loss - batch["entropy"].sum() / positions
    torch.testing.assert_close(output["loss"], loss, rtol=1e-5, atol=1e-6)
    for name, parameter in trained.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_as_its_own_student_agrees_everywhere(kind, caches, files):
    cache = open_cache(caches[kind])
    teacher = build_student(str(files / "t5"), cache, seed=0)
    numbers = evaluate(teacher, cache, batch_tokens=400)
    assert numbers["loss"] == pytest.approx(numbers["teacher_loss"], rel=1e-3)
    assert numbers["perplexity"] == pytest.approx(2.718281828 ** numbers["loss"], rel=1e-4)
    kl = numbers["kl_bucketed" if kind in ("topk", "adaptive") else "kl"]
    assert abs(kl) < (0.05 if kind == "sample" else 1e-3)
    assert numbers["agreement"] > 0.98


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_hidden_states_are_the_decoder_s(family, caches):
    """Against plain outputs: a T5 scales its final state before its head, and means it unscaled."""
    cache = open_cache(caches["dense"])
    student = make_model(family, seed=3)
    pairs = ((-1, -1), (0, 1))
    deviations = {layer: cache.channel_deviation(layer) for layer, _ in pairs}
    changes = {"layer_pairs": pairs, "deviations": deviations}
    attachment = attach(student, objective(cache, hidden_weight=1.0, **changes))
    batch = stream(cache, hidden_layers=(-1, 0))[0]
    output = student(**batch)
    attachment.detach()
    with torch.no_grad():
        states = student(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            decoder_input_ids=batch["decoder_input_ids"],
            decoder_attention_mask=batch["decoder_attention_mask"],
            output_hidden_states=True,
        ).decoder_hidden_states
    expected = 0.0
    for layer, state in ((-1, states[-1]), (0, states[2])):
        ours = state.flatten(0, 1)[batch["position_index"]]
        theirs = batch[f"hidden.{layer}"].float()
        squares = ((ours - theirs) / deviations[layer].clamp_min(1e-6)).square()
        expected += float(squares.mean(dim=-1).sum())
    assert float(output["hidden"]) == pytest.approx(expected, rel=2e-2)


def test_a_micro_batch_without_rows_has_no_loss_and_no_gradient(caches):
    cache = open_cache(caches["dense"])
    student = make_model("bart")
    attach(student, objective(cache))
    columns = columns_of(cache.empty_block(), 1.0)
    output = student(**without_rows(columns, Shape(PAIRS), counts=Counts(positions=0, labels=0)))
    output["loss"].backward()
    assert float(output["loss"]) == 0
    assert all(p.grad is None or not p.grad.any() for p in student.parameters())


def test_a_student_from_scratch_takes_the_tokens_of_the_rows(caches, config_dir):
    cache = open_cache(caches["dense"])
    student = build_student(str(config_dir), cache, seed=0)
    for settings in (student.config, student.generation_config):
        assert settings.decoder_start_token_id == PAD
        assert settings.eos_token_id == END
        assert settings.pad_token_id == PAD
    assert student.generation_config.forced_eos_token_id is None


def test_a_run_writes_is_compared_and_evaluated(caches, train, tmp_path):
    options = {"validation_cache": caches["held out"], "generate_rows": 6, "max_new_tokens": 8}
    result = train(**options)
    numbers = result["validation"]
    assert numbers["metric"] == "chrf"
    assert numbers["chrf_low"] <= numbers["chrf_high"]
    assert numbers["written_rows"] == 6
    lines = table(compare(CompareConfig(runs=(tmp_path / "run",))))
    assert "chrF" in lines
    assert f"{numbers['chrf']:.4f}" in lines
    again = run_evaluate(
        EvaluateConfig(
            student=str(tmp_path / "run"),
            cache=caches["held out"],
            generate=True,
            generate_rows=6,
            max_new_tokens=8,
            device="cpu",
        )
    )
    for name in ("loss", "kl", "chrf", "bleu", "rougeL"):
        assert again[name] == pytest.approx(numbers[name])
    assert again["texts"] == numbers["texts"]
    text = _evaluation_text(again)
    assert "chrf" in text
    assert f"expected {again['texts'][0]['reference']!r}" in text


def test_what_is_written_is_what_the_student_generates_row_by_row(caches, files):
    cache = open_cache(caches["held out"])
    student = build_student(str(files / "t5"), cache, seed=0)
    sources = sources_of(cache, 8)
    tokenizer = AutoTokenizer.from_pretrained(files / "t5")
    rows = {row.row_id: row for row in cache}
    texts = write(student, cache, sources, Writing(rows=8, max_new_tokens=9, batch_tokens=100))
    assert len({len(source.input_ids) for source in sources}) > 2
    for source, text in zip(sources, texts, strict=True):
        row = rows[source.row_id]
        assert list(source.references) == row.reference
        ids = row.input_ids[: row.segments[0]][None]
        tokens = student.generate(
            input_ids=ids, max_new_tokens=9, do_sample=False, use_cache=False
        )[0, 1:]
        assert text == tokenizer.decode(tokens, skip_special_tokens=True).strip()


@pytest.mark.parametrize("family", ["t5", "marian"])
def test_adapters_are_saved_and_reload(family, train, caches, files, tmp_path):
    result = train(student=str(files / family), lora_rank=4)
    assert result["parameters"] > 0
    cache = open_cache(caches["held out"])
    loaded = build_student(str(tmp_path / "run"), cache, seed=0)
    assert loaded.peft_config["default"].task_type == "SEQ_2_SEQ_LM"
    trained = evaluate(loaded, cache, batch_tokens=400)["loss"]
    plain = evaluate(build_student(str(files / family), cache, seed=0), cache, batch_tokens=400)
    assert trained != plain["loss"]


def test_adapters_stand_in_both_sides(files, caches):
    student = build_student(str(files / "bart"), open_cache(caches["dense"]), seed=0)
    adapted = add_adapters(student, AdapterSpec(rank=2), "seq2seq-lm")
    names = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert any("encoder" in name for name in names)
    assert any("decoder" in name for name in names)
    assert not any("lm_head" in name for name in names)


def saved(folder: Path, model: Any) -> str:
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return str(folder)


def fit(name: str, path: Path) -> None:
    check_fit(name, load_config(name), open_cache(path))


def test_what_does_not_fit_is_refused(caches, tmp_path, caplog):
    cache = caches["dense"]
    other = saved(tmp_path / "a", make_model("bart", decoder_start_token_id=5))
    with pytest.raises(CacheMismatch, match=r"decoder starts from token 5, but the targets.* 0\."):
        fit(other, cache)
    short = saved(tmp_path / "b", make_model("bart", max_position_embeddings=20))
    with pytest.raises(CacheMismatch, match=r"takes 20 positions, .* Cache again with --max-len.*"):
        fit(short, cache)
    short = saved(tmp_path / "c", make_model("marian", max_position_embeddings=12))
    with pytest.raises(CacheMismatch, match="--max-length 12"):
        fit(short, cache)
    llama_config(vocab_size=108).save_pretrained(tmp_path / "d")
    with pytest.raises(CacheMismatch, match="type llama is no encoder-decoder"):
        fit(str(tmp_path / "d"), cache)
    fit(saved(tmp_path / "e", make_model("marian")), cache)


def test_a_target_longer_than_the_decoder_names_its_own_option(tmp_path, files):
    rows = [{"source": "so long", "target": "so long day " * 3}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cache = capture(tmp_path / "c", tmp_path / "x.jsonl", teacher=str(files / "t5"))
    short = saved(tmp_path / "b", make_model("bart", max_position_embeddings=9))
    with pytest.raises(CacheMismatch, match=r"11 tokens\. Cache again with --max-target-length 8,"):
        fit(short, cache.path)


def test_a_held_out_decoder_starts_as_the_one_that_learns(train, files, tmp_path):
    """A student from scratch starts as the cache it learns from, whatever another cache says."""
    corpus = make_corpus(tmp_path / "corpus.jsonl", 20)
    asked = {"targets": "none", "tokenizer": str(files / "t5")}
    held_out = capture(tmp_path / "end", corpus, decoder_start=END, **asked)
    with pytest.raises(CacheMismatch, match="its token that decoders start from is 1, but that of"):
        train(validation_cache=held_out.path)


def test_writing_is_refused_where_there_is_no_source(cache_dir, teacher_dir, train, tmp_path):
    config = EvaluateConfig(student=str(teacher_dir), cache=cache_dir, generate=True, device="cpu")
    with pytest.raises(CacheMismatch, match="is of causal-lm, where a student writes no text"):
        run_evaluate(config)
    with pytest.raises(ConfigError, match="--generate-rows needs --validation-cache"):
        train(generate_rows=5)


def test_hard_labels_alone_train(train, files, tmp_path, caplog):
    corpus = make_corpus(tmp_path / "corpus.jsonl", 20)
    cache = capture(tmp_path / "c", corpus, targets="none", tokenizer=str(files / "t5"))
    with caplog.at_level(logging.WARNING):
        train(cache=(cache.path,), soft_weight=0.0, hard_weight=1.0, max_steps=2)
    student = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run")
    assert student.generation_config.decoder_start_token_id == PAD
