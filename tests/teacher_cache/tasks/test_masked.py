"""Masked language models through both stages, against the live models at the masked positions."""

import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AlbertConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from shared.cache import open_cache
from shared.errors import CacheMismatch, ConfigError, Refused
from shared.format.manifest import rows_id
from shared.models.limits import most_tokens
from student_train.cli import _evaluation_text
from student_train.compare.report import compare
from student_train.compare.table import table
from student_train.config import CompareConfig, EvaluateConfig, TrainConfig
from student_train.evaluate.evaluate import evaluate
from student_train.evaluate.evaluate import run as run_evaluate
from student_train.loss.attachment import attach
from student_train.loss.head import probe_head
from student_train.loss.objective import Objective
from student_train.loss.spec import LossSpec
from student_train.run.run import run as train
from student_train.student.build import load_config
from student_train.student.fit import check_fit
from teacher_cache.config import CaptureConfig, CheckConfig, InspectConfig, PlanConfig
from teacher_cache.engines import probes, streamed_head
from teacher_cache.engines.teacher import Teacher
from teacher_cache.job.draft import resolve
from teacher_cache.job.run import run
from teacher_cache.tasks.masked import build
from teacher_cache.tools.check.check import check
from teacher_cache.tools.inspect import inspect
from teacher_cache.tools.plan import estimate
from teacher_cache.tools.report import inspect_text
from tests.student_train.loss.test_attachment import batches

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
CLS, SEP, MASK = 2, 3, 4
LENGTH = 24


def tokenizer_of(text: str) -> PreTrainedTokenizerFast:
    """Word pieces between [CLS] and [SEP]."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=list(SPECIAL), show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name[1:-1].lower()}_token": name for name in SPECIAL},
    )


def bert_config(size: int, **changes: object) -> BertConfig:
    options: dict[str, object] = {
        "vocab_size": size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.3,
    }
    return BertConfig(**options | changes)


@pytest.fixture(scope="module")
def files(tmp_path_factory, corpus_file) -> Path:
    """A tokenizer, a teacher whose distributions are far from flat, and a student's config."""
    folder = tmp_path_factory.mktemp("masked")
    tokenizer = tokenizer_of(corpus_file.read_text())
    torch.manual_seed(0)
    teacher = BertForMaskedLM(bert_config(len(tokenizer)))
    with torch.no_grad():
        teacher.cls.predictions.decoder.bias.normal_()
    teacher.save_pretrained(folder / "teacher")
    tokenizer.save_pretrained(folder / "teacher")
    bert_config(len(tokenizer), hidden_size=16, num_hidden_layers=1).save_pretrained(
        folder / "student"
    )
    return folder


def options(files: Path, corpus_file: Path, out: Path, **changes: object) -> dict[str, object]:
    return {
        "task": "masked-lm",
        "teacher": str(files / "teacher"),
        "corpus": str(corpus_file),
        "out": out,
        "max_length": LENGTH,
        "limit_documents": 60,
        "shard_tokens": 3000,
        "device": "cpu",
    } | changes


@pytest.fixture(scope="module")
def cached(files, corpus_file, tmp_path_factory) -> dict[str, Path]:
    """A cache of each kind of targets, all with the final state and that of block 0."""
    made = {}
    for kind in ("topk", "sample", "dense"):
        out = tmp_path_factory.mktemp("masked") / kind
        run(
            CaptureConfig(
                **options(files, corpus_file, out, targets=kind, hidden_layers=(-1, 0)),
                **({"top_k": 8} if kind == "topk" else {}),
            )
        )
        made[kind] = out
    return made


@pytest.fixture(scope="module")
def teacher(files) -> BertForMaskedLM:
    return BertForMaskedLM.from_pretrained(files / "teacher").eval()


