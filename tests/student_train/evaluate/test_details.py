"""What a report shows of single rows and positions, against plain torch on tiny models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from shared.cache import Cache, open_cache
from shared.errors import ConfigError
from shared.rows import Row
from student_train.cli import _evaluation_text
from student_train.config import EvaluateConfig
from student_train.evaluate.details import Details, row_numbers, token_texts
from student_train.evaluate.evaluate import evaluate, run
from student_train.loss.positions import LinearHead, answers_of_logits, answers_of_states
from student_train.loss.rows import SoftTarget
from student_train.metrics.confusion import MOST_CLASSES, Confusion
from student_train.metrics.labels import calibration_error
from student_train.metrics.reliability import Reliability
from tests.conftest import llama_config
from tests.student_train.label_caches import (
    LABELS,
    TAGS,
    bert_config,
    logits_at,
    make_rows,
    make_teacher,
    write_cache,
)
from tests.student_train.tasks.test_labels import fresh

ROWS = 90


@pytest.fixture(scope="module")
def teachers() -> dict[str, Any]:
    return {task: make_teacher(task) for task in LABELS}


@pytest.fixture(scope="module")
def caches(tmp_path_factory, tokenizer_dir, teachers) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("labels")
    return {
        task: write_cache(folder / task, tokenizer_dir, task, make_rows(task, ROWS), teacher)
        for task, teacher in teachers.items()
    }


@pytest.fixture(scope="module")
def language_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "model"
    torch.manual_seed(7)
    model = LlamaForCausalLM(llama_config())
    with torch.no_grad():
        model.lm_head.weight.mul_(15)
    model.save_pretrained(folder)
    return folder


def plain(model: Any, row: Row) -> torch.Tensor:
    """Log-probabilities [P, V] of a causal model over one row alone."""
    with torch.no_grad():
        logits_TV = model(input_ids=row.input_ids[None]).logits[0].double()
    return logits_TV[row.positions].log_softmax(-1)


def losses_of(logprobs_PV: torch.Tensor, labels_P: torch.Tensor) -> np.ndarray:
    return -logprobs_PV.gather(1, labels_P[:, None])[:, 0].numpy()


def worst_first(score_R: np.ndarray) -> list[int]:
    return np.argsort(-score_R, kind="stable").tolist()


@pytest.mark.parametrize("seed", range(5))
def test_bins_equal_a_direct_count(seed):
    rng = np.random.default_rng(seed)
    confidence = np.concatenate([rng.random(500), [0.0, 1.0, 1 / 15, 2 / 15, 0.2]])
    right = rng.random(505) < confidence**2
    found = Reliability()
    for part in np.array_split(np.arange(505), 7):
        found.add(confidence[part], right[part])
    for number, one in enumerate(found.bins()):
        low, high = one["low"], one["high"]
        inside = (confidence > low) & (confidence <= high)
        if number == 0:
            inside |= confidence == 0
        assert one["count"] == inside.sum()
        assert one["confidence"] == pytest.approx(confidence[inside].mean())
        assert one["right"] == pytest.approx(right[inside].mean())
    assert found.error == pytest.approx(calibration_error(confidence, right), abs=1e-12)


def test_an_empty_bin_has_no_share():
    found = Reliability()
    found.add(np.array([0.99]), np.array([True]))
    assert [one["count"] for one in found.bins()] == [0] * 14 + [1]
    assert found.bins()[3] == {
        "low": 3 / 15,
        "high": 4 / 15,
        "count": 0,
        "confidence": None,
        "right": None,
    }
    assert Reliability().error == 0.0


def test_classes_by_hand():
    """Of 4 times a, 2 times b and never c: a is right 3 times; once it is taken for c."""
    found = Confusion(("a", "b", "c", "d"))
    found.add(np.array([0, 0, 0]), np.array([0, 0, 2]))
    found.add(np.array([0, 1, 1]), np.array([0, 0, 0]))
    assert found.classes() == [
        {"name": "a", "precision": 3 / 5, "recall": 3 / 4, "f1": 6 / 9, "support": 4},
        {"name": "b", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 2},
        {"name": "c", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0},
    ]
    assert found.confusions() == [
        {"label": "b", "answer": "a", "count": 2, "share": 1.0},
        {"label": "a", "answer": "c", "count": 1, "share": 0.25},
    ]


def test_of_many_classes_those_of_the_most_support_are_listed():
    found = Confusion([str(number) for number in range(80)])
    labels = np.repeat(np.arange(80), np.arange(80) + 1)
    found.add(labels, labels)
    assert [one["name"] for one in found.classes()] == [str(79 - n) for n in range(MOST_CLASSES)]


def random_target(kind: str, N: int, C: int) -> SoftTarget:
    generator = torch.Generator().manual_seed(3)
    logp_NC = torch.randn(N, C, generator=generator).mul(2).log_softmax(-1)
    if kind == "dense":
        ids_NC = torch.arange(C).expand(N, C)
        return SoftTarget(ids_NC, logp_NC, torch.full((N,), -torch.inf), kind="dense")
    top_N4, ids_N4 = logp_NC.topk(4)
    if kind == "topk":
        return SoftTarget(ids_N4, top_N4, torch.log1p(-top_N4.exp().sum(1)))
    counts_N = torch.arange(N) % 4 + 1  # adaptive: 1 to 4 entries
    kept_N4 = torch.arange(4) < counts_N[:, None]
    tail_N = 1 - (top_N4.exp() * kept_N4).sum(1)
    return SoftTarget(
        ids_N4[kept_N4], top_N4[kept_N4], tail_N.log(), counts=counts_N, kind="adaptive"
    )


@pytest.mark.parametrize("kind", ["topk", "dense", "adaptive"])
def test_answers_of_positions_equal_their_definitions(kind):
    N, C = 150, 11  # more than one chunk of 64
    target = random_target(kind, N, C)
    generator = torch.Generator().manual_seed(4)
    logits_NV = torch.randn(N, C + 3, generator=generator) * 3  # 3 more than there are classes
    labels_N = torch.randint(0, C, (N,), generator=generator)
    labels_N[5] = -1
    found = answers_of_logits(logits_NV, target, labels_N, C)
    logq_NC = logits_NV[:, :C].double().log_softmax(-1)
    padded = target.at(slice(None))
    for n in range(N):
        expected = 0.0 if n == 5 else -float(logq_NC[n, labels_N[n]])
        assert float(found["loss"][n]) == pytest.approx(expected, rel=1e-5)
        assert int(found["student"][n]) == int(logq_NC[n].argmax())
        assert float(found["probability"][n]) == pytest.approx(float(logq_NC[n].exp().max()))
        entries = {
            int(i): float(lp)
            for i, lp in zip(padded.ids[n], padded.logprobs[n], strict=True)
            if lp > -torch.inf
        }
        kl = sum(np.exp(lp) * (lp - float(logq_NC[n, i])) for i, lp in entries.items())
        rest = sum(float(logq_NC[n, i].exp()) for i in range(C) if i not in entries)
        tail = float(target.log_tail[n].exp())
        if tail:
            kl += tail * np.log(tail / rest)
        assert float(found["kl"][n]) == pytest.approx(kl, rel=1e-3, abs=1e-5)
        best = max(entries, key=lambda i: entries[i])
        assert int(found["teacher"][n]) == best
        assert float(found["teacher_probability"][n]) == pytest.approx(np.exp(entries[best]))


def test_a_head_with_scale_cap_and_bias_gives_the_same_answers(monkeypatch):
    monkeypatch.setattr("student_train.loss.positions._CHUNK_ELEMENTS", 1)
    torch.manual_seed(0)
    states, weight, bias = torch.randn(130, 8), torch.randn(14, 8), torch.randn(14)
    labels = torch.randint(0, 11, (130,))
    head = LinearHead(weight, bias, 0.5, 3.0)
    logits = 3.0 * torch.tanh((states @ weight.t() + bias) * 0.5 / 3.0)
    found = answers_of_states(states, head, None, labels, 11)
    torch.testing.assert_close(found, answers_of_logits(logits, None, labels, 11))
    assert found.keys() == {"loss", "student", "probability"}


def test_the_worst_rows_of_a_language_model(cache_dir, language_model):
    """Against a plain forward of every row; three are listed, of several blocks and shards."""
    cache = open_cache(cache_dir)
    model = LlamaForCausalLM.from_pretrained(language_model).eval()
    logprobs = [plain(model, row) for row in cache]
    losses = [losses_of(lp, row.labels) for lp, row in zip(logprobs, cache, strict=True)]
    means = np.array([each.mean() for each in losses])
    config = EvaluateConfig(student=str(language_model), cache=cache_dir, device="cpu", worst=3)
    numbers = run(config)
    worst = numbers["details"]["worst"]
    expected = worst_first(means)[:3]
    assert [one["row_id"] for one in worst] == [cache[index].row_id for index in expected]
    tokenizer = AutoTokenizer.from_pretrained(cache_dir / "tokenizer")
    for one, index in zip(worst, expected, strict=True):
        row = cache[index]
        assert one["loss"] == pytest.approx(means[index], rel=1e-5)
        assert (one["document"], one["chunk"]) == (row.row_id >> 24, row.row_id & 0xFFFFFF)
        assert "".join(one["tokens"]) == tokenizer.decode(row.input_ids)
        marked = np.sort(worst_first(losses[index])[:12])
        assert [a["token"] for a in one["answers"]] == (row.positions[marked] + 1).tolist()
        for answer, place in zip(one["answers"], marked.tolist(), strict=True):
            logp = logprobs[index][place]
            assert answer["label"] == tokenizer.decode([int(row.input_ids[answer["token"]])])
            assert answer["student"] == tokenizer.decode([int(logp.argmax())])
            assert answer["probability"] == pytest.approx(float(logp.exp().max()), rel=1e-4)
            ids, lp = row.targets.entries(place)
            assert answer["teacher"] == tokenizer.decode([int(ids[lp.argmax()])])
            assert answer["teacher_probability"] == pytest.approx(float(lp.exp().max()))
    # Calibration over all positions at once.
    flat = torch.cat(logprobs)
    right = flat.argmax(1) == torch.cat([row.labels for row in cache])
    ece = calibration_error(flat.exp().max(1).values.numpy(), right.numpy())
    assert numbers["ece"] == pytest.approx(ece, rel=1e-4)
    assert sum(one["count"] for one in numbers["details"]["reliability"]) == numbers["positions"]


def test_ranked_by_kl_their_mean_is_that_of_all(cache_dir, language_model):
    cache = open_cache(cache_dir)
    model = LlamaForCausalLM.from_pretrained(language_model).eval()
    details = Details(cache, worst=10_000, by="kl")
    numbers = evaluate(model, cache, batch_tokens=700, details=details)
    rows = details.numbers()["worst"]
    assert len(rows) == cache.num_rows
    kl = [one["kl"] for one in rows]
    assert kl == sorted(kl, reverse=True)
    total = sum(one["kl"] * one["positions"] for one in rows)
    assert total / numbers["positions"] == pytest.approx(numbers["kl_bucketed"], rel=1e-5)
    loss = sum(one["loss"] * one["positions"] for one in rows)
    assert loss / numbers["positions"] == pytest.approx(numbers["loss"], rel=1e-5)


@pytest.mark.parametrize("task", list(LABELS))
def test_the_worst_rows_over_labels(task, caches, teachers):
    cache, rows = open_cache(caches[task]), make_rows(task, ROWS)
    student = fresh(bert_config(), task)
    details = Details(cache, worst=4, by="loss")
    numbers = evaluate(student, cache, batch_tokens=300, details=details)
    found = details.numbers()
    with torch.no_grad():
        logprobs = [logits_at(student, row).double().log_softmax(-1) for row in rows]
        teacher = [logits_at(teachers[task], row).softmax(-1) for row in rows]
    labels = [torch.from_numpy(row.labels).long() for row in rows]
    means = np.array([losses_of(lp, of).mean() for lp, of in zip(logprobs, labels, strict=True)])
    expected = worst_first(means)[:4]
    assert [one["document"] for one in found["worst"]] == expected
    names = LABELS[task]
    for one, index in zip(found["worst"], expected, strict=True):
        assert one["loss"] == pytest.approx(means[index], rel=1e-4)
        assert [a["label"] for a in one["answers"]] == [names[c] for c in labels[index]]
        best = logprobs[index].argmax(1)
        assert [a["student"] for a in one["answers"]] == [names[c] for c in best]
        says = teacher[index].argmax(1)
        assert [a["teacher"] for a in one["answers"]] == [names[c] for c in says]
        places = rows[index].positions.tolist() if task == "token-classification" else [None]
        assert [a["token"] for a in one["answers"]] == places
    assert found["ece"] == pytest.approx(numbers["ece"], abs=1e-6)
    predicted = torch.cat(logprobs).argmax(1)
    gold = torch.cat(labels)
    for one in found["classes"]:
        c = names.index(one["name"])
        both = int(((predicted == c) & (gold == c)).sum())
        assert one["support"] == int((gold == c).sum())
        assert one["precision"] == pytest.approx(both / max(1, int((predicted == c).sum())))
        assert one["recall"] == pytest.approx(both / max(1, one["support"]))
    wrong = sum(one["count"] for one in found["confusions"])
    assert wrong == int((predicted != gold).sum())
    right = torch.cat(teacher).argmax(1) == gold
    share = sum(b["right"] * b["count"] for b in found["teacher_reliability"] if b["count"])
    assert share == pytest.approx(int(right.sum()))


def test_rows_are_found_by_their_ids(cache_dir):
    cache = open_cache(cache_dir)
    wanted = [cache[index].row_id for index in (0, 17, len(cache) - 1)]
    assert row_numbers(cache, wanted) == dict(zip(wanted, (0, 17, len(cache) - 1), strict=True))


def test_tokens_that_are_parts_of_a_character(tokenizer_dir):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    ids = tokenizer("the word é so")["input_ids"] + [tokenizer.eos_token_id]
    texts = token_texts(tokenizer, ids)
    assert len(texts) == len(ids)
    assert "".join(texts).startswith("the word")
    assert texts[-1] == "<|end|>"


def page_of(cache: Path, student: Path, out: Path, **options: Any) -> str:
    run(EvaluateConfig(student=str(student), cache=cache, html=out, device="cpu", **options))
    return out.read_text()


def test_markup_in_the_corpus_and_in_labels_is_text_on_the_page(
    capture, tmp_path, language_model, tokenizer_dir
):
    hostile = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    (tmp_path / "corpus.txt").write_text((hostile + " the word\n") * 30)
    cache = capture(corpus=str(tmp_path / "corpus.txt"))
    html = page_of(cache, language_model, tmp_path / "page.html")
    assert "<script" not in html
    assert "<img" not in html
    assert "&lt;" in html
    task, tags = "token-classification", ("O", "B-<script>", "I-<script>", "B-LOC", "I-LOC")
    model = fresh(bert_config(), task)
    model.config.id2label = dict(enumerate(tags))
    model.config.label2id = {tag: index for index, tag in enumerate(tags)}
    model.save_pretrained(tmp_path / "tagger")
    path = write_cache(tmp_path / "c", tokenizer_dir, task, make_rows(task, 20), labels=tags)
    html = page_of(path, tmp_path / "tagger", tmp_path / "tags.html")
    assert "<script" not in html
    assert "B-&lt;script&gt;" in html


@pytest.mark.parametrize("task", list(LABELS))
def test_the_page_shows_student_and_teacher(task, caches, teachers, tmp_path):
    teachers[task].save_pretrained(tmp_path / "student")
    html = page_of(caches[task], tmp_path / "student", tmp_path / "page.html", worst=5)
    assert html.count("<svg") == 2
    assert html.count('class="card row"') == 5
    numbers = run(
        EvaluateConfig(student=str(tmp_path / "student"), cache=caches[task], device="cpu")
    )
    assert "details" not in numbers
    metric = numbers["metric"]
    assert f"{numbers[f'{metric}_low']:.4f} to {numbers[f'{metric}_high']:.4f}" in html
    assert f"<td>{numbers[metric]:.4f}</td>" in html
    assert all(f"<td>{name}</td>" in html for name in (TAGS if "token" in task else LABELS[task]))


def test_details_are_there_where_they_are_asked_for(cache_dir, language_model, tmp_path):
    common: dict[str, Any] = {"student": str(language_model), "cache": cache_dir, "device": "cpu"}
    numbers = run(EvaluateConfig(**common))
    assert not {"details", "ece"} & numbers.keys()
    numbers = run(EvaluateConfig(**common, html=tmp_path / "page.html"))
    assert "details" not in numbers
    assert (tmp_path / "page.html").read_text().count('class="card row"') == 20
    numbers = run(EvaluateConfig(**common, worst=2))
    assert len(numbers["details"]["worst"]) == 2
    assert json.loads(json.dumps(numbers)) == numbers
    text = _evaluation_text(numbers)
    assert f"document {numbers['details']['worst'][0]['document']}" in text


def test_a_kl_that_no_row_has_is_refused(labels_dir, language_model):
    with pytest.raises(ConfigError, match=r"--worst-by kl: .* holds no teacher, so the KL of sing"):
        run(
            EvaluateConfig(
                student=str(language_model), cache=labels_dir, worst=2, worst_by="kl", device="cpu"
            )
        )


def test_rows_whose_loss_is_not_a_number_are_the_worst(cache_dir, language_model):
    """Weights that overflowed for one token: its rows come first."""
    cache: Cache = open_cache(cache_dir)
    model = LlamaForCausalLM.from_pretrained(language_model).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[int(cache[3].input_ids[1])] = torch.nan
    broken = [row.row_id for row in cache if cache[3].input_ids[1] in row.input_ids[row.positions]]
    assert 2 <= len(broken) < len(cache)
    details = Details(cache, worst=2, by="loss")
    evaluate(model, cache, batch_tokens=3000, details=details)
    assert {one["row_id"] for one in details.numbers()["worst"]} <= set(broken)
