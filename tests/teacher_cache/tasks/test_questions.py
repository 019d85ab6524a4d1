"""Question answering through stage one, against transformers' own windows and the live model."""

import hashlib
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer, BertForQuestionAnswering

from shared.cache import open_cache
from shared.errors import CacheMismatch, ConfigError, CorpusError, CorruptCache, Refused
from shared.format import manifest_file
from shared.storage.local import LocalStorage
from teacher_cache.config import CaptureConfig, CheckConfig, InspectConfig, PlanConfig
from teacher_cache.corpus.documents import Answer, Asked, answers_of
from teacher_cache.tasks.questions import build, windows
from teacher_cache.tools.check.check import check
from teacher_cache.tools.inspect import inspect, summary
from teacher_cache.tools.pages import write_inspection
from teacher_cache.tools.plan import estimate
from teacher_cache.tools.report import inspect_text
from tests.questions import (
    MAX_LENGTH,
    STRIDE,
    capture,
    make_documents,
    make_tokenizer,
    write_corpus,
    write_teacher,
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "q.jsonl", make_documents(60))


@pytest.fixture(scope="module")
def dense(tmp_path_factory, teacher, corpus) -> Path:
    out = tmp_path_factory.mktemp("dense") / "c"
    capture(out, corpus, teacher=str(teacher))
    return out