def test_targets_are_what_the_teacher_says_at_the_masked_places(files, cached, corpus_file):
    """Of the token there, not of the next one; the tokens put back give the text."""
    cache, dense = open_cache(cached["topk"]), open_cache(cached["dense"])
    model = BertForMaskedLM.from_pretrained(files / "teacher").eval()
    tokenizer = AutoTokenizer.from_pretrained(files / "teacher")
    documents = corpus_file.read_text().splitlines()[:60]
    texts: dict[tuple[int, int], list[int]] = {}
    for row, every in zip(cache, dense, strict=True):
        with torch.no_grad():
            output = model(input_ids=row.input_ids[None], output_hidden_states=True)
        live = output.logits[0, row.positions].log_softmax(-1)
        best = live.topk(8)
        assert torch.equal(row.targets.ids.sort().values, best.indices.sort().values)
        torch.testing.assert_close(
            row.targets.logprobs, live.gather(1, row.targets.ids), rtol=0, atol=0.06
        )
        torch.testing.assert_close(every.targets.logprobs, live, rtol=2e-3, atol=2e-3)
        for layer, states in ((-1, output.hidden_states[-1]), (0, output.hidden_states[1])):
            torch.testing.assert_close(
                row.hidden[layer].float(), states[0, row.positions], rtol=2**-8, atol=1e-6
            )
        whole = row.input_ids.clone()
        whole[row.positions] = row.labels
        assert whole[0] == CLS
        assert whole[-1] == SEP
        body = whole[1:-1].tolist()
        document, number = row.row_id >> 24, row.row_id & 0xFFFFFF
        chunk, copy = divmod(number, 4)
        if chunk == len(texts.get((document, copy), [])) // (LENGTH - 2):
            texts.setdefault((document, copy), []).extend(body)
    for document, text in enumerate(documents):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for copy in range(4):
            assert texts.get((document, copy), []) == ids
    assert max(len(row.input_ids) for row in cache) == LENGTH


def rows_of(files, text, copies=4, share=0.15, seed=0, max_length=LENGTH):
    tokenizer = AutoTokenizer.from_pretrained(files / "teacher")
    made = resolve(
        CaptureConfig(
            **options(
                files,
                files / "text.txt",
                files / "unused",
                mask_copies=copies,
                mask_share=share,
                seed=seed,
                max_length=max_length,
            )
        ),
        load_teacher=False,
    ).preprocessing
    counters: Counter[str] = Counter()
    return list(build([(7, text)], tokenizer, made, counters)), counters


@pytest.fixture
def text(files) -> str:
    (files / "text.txt").write_text("the a of and\n")
    return "the a of and to in is it you that he was for on are with as his they be"


def test_which_tokens_are_masked_follows_from_seed_and_row_alone(files, text):
    rows, _ = rows_of(files, text)
    again, _ = rows_of(files, text)
    other, _ = rows_of(files, text, seed=1)
    assert [row.row_id for row in rows] == [7 << 24 | copy for copy in range(4)]
    for one, same in zip(rows, again, strict=True):
        assert np.array_equal(one.input_ids, same.input_ids)
        assert np.array_equal(one.positions(), same.positions())
    places = [row.positions().tolist() for row in rows]
    assert len({tuple(p) for p in places}) == 4  # copies differ
    assert places != [row.positions().tolist() for row in other]
    assert {len(p) for p in places} == {3}  # 0.15 of 20 tokens


def test_special_tokens_are_never_masked_and_a_short_row_has_one_target(files):
    (files / "text.txt").write_text("so\n")
    for row in rows_of(files, "so [SEP] so [UNK] ¤", copies=50, share=0.5)[0]:
        assert set(row.labels.tolist()).isdisjoint(range(len(SPECIAL)))
        assert len(row.labels) == 1
    rows, counters = rows_of(files, "¤ ¤")
    assert rows == []
    assert counters["rows_without_targets"] == 4
    rows, counters = rows_of(files, "")
    assert rows == []
    assert counters["empty_documents"] == 1


