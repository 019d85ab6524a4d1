"""Sequence to sequence through stage one, against plain encoder-decoders at every position."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from shared.cache import open_cache
from shared.errors import CacheMismatch, ConfigError, CorpusError, Refused
from shared.format.schema import planes_of
from teacher_cache.config import CaptureConfig, CheckConfig, InspectConfig, PlanConfig
from teacher_cache.corpus.chat import Conversation
from teacher_cache.corpus.sources import open_corpus
from teacher_cache.engines.teacher import Teacher
from teacher_cache.tasks.seq2seq_rows import Pair, build
from teacher_cache.tools.check import check
from teacher_cache.tools.inspection import inspect
from teacher_cache.tools.plan import estimate
from teacher_cache.tools.report import inspect_text
from tests import plain_reader
from tests.seq2seq import (
    END,
    FAMILIES,
    MAX_LENGTH,
    MAX_TARGET_LENGTH,
    PAD,
    capture,
    make_config,
    make_corpus,
    make_model,
    make_teachers,
    make_tokenizer,
)
from tests.shared.format.test_manifest import make_manifest


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = make_teachers(tmp_path_factory.mktemp("seq2seq"))
    make_corpus(folder / "corpus.jsonl")
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_the_model_s_outputs_at_every_token_of_the_decoder(files, tmp_path, family):
    teacher = str(files / family)
    options = {"teacher": teacher, "hidden_layers": (-1, 0, 1)}
    cache = capture(tmp_path / "c", files / "corpus.jsonl", **options)
    assert cache.manifest.preprocessing.decoder_start == PAD
    assert cache.manifest.targets.kind == "dense"
    assert len(cache.commits) > 1
    model = AutoModelForSeq2SeqLM.from_pretrained(teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    documents = [json.loads(line) for line in (files / "corpus.jsonl").read_text().splitlines()]
    assert [row.row_id >> 24 for row in cache] == [i for i in range(50) if i not in (4, 5)]
    for row in cache:
        document = documents[row.row_id >> 24]
        texts = document["target"]
        texts = texts if isinstance(texts, list) else [texts]
        assert row.reference == texts
        words = tokenizer(document["source"], add_special_tokens=False)["input_ids"]
        source = [*words[: MAX_LENGTH - 1], END]
        target = [*tokenizer(texts[0], add_special_tokens=False)["input_ids"], END]
        target = target[:MAX_TARGET_LENGTH]
        assert row.input_ids.tolist() == [*source, PAD, *target]
        assert row.segments == (len(source), 1 + len(target))
        assert row.labels.tolist() == target
        assert row.positions.tolist() == list(range(len(source), len(source) + len(target)))
        with torch.no_grad():
            live = model(
                input_ids=torch.tensor([source]),
                decoder_input_ids=torch.tensor([[PAD, *target[:-1]]]),
                output_hidden_states=True,
            )
        found = row.targets.logprobs
        expected = live.logits[0, :, : found.shape[1]].log_softmax(-1)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=2e-3)
        # Embeddings first, the last one after the last norm.
        states = live.decoder_hidden_states
        for layer, state in ((-1, states[-1]), (0, states[1]), (1, states[2])):
            torch.testing.assert_close(row.hidden[layer].float(), state[0], rtol=1e-2, atol=1e-2)
    assert {len(row.labels) for row in cache} >= {MAX_TARGET_LENGTH}
    assert any(row.labels[-1] != END for row in cache)  # cut, so it does not end
    found = check(CheckConfig(cache=tmp_path / "c", teacher=teacher, device="cpu"))
    assert found.sound
    assert found.agreement_live_cached == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_padded_pairs_are_streamed(files, family):
    tokenizer = AutoTokenizer.from_pretrained(files / family)
    teacher = Teacher.wrap(make_model(family), tokenizer, "seq2seq-lm")
    assert teacher.streamed is not None
    assert teacher.num_layers == 3


def test_a_decoder_that_sees_later_tokens_is_refused(files):
    model = make_model("bart")

    def mixed(module, args, output):
        states = output.last_hidden_state
        return replace(output, last_hidden_state=states + states.mean(dim=1, keepdim=True))

    model.get_decoder().register_forward_hook(mixed)
    tokenizer = AutoTokenizer.from_pretrained(files / "bart")
    with pytest.raises(Refused, match="its prediction of a token depends on later tokens"):
        Teacher.wrap(model, tokenizer, "seq2seq-lm")


def test_hard_labels_need_no_teacher_and_their_rows_are_the_teacher_s(files, tmp_path):
    plain = capture(
        tmp_path / "c", files / "corpus.jsonl", targets="none", tokenizer=str(files / "t5")
    )
    taught = capture(tmp_path / "d", files / "corpus.jsonl", teacher=str(files / "t5"))
    assert plain.manifest.rows_id == taught.manifest.rows_id
    assert [row.input_ids.tolist() for row in plain] == [row.input_ids.tolist() for row in taught]
    other = capture(
        tmp_path / "e",
        files / "corpus.jsonl",
        targets="none",
        tokenizer=str(files / "t5"),
        decoder_start=7,
    )
    assert other[0].input_ids[other[0].segments[0]] == 7
    assert other.manifest.rows_id != plain.manifest.rows_id


def test_a_reader_that_follows_the_text_of_the_format_finds_the_same(files, tmp_path):
    cache = capture(
        tmp_path / "c",
        files / "corpus.jsonl",
        teacher=str(files / "t5"),
        max_length=200,
        max_target_length=100,  # together more than a byte holds
    )
    assert {plane.name for plane in planes_of(cache.manifest)} >= {"positions.1", "segments.1"}
    rows = plain_reader.read_cache(tmp_path / "c")
    for ours, theirs in zip(cache, rows, strict=True):
        assert ours.input_ids.tolist() == theirs["input_ids"].tolist()
        assert ours.segments == tuple(theirs["segments"].tolist())
        assert ours.positions.tolist() == theirs["positions"].tolist()
        assert ours.labels.tolist() == theirs["labels"].tolist()
        assert ours.reference == theirs["reference"]


def test_inspect_and_plan_speak_of_both_sides(files, tmp_path):
    corpus = files / "corpus.jsonl"
    cache = capture(tmp_path / "c", corpus, teacher=str(files / "t5"))
    numbers = inspect(InspectConfig(cache=tmp_path / "c", rows=1))
    tokenizer = AutoTokenizer.from_pretrained(files / "t5")
    source, target = cache[0].input_ids.split(cache[0].segments)
    assert numbers["rows_shown"][0]["text"] == tokenizer.decode(source)
    assert numbers["rows_shown"][0]["target"] == tokenizer.decode(target)
    assert numbers["rows_shown"][0]["positions"][0]["after"] == "<pad>"
    assert f"becomes {tokenizer.decode(target)!r}" in inspect_text(numbers)
    assert numbers["counters"]["documents_without_target"] == 1
    assert numbers["counters"]["empty_documents"] == 1
    planned = estimate(
        PlanConfig(
            out=tmp_path / "p",
            corpus=str(corpus),
            teacher=str(files / "t5"),
            task="seq2seq-lm",
            max_length=MAX_LENGTH,
            max_target_length=MAX_TARGET_LENGTH,
            device="cpu",
            calibrate=True,
        )
    )
    assert planned["tokens"] == int(cache.row_tokens.sum())
    assert planned["positions"] == int(cache.row_positions.sum())


# Rows, document by document.


def options(**changes):
    defaults = {"max_length": 8, "max_target_length": 5, "decoder_start": PAD}
    return replace(make_manifest().preprocessing, **defaults | changes)


def rows_of(tokenizer, *documents, **changes):
    counters = Counter()
    return list(build(enumerate(documents), tokenizer, options(**changes), counters)), counters


def decoded(tokenizer, row):
    source, target = np.split(row.input_ids, [row.segments[0]])
    return tokenizer.decode(source), tokenizer.decode(target)


def test_long_sides_are_cut_each_by_its_own_limit(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    words = "the of and to in is it you that he was for"
    rows, counters = rows_of(tokenizer, Pair(words, (words, "so")), Pair("the", ("of and to in",)))
    assert [decoded(tokenizer, row) for row in rows] == [
        ("the of and to in is it </s>", "<pad> the of and to in"),  # no end that is not there
        ("the </s>", "<pad> of and to in </s>"),
    ]
    assert rows[0].reference == [words, "so"]
    assert counters["cut_sources"] == counters["cut_targets"] == 1


def test_a_tokenizer_that_puts_no_end_gets_one_behind_targets(tmp_path):
    tokenizer = make_tokenizer(tmp_path, ends=False)
    rows, _ = rows_of(tokenizer, Pair("so long", ("see him",)))
    assert decoded(tokenizer, rows[0]) == ("so long", "<pad> see him </s>")


TALK = (
    {"role": "user", "content": "so long"},
    {"role": "assistant", "content": "see him"},
    {"role": "user", "content": "two more day could go"},
    {"role": "assistant", "content": "come did"},
    {"role": "user", "content": "my sound"},
)


def test_of_a_conversation_the_last_answer_is_learnt(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    (row,), counters = rows_of(tokenizer, Conversation(TALK), max_length=64)
    unknown = "<unk> <unk>"  # the role and its colon
    before = f"{unknown} so long {unknown} see him {unknown} two more day could go </s>"
    assert decoded(tokenizer, row) == (before, "<pad> come did </s>")
    assert row.reference == ["come did"]
    (row,), counters = rows_of(tokenizer, Conversation(TALK))
    assert decoded(tokenizer, row)[0] == f"{unknown} two more day could go </s>"  # the latest
    assert counters["cut_sources"] == 1


def test_a_template_writes_the_source(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} or {% endfor %}"
        "{% if add_generation_prompt %}day{% endif %}"
    )
    (row,), _ = rows_of(tokenizer, Conversation(TALK[:2]))
    assert decoded(tokenizer, row) == ("so long or day", "<pad> see him </s>")


@pytest.mark.parametrize(
    ("document", "counted"),
    [
        (Pair("", ("so",)), "empty_documents"),
        (Pair("so", ()), "documents_without_target"),
        (Pair("so", ("  ",)), "documents_without_target"),
        (Conversation(()), "empty_documents"),
        (Conversation(TALK[:1]), "documents_without_target"),
        (Conversation(TALK[1:2]), "empty_documents"),
    ],
)
def test_documents_without_a_side_are_counted(tmp_path, document, counted):
    rows, counters = rows_of(make_tokenizer(tmp_path), document)
    assert not rows
    assert counters[counted] == 1


def test_a_message_that_is_no_text_names_its_document(tmp_path):
    talk = Conversation(({"role": "user", "content": [1]}, *TALK[1:2]))
    with pytest.raises(CorpusError, match="document 0, message 0: found a content of type list"):
        rows_of(make_tokenizer(tmp_path), talk)


# What is refused.


def config(files, tmp_path, **changes) -> CaptureConfig:
    defaults = {"corpus": str(files / "corpus.jsonl"), "out": tmp_path / "c", "task": "seq2seq-lm"}
    return CaptureConfig(**defaults | {"teacher": str(files / "t5"), "device": "cpu"} | changes)


def test_columns_are_guessed_or_asked_for(files, tmp_path):
    def columns(rows, **changes):
        path = tmp_path / "some.jsonl"
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        return open_corpus(config(files, tmp_path, corpus=str(path), **changes)).columns

    assert columns([{"document": "a", "summaries": ["b"]}]) == {
        "source": "document",
        "target": "summaries",
    }
    assert columns([{"en": "a", "zh": "b"}], columns=("target=zh",)) == {
        "source": "en",
        "target": "zh",
    }
    assert columns([{"messages": [{"role": "user", "content": "a"}]}]) == {"messages": "messages"}
    with pytest.raises(CorpusError, match="reads source and target or messages, and there are"):
        columns([{"en": "a", "zh": "b"}])
    both = ("messages=en", "target=zh")
    with pytest.raises(CorpusError, match="is source and target, or messages, not several of them"):
        columns([{"en": "a", "zh": "b"}], columns=both)


def test_a_target_that_is_no_text_is_refused(files, tmp_path):
    path = tmp_path / "some.jsonl"
    path.write_text('{"source": "so", "target": {"zh": "a"}}\n')
    corpus = open_corpus(config(files, tmp_path, corpus=str(path)))
    with pytest.raises(CorpusError, match="document 0 has a dict in column 'target' where a text"):
        corpus.read([0])


def test_another_start_than_the_teacher_s_is_refused(files, tmp_path):
    with pytest.raises(CacheMismatch, match=r"--decoder-start 5: the decoder of .* from token 0"):
        capture(
            tmp_path / "c", files / "corpus.jsonl", teacher=str(files / "bart"), decoder_start=5
        )


def test_a_teacher_whose_start_nobody_knows_is_asked_for(files, tmp_path):
    model = AutoModelForSeq2SeqLM.from_config(make_config("t5"))
    model.save_pretrained(tmp_path / "t5")
    make_tokenizer(tmp_path / "t5")
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((tmp_path / "t5" / name).read_text())
        settings.pop("decoder_start_token_id", None)
        (tmp_path / "t5" / name).write_text(json.dumps(settings))
    with pytest.raises(Refused, match="cannot be told what its decoder starts from"):
        capture(tmp_path / "c", files / "corpus.jsonl", teacher=str(tmp_path / "t5"))
    cache = capture(
        tmp_path / "c", files / "corpus.jsonl", teacher=str(tmp_path / "t5"), decoder_start=2
    )
    assert open_cache(cache.path).manifest.preprocessing.decoder_start == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pack": True}, "--pack is not there for --task seq2seq-lm"),
        ({"task": "causal-lm", "max_target_length": 5}, "--max-target-length is only read with"),
        ({"task": "causal-lm", "decoder_start": 5}, "--decoder-start is only read with --task"),
    ],
)
def test_what_pairs_have_not_is_refused(files, tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        config(files, tmp_path, **changes)