def expected_windows(tokenizer, document):
    """Ids, types, labels and (context's first token, one behind its last), the way run_qa.py of
    transformers makes them."""
    encoded = tokenizer(
        document["question"],
        document["context"],
        truncation="only_second",
        max_length=MAX_LENGTH,
        stride=STRIDE,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    for index, ids in enumerate(encoded["input_ids"]):
        parts, offsets = encoded.sequence_ids(index), encoded["offset_mapping"][index]
        inside = [place for place, part in enumerate(parts) if part == 1]
        first, last = inside[0], inside[-1]
        start = end = 0
        if document["answers"] is not None:
            begin = document["answers"]["answer_start"][0]
            behind = begin + len(document["answers"]["text"][0])
            if offsets[first][0] <= begin and offsets[last][1] >= behind:
                start = max(t for t in inside if offsets[t][0] <= begin)
                end = min(t for t in inside if offsets[t][1] >= behind)
        yield ids, encoded["token_type_ids"][index], [start, end], (first, last + 1)


def expected_logp(model, ids, types, bounds):
    """Of start and end over all tokens; what may not be chosen has no logit at all."""
    with torch.no_grad():
        output = model(torch.tensor([ids]), token_type_ids=torch.tensor([types]))
    allowed = [0, *range(*bounds)]
    logp = torch.full((2, MAX_LENGTH), -torch.inf)
    for place, logits in enumerate((output.start_logits[0], output.end_logits[0])):
        logp[place, allowed] = logits[allowed].log_softmax(-1)
    return logp


def test_rows_are_transformers_windows_and_targets_the_live_model_s(teacher, dense):
    cache = open_cache(dense)
    model = BertForQuestionAnswering.from_pretrained(teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    rows = iter(cache)
    answered = 0
    for index, document in enumerate(make_documents(60)):
        for chunk, (ids, types, labels, bounds) in enumerate(expected_windows(tokenizer, document)):
            row = next(rows)
            assert row.row_id == index << 24 | chunk
            assert row.input_ids.tolist() == ids
            assert row.token_type_ids.tolist() == types
            assert row.segments == (bounds[0], bounds[1] - bounds[0], len(ids) - bounds[1])
            assert row.positions.tolist() == [0, 1]
            assert row.labels.tolist() == labels
            live = expected_logp(model, ids, types, bounds)
            assert torch.equal(row.targets.ids, torch.arange(MAX_LENGTH).expand(2, -1))
            torch.testing.assert_close(row.targets.logprobs, live, rtol=2e-3, atol=2e-3)
            answered += labels[0] > 0
    assert next(rows, None) is None
    assert 40 < answered < len(cache) - 40
    assert max(row.row_id & 0xFFFFFF for row in cache) >= 2
    found = check(CheckConfig(cache=dense, teacher=str(teacher), device="cpu"))
    assert found.sound
    assert found.kl_live_cached < 1e-6


def test_the_reference_gives_the_text_of_every_span(dense):
    from shared.windows import reference_of

    tokenizer, documents = make_tokenizer(), make_documents(60)
    for row in open_cache(dense):
        document = documents[row.row_id >> 24]
        before, context = row.segments[:2]
        reference = reference_of(row.reference, context, "here")
        given = document["answers"]
        assert list(reference.answers) == ([] if given is None else given["text"])
        assert reference.text in document["context"]
        assert len(reference.text) < len(document["context"]) or row.row_id & 0xFFFFFF == 0
        start, end = row.labels.tolist()
        if start:
            assert reference.between(start - before, end - before) == given["text"][0]
        for first, last in ((0, context - 1), (context // 3, context // 2)):
            ids = row.input_ids[before + first : before + last + 1].tolist()
            pieces = [token.removeprefix("##") for token in tokenizer.convert_ids_to_tokens(ids)]
            assert reference.between(first, last).replace(" ", "") == "".join(pieces)


@pytest.mark.parametrize(("kind", "options"), [("topk", {"top_k": 5}), ("adaptive", {})])
def test_fewer_entries_are_the_likeliest_tokens(kind, options, teacher, corpus, dense, tmp_path):
    options = options | {"targets": kind, "temperature": (2.0,)}
    if kind == "adaptive":
        options["mean_entries"] = 4.0
    cache = capture(tmp_path / "c", corpus, teacher=str(teacher), **options)
    for row, whole in zip(cache, open_cache(dense), strict=True):
        for place in (0, 1):
            ids, logprobs = row.targets.entries(place)
            there = logprobs > -torch.inf
            full = whole.targets.logprobs[place]
            torch.testing.assert_close(logprobs[there], full[ids[there]], rtol=0.02, atol=0.05)
            assert int(full.argmax()) in ids[there].tolist()
    config = CheckConfig(cache=tmp_path / "c", teacher=str(teacher), device="cpu")
    assert check(config).sound


def test_inspect_shows_question_context_gold_and_teacher(dense, tmp_path):
    numbers = inspect(InspectConfig(cache=dense, rows=5))
    documents = make_documents(60)
    for shown in numbers["rows_shown"]:
        window, document = shown["window"], documents[shown["document"]]
        assert window["question"] == document["question"]
        assert window["context"].split(" ... ")[0] in document["context"]
        assert 0 < window["teacher_p"] + window["teacher_p_none"] <= 1
    text = inspect_text(numbers)
    assert f"question {documents[0]['question']!r}, answered by " in text
    assert "no answer here" in text
    html = tmp_path / "page.html"
    write_inspection(inspect(InspectConfig(cache=dense, rows=5, html=html)), html)
    page = html.read_text()
    assert f"<td>question</td><td>{documents[0]['question']}</td>" in page


def test_plan_counts_windows(teacher, corpus, dense, tmp_path):
    config = PlanConfig(
        out=tmp_path / "c",
        corpus=str(corpus),
        teacher=str(teacher),
        task="question-answering",
        max_length=MAX_LENGTH,
        stride=STRIDE,
        device="cpu",
    )
    numbers = estimate(config)
    cache = open_cache(dense)
    assert numbers["rows"] == len(cache)
    assert numbers["positions"] == 2 * len(cache)
    assert numbers["classes"] == MAX_LENGTH
    assert numbers["asked"] == "dense"
    mean = sum(row.segments[1] + 1 for row in cache) / len(cache)
    assert numbers["bytes_per_position"]["targets"] == pytest.approx(1.4 * mean, abs=0.1)


def test_a_student_of_other_documents_may_share_a_cache_by_like(teacher, dense, tmp_path):
    other = write_corpus(tmp_path / "other.jsonl", make_documents(10, seed=3))
    cache = capture(
        tmp_path / "c", other, teacher=str(teacher), like=dense, max_length=1024, stride=128
    )
    assert cache.manifest.preprocessing.max_length == MAX_LENGTH
    assert cache.manifest.preprocessing.stride == STRIDE


# ---- Odd documents


def rows_of(*documents: Asked, tokenizer=None, max_length=MAX_LENGTH, stride=STRIDE):
    counters = Counter()
    found = build(enumerate(documents), tokenizer or make_tokenizer(), max_length, stride, counters)
    return list(found), counters


def test_every_odd_document_is_counted():
    where = Answer("more day", 8)
    text = "come to more day could"
    rows, counters = rows_of(
        Asked("what", text, (where,)),
        Asked("what", "", ()),
        Asked("what " * 40, text, (where,)),
        Asked("what", text, (Answer("never said", 8),)),
        Asked("what", text, (Answer(" ", 4),)),
        Asked("what", text, (Answer("more day", 2),)),
        Asked("what", text, (Answer("more day", -1),)),
        Asked("what", text, ()),
    )
    assert [row.row_id >> 24 for row in rows] == [0, 5, 6, 7]
    assert counters == {
        "documents": 8,
        "empty_documents": 1,
        "questions_without_room": 1,
        "answers_not_in_context": 2,
        "moved_answers": 2,
        "unanswerable_documents": 1,
        "cut_documents": 0,
    }
    first = rows[0].labels.tolist()
    assert first[0] > 0
    assert [row.labels.tolist() for row in rows] == [first, first, first, [0, 0]]


def test_a_moved_answer_is_its_nearest_occurrence():
    text = "more come more come more"
    for start, expected in ((1, 0), (12, 10), (13, 10), (19, 20), (90, 20)):
        moved, counters = rows_of(Asked("what", text, (Answer("more", start),)))
        found, _ = rows_of(Asked("what", text, (Answer("more", expected),)))
        assert moved[0].labels.tolist() == found[0].labels.tolist()
        assert counters["moved_answers"] == 1


def test_an_answer_inside_a_word_is_the_tokens_that_hold_it():
    rows, _ = rows_of(Asked("what", "come madeupwords come", (Answer("upwo", 9),)))
    (row,) = rows
    start, end = row.labels.tolist()
    offsets = make_tokenizer()("come madeupwords come", return_offsets_mapping=True)
    tokens = offsets["offset_mapping"][1:-1]
    covering = [i for i, (first, last) in enumerate(tokens) if first < 13 and last > 9]
    assert [start, end] == [row.segments[0] + covering[0], row.segments[0] + covering[-1]]
    assert len(covering) > 1


def test_windows_move_on_however_little_room_there_is():
    for tokens in range(1, 20):
        for room in range(1, 12):
            for stride in (0, 1, 3, 50):
                found = list(windows(tokens, room, stride))
                assert [found[0].start, found[-1].stop] == [0, tokens]
                assert all(0 < part.stop - part.start <= room for part in found)
                shared = [one.stop - two.start for one, two in pairwise(found)]
                assert set(shared) <= {min(stride, room // 2)}


def test_a_tokenizer_without_special_tokens_gives_rows_of_two_parts():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair="$A $B", special_tokens=[]
    )
    rows, _ = rows_of(Asked("what", "come to more", (Answer("to", 5),)), tokenizer=tokenizer)
    (row,) = rows
    assert row.segments == (len(row.input_ids) - row.segments[1], row.segments[1])
    of_come = len(tokenizer("come", add_special_tokens=False)["input_ids"])
    of_to = len(tokenizer("to", add_special_tokens=False)["input_ids"])
    start = row.segments[0] + of_come
    assert row.labels.tolist() == [start, start + of_to - 1]
    rows, counters = rows_of(Asked("", "come to", ()), tokenizer=tokenizer)
    assert rows == []
    assert counters["empty_documents"] == 1  # nothing that could say "no answer"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ()),
        ([], ()),
        ({"text": [], "answer_start": []}, ()),
        ({"text": ["a", "b"], "answer_start": [1, 2]}, (Answer("a", 1), Answer("b", 2))),
        ([{"text": "a", "answer_start": 1}], (Answer("a", 1),)),
    ],
)
def test_answers_of_every_form(value, expected):
    assert answers_of(value, "here") == expected


@pytest.mark.parametrize(
    "value",
    ["Paris", {"text": ["a"], "answer_start": []}, [{"text": "a"}], ["a"], {"text": "a"}],
)
def test_answers_of_no_form_are_refused(value):
    with pytest.raises(CorpusError, match=r"document 3, answers: found .*expected \{text: \["):
        answers_of(value, "document 3, answers")


# ---- Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda raw: raw["columns"].remove("reference"), "reference is missing, which question-"),
        (lambda raw: raw["columns"].remove("labels"), "labels is missing, which question-answer"),
        (
            lambda raw: raw["preprocessing"].update(max_length=33),
            "num_classes: found 32 for rows of up to 33 tokens",
        ),
    ],
)
def test_a_manifest_of_windows_that_are_none_is_refused(change, message, dense, tmp_path):
    raw = json.loads((dense / "manifest.json").read_bytes())
    change(raw)
    data = json.dumps(raw).encode()
    (tmp_path / "manifest.json").write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    (tmp_path / "manifest.sha256").write_text(f"{digest}  manifest.json\n")
    with pytest.raises(CorruptCache, match=message):
        manifest_file.read(LocalStorage(tmp_path))


def test_a_tokenizer_that_puts_the_context_first_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A", pair="[CLS] $B [SEP] $A", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    with pytest.raises(CorpusError, match="puts the context before the question"):
        rows_of(Asked("what", "come to", ()), tokenizer=tokenizer)


def test_a_tokenizer_with_its_cls_token_last_is_refused():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A [CLS]", pair="$A $B [CLS]", special_tokens=[("[CLS]", 2)]
    )
    with pytest.raises(CorpusError, match="its CLS token behind them"):
        rows_of(Asked("what", "come to", ()), tokenizer=tokenizer)