def test_what_stands_in_the_place_of_a_masked_token(files, text):
    """80 % masks, 10 % other tokens, 10 % the same: within 4 deviations over 10,000 draws."""
    rows, _ = rows_of(files, text, copies=1000, share=0.5)
    replaced = np.concatenate([row.input_ids[row.positions()] for row in rows])
    labels = np.concatenate([row.labels for row in rows])
    assert len(labels) == 10_000
    assert abs((replaced == MASK).mean() - 0.8) < 4 * np.sqrt(0.8 * 0.2 / 10_000)
    others = replaced[(replaced != MASK) & (replaced != labels)]
    assert abs(len(others) / 10_000 - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 10_000)
    assert others.min() >= len(SPECIAL)
    assert len(set(others.tolist())) > 100
    counts = np.bincount(np.concatenate([row.positions() for row in rows]), minlength=22)
    assert counts[0] == counts[21] == 0
    assert np.abs(counts[1:21] / 1000 - 0.5).max() < 4 * np.sqrt(0.25 / 1000)


def test_the_masking_is_part_of_what_rows_are(files, corpus_file, tmp_path):
    def its_rows(**changes: object) -> str:
        config = CaptureConfig(**options(files, corpus_file, tmp_path / "c", **changes))
        draft = resolve(config, load_teacher=False)
        return rows_id(draft.corpus.info, draft.tokenizer_info, draft.preprocessing)

    assert its_rows() == its_rows()
    changed = ({"seed": 1}, {"mask_copies": 3}, {"mask_share": 0.2}, {"max_length": 20})
    assert len({its_rows(), *(its_rows(**change) for change in changed)}) == 5


def test_loss_and_gradient_equal_a_dense_reference(files, cached, teacher):
    cache = open_cache(cached["dense"])
    torch.manual_seed(3)
    student = AutoModelForMaskedLM.from_config(load_config(str(files / "student"))).double()
    classes = cache.manifest.targets.num_classes
    objective = Objective(
        spec=LossSpec(),
        num_classes=classes,
        target_kind="dense",
        soft_weight=1.0,
        hard_weight=0.5,
        hidden_weight=0.25,
        layer_pairs=((-1, -1),),
        deviations={-1: cache.channel_deviation(-1)},
    )
    assert probe_head(student, student.get_output_embeddings(), classes).linear
    batch = batches(cache, 400, hidden_layers=(-1,))[2]
    batch = {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}
    attachment = attach(student, objective)
    projection = torch.nn.Linear(16, 32, bias=False).double()
    student.distillation_projections["m1_m1"] = projection
    output = student(**batch)
    output["loss"].backward()
    found = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    attachment.detach()
    student.zero_grad()

    at, labels = batch["position_index"], batch["labels"]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    whole = student(**inputs, output_hidden_states=True)
    logq = whole.logits.flatten(0, 1)[at].log_softmax(-1)
    with torch.no_grad():
        its = teacher(**inputs)
        logp = its.logits.flatten(0, 1)[at].double().log_softmax(-1)
        states = teacher.bert(**inputs).last_hidden_state.flatten(0, 1)[at]
    soft = (logp.exp() * (logp - logq)).sum()
    hard = torch.nn.functional.cross_entropy(logq, labels, reduction="sum")
    error = projection(whole.hidden_states[-1].flatten(0, 1)[at]) - states.double()
    hidden = (error / cache.channel_deviation(-1)).square().mean(1).sum()
    loss = (soft + 0.5 * hard + 0.25 * hidden) / len(labels)
    loss.backward()
    # Log-probabilities are float16 and states bfloat16.
    torch.testing.assert_close(output["loss"], loss.detach(), rtol=2e-3, atol=0)
    for name, parameter in student.named_parameters():
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=1e-2 * largest + 1e-9)


