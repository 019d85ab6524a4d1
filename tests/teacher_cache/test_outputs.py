"""Several labels for a row, and numbers, through stage one: against the live model."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from shared.cache import open_cache
from shared.errors import CacheMismatch, ConfigError, CorpusError, CorruptCache
from shared.format.limits import problems
from shared.targets.scalars import decode_values, encode_values
from shared.targets.spec import TargetSpec
from teacher_cache.config import (
    CaptureConfig,
    CheckConfig,
    InspectConfig,
    PlanConfig,
    RepackConfig,
    VerifyConfig,
)
from teacher_cache.corpus.sources import open_corpus
from teacher_cache.job.draft import problem_type_for
from teacher_cache.tasks.label_rows import Labelled, build, values, yes_or_no
from teacher_cache.tools.check import check
from teacher_cache.tools.inspection import inspect, verify
from teacher_cache.tools.pages import write_inspection
from teacher_cache.tools.plan import estimate
from teacher_cache.tools.repack import repack
from teacher_cache.tools.report import check_text, inspect_text
from tests import plain_reader
from tests.output_caches import (
    DOCUMENTS,
    HF,
    NAMES,
    SCORES,
    TOPICS,
    capture,
    live_logits,
    make_tokenizer,
    save_teacher,
    write_corpus,
)

PROBLEMS = ("multi_label", "regression")
NUMBERS = {name: number for number, name in enumerate(TOPICS)}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("teachers")
    return {p: save_teacher(folder / p, NAMES[p], problem_type=HF[p]) for p in PROBLEMS}


@pytest.fixture(scope="module")
def caches(tmp_path_factory, teachers) -> dict[str, Path]:
    """A cache of each problem type, and the documents beside it."""
    folder = tmp_path_factory.mktemp("caches")
    for problem in PROBLEMS:
        write_corpus(folder / f"{problem}.jsonl", problem)
        capture(folder / problem, folder / f"{problem}.jsonl", teacher=teachers[problem])
    return {problem: folder / problem for problem in PROBLEMS}


@pytest.fixture
def cache_copy_of(tmp_path):
    return lambda path: Path(shutil.copytree(path, tmp_path / "copy"))


@pytest.mark.parametrize("pairs", [False, True])
def test_every_label_has_the_model_s_yes_and_no(pairs, teachers, tmp_path):
    documents = write_corpus(tmp_path / "c.jsonl", "multi_label", pairs=pairs)
    teacher = teachers["multi_label"]
    cache = capture(tmp_path / "c", tmp_path / "c.jsonl", teacher=teacher)
    manifest = cache.manifest
    assert (manifest.problem_type, manifest.labels) == ("multi_label", TOPICS)
    assert (manifest.targets.kind, manifest.targets.num_classes) == ("dense", 2)
    assert len(cache) == DOCUMENTS - 1
    assert min(len(row.input_ids) for row in cache) < len(TOPICS)
    for row, logits_C in zip(cache, live_logits(teacher, cache), strict=True):
        no_yes_C2 = torch.stack([-logits_C, logits_C], dim=1)
        expected = torch.nn.functional.logsigmoid(no_yes_C2)
        torch.testing.assert_close(row.targets.logprobs, expected, rtol=2e-3, atol=2e-3)
        assert row.positions.tolist() == list(range(len(TOPICS)))
        there = documents[row.row_id >> 24]["labels"]
        assert row.labels.tolist() == [int(name in there) for name in TOPICS]
        assert (row.token_type_ids is not None) == pairs
    assert check(CheckConfig(cache=tmp_path / "c", teacher=teacher, device="cpu")).sound


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("names", [SCORES[:1], SCORES])
def test_numbers_are_those_of_the_model(names, pairs, tmp_path):
    documents = write_corpus(tmp_path / "c.jsonl", "regression", pairs=pairs)
    if len(names) == 2:
        for row in documents:
            row["score"] = row["score"] and [row["score"], -1.5]
        (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, documents)))
    teacher = save_teacher(tmp_path / "t", names, problem_type="regression")
    cache = capture(tmp_path / "c", tmp_path / "c.jsonl", teacher=teacher)
    assert cache.manifest.problem_type == "regression"
    assert cache.manifest.targets == TargetSpec(
        kind="values", num_classes=1, top_k=1, value_bits=16
    )
    assert len(cache) == DOCUMENTS - 1
    live = live_logits(teacher, cache)
    assert live.std() > 0.1
    for row, logits_C in zip(cache, live, strict=True):
        torch.testing.assert_close(row.target_values, logits_C, rtol=1e-4, atol=1e-5)
        score = documents[row.row_id >> 24]["score"]
        wanted = np.array(score if len(names) == 2 else [score], np.float32)
        assert row.labels.numpy().tolist() == wanted.tolist()
    config = CheckConfig(cache=tmp_path / "c", teacher=teacher, device="cpu")
    found = check(config)
    assert found.sound
    assert found.distance_live_cached < 1e-4
    assert "the cache says what this teacher says" in check_text(found)
    other = save_teacher(tmp_path / "o", names, problem_type="regression", initializer_range=0.6)
    found = check(replace(config, teacher=other))
    assert not found.sound
    assert found.distance_live_cached > 0.1
    assert "THE CACHE IS OFF" in check_text(found)


@pytest.mark.parametrize(
    ("teacher", "column", "asked", "expected"),
    [
        ({"problem_type": "multi_label_classification"}, 1, "auto", "multi_label"),
        ({"problem_type": "regression"}, 1, "auto", "regression"),
        ({"problem_type": "single_label_classification"}, ["x"], "auto", "single_label"),
        ({"num_labels": 1}, 1, "auto", "regression"),
        ({}, 1, "auto", "single_label"),
        ({}, "x", "auto", "single_label"),
        ({}, ["x", "y"], "auto", "multi_label"),
        ({}, 0.5, "auto", "regression"),
        (None, [1, 2], "auto", "multi_label"),
        (None, 0.5, "auto", "regression"),
        (None, 0.5, "single_label", "single_label"),
        ({"problem_type": "regression"}, 1, "multi_label", "multi_label"),
    ],
)
def test_the_problem_type_is_as_asked_or_the_teacher_s_or_the_column_s(
    teacher, column, asked, expected, tmp_path, caplog
):
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "so", "label": column}) + "\n")
    options = {"targets": "none", "tokenizer": "x"}
    if teacher is not None:
        count = teacher.pop("num_labels", 3)
        names = tuple(f"LABEL_{i}" for i in range(count))
        options = {"teacher": save_teacher(tmp_path / "t", names, **teacher)}
    config = CaptureConfig(
        corpus=str(tmp_path / "c.jsonl"),
        out=tmp_path / "c",
        task="sequence-classification",
        problem_type=asked,
        **options,
    )
    assert problem_type_for(config, open_corpus(config)) == expected
    contradicted = asked != "auto" and teacher is not None
    assert ("its logits are read as asked for" in caplog.text) == contradicted


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        (("card", "top up"), [1, 7]),
        ((), []),
        ((0, 3), [0, 3]),
        ("fee", [2]),
        (5, [5]),
        ((0, 1, 1, 0, 0, 0, 0, 1), [1, 2, 7]),
        ((0.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0), [1, 2, 7]),
        ((True, *[False] * 7), [0]),
        ((0, 1), [0, 1]),  # shorter than the labels: numbers of classes
    ],
)
def test_labels_of_a_text_by_name_number_or_vector(label, expected):
    assert np.flatnonzero(yes_or_no(label, NUMBERS, "here")).tolist() == expected


def test_of_two_labels_a_list_of_whole_numbers_names_them():
    two = {"a": 0, "b": 1}
    assert yes_or_no((0, 1), two, "here").tolist() == [1, 1]
    assert yes_or_no((0.0, 1.0), two, "here").tolist() == [0, 1]
    assert yes_or_no(None, two, "here") is None
    with pytest.raises(CorpusError, match=r"here: found 1 twice in the labels \[1, 1\]"):
        yes_or_no((1, 1), two, "here")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (("card", "gold"), r"document 7: found the label 'gold', expected a number below 8"),
        ((0, 8), "document 7: found the label 8, expected a number below 8"),
        (("card", None), "document 7: found None where a label is expected"),
        ((0.5, 1.0), "document 7: found 0.5 where a label is expected in the labels"),
        (("card", "card"), "document 7: found 'card' twice"),
    ],
)
def test_what_is_no_list_of_labels_names_its_document(label, message):
    with pytest.raises(CorpusError, match=message):
        rows_of(label, "multi_label")


@pytest.mark.parametrize("label", ["x", float("nan"), float("inf"), 1e39, (1.0, 2.0), (None,), ()])
def test_what_is_no_number_names_its_document(label):
    with pytest.raises(CorpusError, match=r"document 7: found the label .*, expected a number wi"):
        rows_of(label, "regression", ("score",))
    with pytest.raises(CorpusError, match="expected 3 numbers"):
        values(label, dict.fromkeys("abc", 0), "document 7")


@pytest.mark.parametrize("label", [0.5, ("card",)])
def test_a_single_label_task_points_to_the_other_problem_types(label):
    with pytest.raises(CorpusError, match=r"document 7: found the label .* Say --problem-type"):
        rows_of(label, "single_label")


def rows_of(label, problem, labels=TOPICS, text="so"):
    document = Labelled(text, None, label)
    return list(build([(7, document)], make_tokenizer(), 24, labels, Counter(), problem))


def test_markers_of_a_relation_survive():
    text = "the [E1] river [E1] was near the [E2] town [E2]"
    (row,) = rows_of("fee", "single_label", text=text)
    tokenizer = make_tokenizer()
    tokens = tokenizer.convert_ids_to_tokens(row.input_ids.tolist())
    assert [tokens.count("[E1]"), tokens.count("[E2]")] == [2, 2]


@pytest.mark.parametrize(
    ("problem", "column", "expected"),
    [
        ("multi_label", [["b", "a"], ["c"], []], ("a", "b", "c")),
        ("multi_label", [[0, 3], [1]], ("LABEL_0", "LABEL_1", "LABEL_2", "LABEL_3")),
        ("multi_label", [[0, 1, 0], [1, 1, 0]], ("LABEL_0", "LABEL_1", "LABEL_2")),
        ("multi_label", [[0.0, 1.0], [1.0, 1.0]], ("LABEL_0", "LABEL_1")),
        ("regression", [0.5, None, 2], ("LABEL_0",)),
        ("regression", [[0.5, 1], None, [2, 2]], ("LABEL_0", "LABEL_1")),
    ],
)
def test_labels_are_found_in_the_corpus(problem, column, expected, tmp_path):
    rows = [{"text": "so", "label": value} for value in column]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = CaptureConfig(
        corpus=str(tmp_path / "c.jsonl"),
        out=tmp_path / "c",
        task="sequence-classification",
        targets="none",
        tokenizer="x",
    )
    assert open_corpus(config).labels(problem) == expected


def test_numbers_that_name_no_class_are_refused(tmp_path):
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "so", "label": [0.5, 2.5]}))
    make_tokenizer().save_pretrained(tmp_path / "x")
    with pytest.raises(CorpusError, match=r"found '0.5' in column 'label', expected names or num"):
        capture(tmp_path / "c", tmp_path / "c.jsonl", targets="none", tokenizer=str(tmp_path / "x"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "dense"}, "--targets dense and --temperature are of probabilities"),
        ({"temperature": (2.0,)}, "--targets dense and --temperature are of probabilities"),
        ({"task": "causal-lm"}, "--problem-type is only read with --task sequence-classification"),
    ],
)
def test_what_numbers_have_not_is_refused(options, message, tmp_path):
    defaults = {"task": "sequence-classification", "teacher": "t", "problem_type": "regression"}
    with pytest.raises(ConfigError, match=message):
        CaptureConfig(corpus="c", out=tmp_path, **defaults | options)


def test_probabilities_are_refused_of_a_teacher_of_numbers(caches, teachers, tmp_path):
    corpus = caches["regression"].with_suffix(".jsonl")
    with pytest.raises(ConfigError, match="labels are numbers here"):
        capture(tmp_path / "c", corpus, teacher=teachers["regression"], temperature=(2.0,))
    options = {"task": "sequence-classification", "teacher": teachers["regression"]}
    options |= {"corpus": str(corpus), "device": "cpu", "out": tmp_path / "c"}
    numbers = estimate(PlanConfig(**options))
    assert numbers["positions"] == DOCUMENTS - 1
    assert numbers["bytes_per_position"]["targets"] == 4.0
    with pytest.raises(ConfigError, match="--calibrate compares what may be kept"):
        estimate(PlanConfig(calibrate=True, **options))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_more_rows_like_the_first_ones(problem, caches, teachers, tmp_path):
    corpus = tmp_path / "more.jsonl"
    write_corpus(corpus, problem, seed=1)
    teacher, like = teachers[problem], caches[problem]
    one, other = (
        open_cache(like),
        capture(tmp_path / "c", corpus, teacher=teacher, like=like, max_length=1024),
    )
    assert other.manifest.problem_type == problem
    assert other.manifest.targets == one.manifest.targets
    assert other.manifest.preprocessing.max_length == 24
    another = {"multi_label": "single_label", "regression": "multi_label"}[problem]
    with pytest.raises(CacheMismatch, match=f"problem_type: the cache has '{problem}', asked for"):
        capture(like, like.with_suffix(".jsonl"), teacher=teacher, problem_type=another)


def test_inspection_says_what_corpus_and_teacher_say(caches, tmp_path):
    numbers = inspect(InspectConfig(cache=caches["multi_label"], rows=4))
    assert "sequence-classification, multi_label" in inspect_text(numbers)
    cache = open_cache(caches["multi_label"])
    there = [TOPICS[i] for i in np.flatnonzero(cache[0].labels)]
    (said,) = numbers["rows_shown"][0]["said"]
    best = int(cache[0].targets.logprobs[:, 1].argmax())
    assert said.startswith(f"labels: {', '.join(there)}; the teacher says {TOPICS[best]} ")
    numbers = inspect(InspectConfig(cache=caches["regression"], rows=4))
    cache = open_cache(caches["regression"])
    errors = [float((row.target_values - row.labels).square()) for row in cache]
    assert numbers["teacher_mse"] == pytest.approx(np.mean(errors), rel=1e-5)
    value, label = float(cache[0].target_values), float(cache[0].labels)
    said = f"warmth: {label:.4g}; the teacher says {value:.4g}"
    assert numbers["rows_shown"][0]["said"] == [said]
    assert said in inspect_text(numbers)
    for problem in PROBLEMS:
        config = InspectConfig(cache=caches[problem], html=tmp_path / "page.html")
        write_inspection(inspect(config), tmp_path / "page.html")
        assert "the teacher says" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize("problem", PROBLEMS)
def test_repacked_rows_keep_their_numbers_and_labels(problem, caches, tmp_path):
    repack(RepackConfig(cache=caches[problem], out=tmp_path / "half", documents="10:40"))
    assert verify(VerifyConfig(cache=tmp_path / "half")).sound
    whole = {row.row_id: row for row in open_cache(caches[problem])}
    rows = list(open_cache(tmp_path / "half"))
    assert [row.row_id >> 24 for row in rows] == list(range(10, 40))
    for row in rows:
        same = whole[row.row_id]
        assert torch.equal(row.labels, same.labels)
        if problem == "regression":
            assert torch.equal(row.target_values, same.target_values)
        else:
            assert torch.equal(row.targets.logprobs, same.targets.logprobs)
    with pytest.raises(ConfigError, match=r"--top-k: .* holds"):
        repack(RepackConfig(cache=caches[problem], out=tmp_path / "k", top_k=1))


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_flipped_bit_in_any_frame_of_numbers_is_found(problem, caches, cache_copy_of):
    folder = cache_copy_of(caches[problem])
    cache = open_cache(folder)
    shard = cache.storage.local(cache.commits[0].file)
    data = shard.read_bytes()
    names = {"regression": ("label_values", "target_values"), "multi_label": ("labels",)}
    flipped = 0
    reader = pa.ipc.open_file(pa.BufferReader(data)).read_all()
    for name in reader.column_names:
        if name.startswith(names[problem]):
            frame = reader.column(name)[0].as_py()
            start = data.index(frame)
            for place in range(start, start + len(frame), 7):
                forged = bytearray(data)
                forged[place] ^= 1 << place % 8
                shard.write_bytes(forged)
                assert not verify(VerifyConfig(cache=folder)).sound
                with pytest.raises(CorruptCache):
                    list(open_cache(folder))
                flipped += 1
    assert flipped > 8


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_text_of_the_format_is_enough_to_read_them(problem, caches):
    plain = plain_reader.read_cache(caches[problem])
    for found, row in zip(plain, open_cache(caches[problem]), strict=True):
        assert found["positions"].tolist() == row.positions.tolist()
        assert found["labels"].tolist() == row.labels.tolist()
        if problem == "regression":
            assert found["target_values"].tolist() == row.target_values.tolist()
        else:
            probs_C2 = row.targets.logprobs.exp().numpy()
            np.testing.assert_allclose(found["target_probabilities"], probs_C2, atol=1e-6)


@pytest.mark.parametrize("column", ["label_values", "target_values"])
def test_nan_in_a_shard_is_refused(column):
    planes = encode_values(np.array([1.5, np.nan], np.float32))
    with pytest.raises(CorruptCache, match=f"{column}: found NaN or infinity"):
        decode_values(planes, column)


def test_numbers_are_stored_bit_by_bit():
    values_P = np.array([0.0, -0.0, 1e-42, -1.5, 3.4e38, 1 / 3], np.float32)
    found = decode_values(encode_values(values_P), "target_values")
    assert np.array_equal(found.view(np.uint32), values_P.view(np.uint32))


@pytest.mark.parametrize(
    ("problem", "changes", "message"),
    [
        ("multi_label", {"labels": ()}, "labels: found no name"),
        ("multi_label", {"task": "token-classification"}, "token-classification has none"),
        ("multi_label", {"problem_type": "regression"}, "expected values of 1, or none"),
        ("multi_label", {"problem_type": "single_label"}, "labels: found 8 names for 2 classes"),
        ("regression", {"problem_type": "single_label"}, "single_label, but the cache holds num"),
        ("regression", {"problem_type": "multi_label"}, "expected dense of 2, or none"),
        ("regression", {"columns": ["positions"]}, "expected label_values with regression"),
        ("regression", {"columns": ["labels"]}, "expected label_values with regression"),
    ],
)
def test_a_manifest_that_does_not_hold_together_is_refused(problem, changes, message, caches):
    manifest = open_cache(caches[problem]).manifest
    assert not list(problems(manifest))
    if "columns" in changes:
        changes = {"columns": (*manifest.columns, *changes["columns"])}
    assert message in "; ".join(problems(replace(manifest, **changes)))


def test_a_row_of_another_number_of_positions_is_refused(caches):
    commit = open_cache(caches["multi_label"]).commits[0]
    assert len(commit.lengths("here", 8)[0]) == commit.rows
    with pytest.raises(CorruptCache, match="here: a row of other than 7 positions"):
        commit.lengths("here", 7)
    with pytest.raises(CorruptCache, match="more positions than tokens"):
        commit.lengths("here")