def test_a_tokenizer_without_offsets_is_refused():
    slow = SimpleNamespace(is_fast=False, name_or_path="slow")
    with pytest.raises(CorpusError, match=r"slow: .* Name one with a tokenizer.json"):
        rows_of(Asked("what", "come to", ()), tokenizer=slow)


def test_rows_longer_than_the_teacher_reads_are_refused(teacher, corpus, tmp_path):
    with pytest.raises(Refused, match=r"--max-length 100: .* takes 64 positions"):
        capture(tmp_path / "c", corpus, teacher=str(teacher), max_length=100)


def test_a_corpus_without_answers_is_refused(teacher, tmp_path):
    other = write_corpus(tmp_path / "other.jsonl", [{"question": "what", "context": "come"}])
    with pytest.raises(CorpusError, match="reads question and context and answers, and there are"):
        capture(tmp_path / "c", other, teacher=str(teacher))


def test_another_stride_is_another_cache(teacher, corpus, dense, tmp_path):
    with pytest.raises(CacheMismatch, match=r"preprocessing\.stride: the cache has 6, asked for 7"):
        capture(dense, corpus, teacher=str(teacher), stride=7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "sample"}, "looks for the likeliest span, of which a sample says nothing"),
        ({"pack": True}, "--pack and --hidden-layers are not there for --task question-answering"),
        ({"hidden_layers": (-1,)}, "--pack and --hidden-layers are not there"),
        ({"task": "causal-lm", "stride": 5}, "--stride is only read with --task"),
        ({"stride": -1}, "--stride is -1, but must be"),
    ],
)
def test_what_windows_have_not_is_refused(options, message, tmp_path):
    defaults = {"task": "question-answering", "teacher": "t", "corpus": "c", "out": tmp_path}
    with pytest.raises(ConfigError, match=message):
        CaptureConfig(**defaults | options)


def test_the_summary_counts(dense):
    counters = summary(open_cache(dense))["counters"]
    assert counters["documents"] == 60
    assert counters["unanswerable_documents"] == 12
    assert counters["cut_documents"] > 20