@pytest.mark.parametrize("kind", ["topk", "sample", "dense"])
def test_the_teacher_as_its_own_student_agrees(files, cached, teacher, kind):
    numbers = evaluate(teacher, open_cache(cached[kind]), batch_tokens=500)
    assert numbers["loss"] == pytest.approx(numbers["teacher_loss"], rel=1e-3)
    assert numbers["perplexity"] == pytest.approx(np.exp(numbers["loss"]))
    if kind == "sample":  # right on average only
        assert abs(numbers["kl"]) < 0.05
    else:
        assert numbers["kl" if kind == "dense" else "kl_bucketed"] < 1e-3
        assert numbers["agreement"] > 0.99
    found = check(CheckConfig(cache=cached[kind], teacher=str(files / "teacher"), device="cpu"))
    assert found.sound
    assert found.agreement_live_cached > 0.99


def test_both_commands_from_hard_labels_to_a_student(files, corpus_file, tmp_path):
    labels = options(files, corpus_file, tmp_path / "labels", targets="none", teacher=None)
    run(CaptureConfig(**labels, tokenizer=str(files / "teacher")))
    steps = {"max_steps": 20, "batch_tokens": 800, "learning_rate": 3e-3, "device": "cpu"}
    shutil.copytree(files / "student", tmp_path / "config")
    train(
        TrainConfig(
            student=str(tmp_path / "config"),
            cache=(tmp_path / "labels",),
            out=tmp_path / "teacher",
            soft_weight=0,
            hard_weight=1,
            **steps,
        )
    )
    own = options(
        files, corpus_file, tmp_path / "cache", teacher=str(tmp_path / "teacher"), mask_copies=2
    )
    numbers = estimate(PlanConfig(**own))
    run(CaptureConfig(**own))
    cache = open_cache(tmp_path / "cache")
    assert numbers["rows"] == len(cache)
    assert numbers["positions"] == int(cache.row_positions.sum())
    held = {"out": tmp_path / "held", "split": "train[60:90]", "like": tmp_path / "cache"}
    held |= {"max_length": 1024, "mask_copies": 4}  # their defaults: as in that cache
    run(CaptureConfig(**own | held))
    assert open_cache(tmp_path / "held").manifest.preprocessing.mask_copies == 2
    result = train(
        TrainConfig(
            student=str(tmp_path / "config"),
            cache=(tmp_path / "cache",),
            validation_cache=tmp_path / "held",
            out=tmp_path / "run",
            lora_rank=2,
            **steps,
        )
    )
    assert result["validation"]["positions"] > 50
    again = run_evaluate(
        EvaluateConfig(student=str(tmp_path / "run"), cache=tmp_path / "held", device="cpu")
    )
    assert again["loss"] == pytest.approx(result["validation"]["loss"], rel=1e-5)
    assert "perplexity" in _evaluation_text(again)
    assert "agreement" in table(compare(CompareConfig(runs=(tmp_path / "run",))))


def test_inspect_shows_the_row_with_its_masks(cached):
    text = inspect_text(inspect(InspectConfig(cache=cached["topk"], rows=3)))
    assert "task        masked-lm" in text
    assert "[MASK]" in text
    assert "stood '" in text


