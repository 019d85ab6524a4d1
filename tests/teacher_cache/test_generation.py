"""Targets that the teacher writes itself, against plain `generate`, one document at a time."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from shared.cache import open_cache
from shared.errors import ConfigError, CorpusError
from shared.format.manifest import GenerationSpec
from student_train.evaluate.writing import Writing, written_numbers
from student_train.metrics.texts import chrf
from teacher_cache.config import CaptureConfig, CheckConfig, PlanConfig
from teacher_cache.corpus.sources import open_corpus
from teacher_cache.engines.teacher import Teacher
from teacher_cache.job.run import run
from teacher_cache.tools.check import check
from teacher_cache.tools.plan import estimate
from teacher_cache.tools.report import estimate_text
from tests.seq2seq import END, capture, make_corpus, make_teachers

NEW = 9  # tokens that are written at most
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def files(tmp_path_factory, teacher_dir) -> Path:
    """Encoder-decoders, and a decoder with a chat template."""
    folder = make_teachers(tmp_path_factory.mktemp("written"))
    make_corpus(folder / "corpus.jsonl")
    shutil.copytree(teacher_dir, folder / "chat")
    (folder / "chat" / "chat_template.jinja").write_text(TEMPLATE)
    talks = []
    for index in range(20):
        messages = [{"role": "user", "content": "so long " * (1 + index % 4)}]
        messages += [
            {"role": "assistant", "content": "see him"},
            {"role": "user", "content": f"how many {index}"},
        ]
        messages += [{"role": "assistant", "content": "more"}] * (index % 2)
        talks.append({"messages": messages})
    talks[3] = {"messages": []}
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)) + "\n")
    return folder


def options(files: Path, family: str = "bart", **changes):
    """A BART with other weights than those of a T5, whose greedy answers hardly differ."""
    defaults = {"teacher": str(files / family), "generate": True, "max_new_tokens": NEW}
    return defaults | {"max_target_length": 128} | changes


def contents(path: Path) -> dict[str, bytes]:
    files = [*path.glob("shards/*"), *path.glob("commits/*"), path / "manifest.json"]
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in files}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", ["t5", "bart", "marian"])
def test_targets_of_pairs_are_what_the_teacher_generates(files, tmp_path, family, beams):
    cache = capture(
        tmp_path / "c", files / "corpus.jsonl", **options(files, family, num_beams=beams)
    )
    model = AutoModelForSeq2SeqLM.from_pretrained(files / family).eval()
    documents = [json.loads(line) for line in (files / "corpus.jsonl").read_text().splitlines()]
    assert [row.row_id >> 24 for row in cache] == [i for i in range(50) if i != 4]
    without_end = 0
    for row in cache:
        source, target = row.input_ids.split(row.segments)
        # A cache in `generate` has no room for decoders deeper than their encoders.
        written = model.generate(
            input_ids=source[None],
            max_new_tokens=NEW,
            num_beams=beams,
            do_sample=False,
            use_cache=False,
            suppress_tokens=list(range(cache.manifest.targets.num_classes, 108)),
        )[0]
        assert target.tolist() == written.tolist()
        without_end += int(target[-1]) != END
        text = documents[row.row_id >> 24]["target"]
        assert row.reference == ([] if text is None else text if isinstance(text, list) else [text])
        with torch.no_grad():
            live = model(input_ids=source[None], decoder_input_ids=target[None, :-1]).logits[0]
        expected = live[:, : row.targets.logprobs.shape[1]].log_softmax(-1)
        torch.testing.assert_close(row.targets.logprobs, expected, rtol=2e-3, atol=2e-3)
    counted = sum(commit.statistics["generations_without_end"] for commit in cache.commits)
    assert counted == without_end
    assert sum(commit.statistics["generated_documents"] for commit in cache.commits) == 49
    assert check(CheckConfig(cache=tmp_path / "c", teacher=str(files / family), device="cpu")).sound


def test_the_last_answer_of_a_conversation_is_written_anew(files, tmp_path):
    run(
        CaptureConfig(
            out=tmp_path / "c",
            corpus=str(files / "talks.jsonl"),
            max_length=64,
            shard_tokens=300,
            device="cpu",
            targets="topk",
            top_k=4,
            **options(files, "chat"),
        )
    )
    cache = open_cache(tmp_path / "c")
    tokenizer = AutoTokenizer.from_pretrained(files / "chat")
    model = AutoModelForCausalLM.from_pretrained(files / "chat").eval()
    talks = [json.loads(line) for line in (files / "talks.jsonl").read_text().splitlines()]
    assert [row.row_id >> 24 for row in cache] == [i for i in range(20) if i != 3]
    for row in cache:
        messages = talks[row.row_id >> 24]["messages"]
        answered = messages[-1]["role"] == "assistant"
        text = "".join(f"{m['role']}: {m['content']}<|end|>" for m in messages[:3]) + "assistant: "
        prompt = tokenizer(text, add_special_tokens=False)["input_ids"][-(64 - NEW) :]
        written = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, pad_token_id=0
        )[0, len(prompt) :].tolist()
        assert row.input_ids.tolist() == prompt + written
        assert row.labels.tolist() == written  # and nothing that was said before
        assert row.reference == (["more"] if answered else [])
        with torch.no_grad():
            live = model(row.input_ids[None]).logits[0, row.positions].log_softmax(-1)
        found = live.gather(1, row.targets.ids)
        torch.testing.assert_close(row.targets.logprobs, found, rtol=0.03, atol=0.03)


def test_prompts_alone_are_enough(files, tmp_path, teacher_dir):
    """With a tokenizer without a template; and sources without targets."""
    for role, teacher in (("prompt", teacher_dir), ("source", files / "t5")):
        (tmp_path / "x.jsonl").write_text(json.dumps({role: "so long"}) + "\n")
        out = tmp_path / role
        changes = {"targets": "topk", "top_k": 4, "max_length": 32, "device": "cpu"}
        task = "causal-lm" if role == "prompt" else "seq2seq-lm"
        given = options(files, teacher=str(teacher)) | changes
        run(CaptureConfig(out=out, corpus=str(tmp_path / "x.jsonl"), task=task, **given))
        (row,) = open_cache(out)
        tokenizer = AutoTokenizer.from_pretrained(teacher)
        ids = tokenizer("so long\n" if role == "prompt" else "so long")["input_ids"]
        assert row.input_ids[: len(ids)].tolist() == ids
        assert row.reference == []


def drawn(files, out, **changes):
    return capture(out, files / "corpus.jsonl", **options(files, sample_temperature=1.0, **changes))


def test_what_is_drawn_is_the_same_in_every_run_and_another_with_another_seed(files, tmp_path):
    one = drawn(files, tmp_path / "a")
    torch.manual_seed(99)
    before = torch.get_rng_state()
    two = drawn(files, tmp_path / "b")
    assert torch.equal(torch.get_rng_state(), before)
    assert contents(one.path) == contents(two.path)
    # Shards again, in another order, into what is there of the first run.
    for shard in range(len(one.commits) - 1):
        (one.path / f"commits/{shard:05d}.json").unlink()
        next(one.path.glob(f"shards/{shard:05d}-*")).unlink()
    assert contents(drawn(files, tmp_path / "a").path) == contents(two.path)
    other = drawn(files, tmp_path / "c", seed=1)
    assert other.manifest.rows_id != one.manifest.rows_id
    pairs = list(zip(one, other, strict=True))
    assert sum(a.input_ids.tolist() != b.input_ids.tolist() for a, b in pairs) > len(pairs) // 2


def test_a_small_top_p_draws_the_likeliest(files, tmp_path):
    greedy = capture(tmp_path / "a", files / "corpus.jsonl", **options(files))
    nearly = drawn(files, tmp_path / "b", top_p=0.01)
    assert [row.input_ids.tolist() for row in greedy] == [row.input_ids.tolist() for row in nearly]


def test_rows_are_named_by_what_wrote_them(files, tmp_path):
    corpus = files / "corpus.jsonl"
    cache = capture(tmp_path / "a", corpus, **options(files))
    spec = cache.manifest.preprocessing.generation
    assert spec == GenerationSpec(
        num_beams=1, max_new_tokens=NEW, temperature=0.0, top_p=1.0, seed=0, writer=spec.writer
    )
    assert cache.manifest.preprocessing.max_target_length == NEW
    shutil.copytree(files / "bart", tmp_path / "other")
    path = tmp_path / "other" / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repetition_penalty": 1.5}))
    penal = capture(tmp_path / "b", corpus, **options(files, teacher=str(tmp_path / "other")))
    assert penal.manifest.rows_id != cache.manifest.rows_id
    plain = capture(tmp_path / "c", corpus, teacher=str(files / "bart"))
    assert plain.manifest.preprocessing.generation is None
    assert plain.manifest.rows_id != cache.manifest.rows_id


def test_the_teacher_s_own_texts_are_scored_too(files, tmp_path):
    cache = capture(tmp_path / "c", files / "corpus.jsonl", **options(files))
    student = AutoModelForSeq2SeqLM.from_pretrained(files / "bart").eval()
    numbers = written_numbers(student, cache, Writing(rows=100, max_new_tokens=NEW))
    tokenizer = AutoTokenizer.from_pretrained(files / "bart")
    rows = [row for row in cache if row.reference]
    texts = [
        tokenizer.decode(row.input_ids[row.segments[0] :], skip_special_tokens=True) for row in rows
    ]
    assert numbers["teacher_chrf"] == pytest.approx(chrf(texts, [row.reference for row in rows]))
    assert numbers["written_rows"] == len(rows) == 48


def test_plan_says_that_it_is_rough(files, tmp_path):
    def plan(**changes):
        given = options(files) | {"task": "seq2seq-lm", "device": "cpu"} | changes
        return estimate(PlanConfig(out=tmp_path / "p", corpus=str(files / "corpus.jsonl"), **given))

    assert "answers taken to be as long as the corpus' own" in estimate_text(plan())
    cache = capture(tmp_path / "c", files / "corpus.jsonl", max_length=1024, **options(files))
    planned = plan(calibrate=True)
    assert "was seen on few documents" in estimate_text(planned)
    assert planned["positions"] == int(cache.row_positions.sum())


def test_a_batch_that_does_not_fit_says_what_to_change(files, tmp_path, monkeypatch):
    def no_room(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    load = Teacher.load
    monkeypatch.setattr(Teacher, "load", lambda *a, **k: with_generate(load(*a, **k), no_room))
    with pytest.raises(Exception, match=r"out of memory: writing 9 tokens .* smaller --forward-t"):
        capture(tmp_path / "c", files / "corpus.jsonl", **options(files))


def with_generate(teacher, function):
    teacher.model.generate = function
    return replace(teacher)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": "none", "tokenizer": "x"}, "not --targets none"),
        ({"pack": True, "task": "causal-lm"}, "--pack is not there with --generate"),
        ({"num_beams": 2, "sample_temperature": 1.0}, "not with --num-beams above 1"),
        ({"task": "causal-lm", "max_length": NEW}, "leaves no room for a prompt in the 9 tokens"),
        ({"top_p": 0.5}, "--top-p is only read with --sample-temperature"),
        ({"max_target_length": 5}, "--max-target-length is only read with --no-generate"),
        ({"generate": False, "num_beams": 2}, "--num-beams is only read with --generate"),
    ],
)
def test_what_cannot_be_written_is_refused(files, tmp_path, changes, message):
    given = options(files) | {"task": "seq2seq-lm", "corpus": "c", "out": tmp_path / "c"}
    if not changes.get("generate", True):
        given["max_new_tokens"] = 256
    with pytest.raises(ConfigError, match=message):
        CaptureConfig(**given | changes)


def test_a_text_has_nothing_to_be_answered(files, tmp_path, corpus_file, teacher_dir):
    config = CaptureConfig(
        out=tmp_path / "c",
        corpus=str(corpus_file),
        **options(files, teacher=str(teacher_dir)),
    )
    with pytest.raises(CorpusError, match="reads messages or prompt and completion or prompt, and"):
        open_corpus(config)


def test_messages_need_a_template(files, tmp_path, teacher_dir):
    given = options(files, teacher=str(teacher_dir), max_length=64, device="cpu")
    with pytest.raises(CorpusError, match="this tokenizer has no chat template"):
        run(CaptureConfig(out=tmp_path / "c", corpus=str(files / "talks.jsonl"), **given))