SIZES = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
FAMILIES = {
    "bert": BertConfig(**SIZES),
    "roberta": RobertaConfig(**SIZES),
    "distilbert": DistilBertConfig(
        vocab_size=120, dim=32, hidden_dim=48, n_layers=2, n_heads=4, max_position_embeddings=64
    ),
    "albert": AlbertConfig(**SIZES, embedding_size=16),
    "electra": ElectraConfig(**SIZES, embedding_size=16),
    "modernbert": ModernBertConfig(
        **SIZES, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_logits_equal_the_model_s_own(family):
    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(FAMILIES[family]).eval()
    batch = probes.padded_batch(120)
    inputs = streamed_head.model_inputs(model, batch)
    with torch.no_grad():
        found = streamed_head.find(model, inputs)
        assert found is not None
        assert streamed_head.agrees(found, inputs, batch.position_index)
    assert probe_head(model, model.get_output_embeddings(), 120).linear


def test_a_decoder_is_refused(files):
    model = BertForMaskedLM(bert_config(300, is_decoder=True))
    tokenizer = AutoTokenizer.from_pretrained(files / "teacher")
    with pytest.raises(Refused, match="does not depend on later tokens, so it is no masked"):
        Teacher.wrap(model, tokenizer, "masked-lm")
    with pytest.raises(Refused, match="depends on later tokens, so it is no causal"):
        Teacher.wrap(BertForMaskedLM(bert_config(300)), tokenizer)


def test_an_encoder_that_hardly_looks_at_other_tokens_is_no_decoder(files):
    model = BertForMaskedLM(bert_config(300))
    with torch.no_grad():
        for layer in model.bert.encoder.layer:
            layer.attention.output.dense.weight.mul_(1e-6)
    Teacher.wrap(model, AutoTokenizer.from_pretrained(files / "teacher"), "masked-lm")


def test_a_tokenizer_without_a_mask_is_refused(files, corpus_file, tokenizer_dir, tmp_path):
    asked = options(files, corpus_file, tmp_path / "c", targets="none", teacher=None)
    with pytest.raises(Refused, match="has no mask token, which --task masked-lm needs"):
        run(CaptureConfig(**asked, tokenizer=str(tokenizer_dir)))


def test_rows_without_room_for_a_token_are_refused(files, text):
    with pytest.raises(Refused, match="--max-length 2: the tokenizer puts 2 special tokens"):
        rows_of(files, text, max_length=2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pack": True}, "--pack is not there for --task masked-lm"),
        ({"mask_share": 0.0}, "--mask-share is 0.0, but must be a number"),
        ({"task": "causal-lm", "mask_copies": 2}, "--mask-copies is only read with --task"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    files, corpus_file, tmp_path, changes, message
):
    with pytest.raises(ConfigError, match=message):
        CaptureConfig(**options(files, corpus_file, tmp_path / "c", **changes))


def test_positions_that_a_roberta_has_not_are_refused_on_both_sides(
    files, cached, corpus_file, tmp_path
):
    """Of its 20 places two are never used: it counts from behind the padding token's id."""
    tokenizer = AutoTokenizer.from_pretrained(files / "teacher")
    sizes = bert_config(len(tokenizer)).to_dict() | {"max_position_embeddings": LENGTH + 1}
    sizes.pop("model_type")
    roberta = RobertaForMaskedLM(RobertaConfig(**sizes | {"pad_token_id": 1}))
    assert most_tokens(roberta) == LENGTH - 1
    roberta(torch.full((1, LENGTH - 1), 9))
    with pytest.raises((IndexError, RuntimeError), match=r"out of (range|bounds)"):
        roberta(torch.full((1, LENGTH), 9))
    roberta.save_pretrained(tmp_path / "roberta")
    tokenizer.save_pretrained(tmp_path / "roberta")
    asked = options(files, corpus_file, tmp_path / "c", teacher=str(tmp_path / "roberta"))
    with pytest.raises(Refused, match=r"--max-length 24: RobertaForMaskedLM takes .* most 23"):
        run(CaptureConfig(**asked))
    assert not (tmp_path / "c").exists()
    run(CaptureConfig(**asked | {"max_length": LENGTH - 1, "limit_documents": 4}))

    cache = open_cache(cached["topk"])
    with pytest.raises(CacheMismatch, match=r"takes 23 positions, but the longest row .* 24 tok"):
        check_fit(str(tmp_path / "roberta"), load_config(str(tmp_path / "roberta")), cache)
    wider = RobertaConfig(**roberta.config.to_dict() | {"max_position_embeddings": LENGTH + 2})
    check_fit(str(tmp_path / "roberta"), wider, cache)
    check_fit(str(files / "teacher"), bert_config(len(tokenizer)), cache)
