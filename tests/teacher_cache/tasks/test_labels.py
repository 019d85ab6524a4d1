"""Token and sequence classification through stage one, against the live model at every position."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
)

from shared.cache import open_cache
from shared.errors import CacheMismatch, ConfigError, CorpusError
from student_train.config import TrainConfig
from student_train.loss.attachment import attach
from student_train.loss.objective import Objective
from student_train.loss.spec import LossSpec
from student_train.run.run import run as train
from teacher_cache.config import CaptureConfig, CheckConfig, InspectConfig
from teacher_cache.corpus.documents import Labelled, Tagged
from teacher_cache.corpus.sources import open_corpus
from teacher_cache.job.run import run
from teacher_cache.tasks import labelled, tagged
from teacher_cache.tools.check.check import check
from teacher_cache.tools.inspect import inspect
from teacher_cache.tools.report import inspect_text
from tests.conftest import WORDS
from tests.student_train.loss.test_attachment import batches

TAGS = ("O", "B-thing", "I-thing")
CLASSES = ("calm", "loud", "odd", "plain")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A word-piece tokenizer with [CLS] and [SEP], two models, three corpora."""
    folder = tmp_path_factory.mktemp("labels")
    rng = np.random.default_rng(0)
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    options = {
        "vocab_size": len(fast),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    torch.manual_seed(0)
    for name, kind, labels in (
        ("tagger", BertForTokenClassification, TAGS),
        ("classifier", BertForSequenceClassification, CLASSES),
    ):
        config = BertConfig(**options, id2label=dict(enumerate(labels)))
        kind(config).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    tagged, classified, pairs = [], [], []
    for index in range(60):
        picks = rng.integers(0, len(WORDS), 3 + index % 30).tolist()
        words = [WORDS[i] + "making" * (i % 3 == 0) for i in picks]
        tags = [TAGS[i] for i in rng.integers(0, 3, len(words))]
        tagged.append({"tokens": words, "tags": tags})
        label = int(rng.integers(0, 4))
        classified.append({"text": " ".join(words), "label": CLASSES[label]})
        pairs.append({"sentence1": " ".join(words), "sentence2": words[0], "label": label})
    tagged[4] = {"tokens": [], "tags": []}
    classified[5]["label"] = None
    for name, rows in (("tagged", tagged), ("classified", classified), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder


def capture(files: Path, out: Path, corpus: str, **options: object):
    defaults = {"corpus": str(files / f"{corpus}.jsonl"), "max_length": 24, "device": "cpu"}
    defaults |= {"shard_tokens": 400}
    run(CaptureConfig(out=out, **defaults | options))
    return open_cache(out)


def same_as_live(row, live_PC) -> None:
    torch.testing.assert_close(row.targets.logprobs, live_PC.log_softmax(-1), rtol=2e-3, atol=2e-3)
    assert torch.equal(row.targets.ids, torch.arange(live_PC.shape[1]).expand_as(row.targets.ids))


def test_tagged_words_have_the_model_s_outputs_at_their_first_tokens(files, tmp_path):
    cache = capture(
        files,
        tmp_path / "c",
        "tagged",
        task="token-classification",
        teacher=str(files / "tagger"),
    )
    assert cache.manifest.labels == TAGS
    assert cache.manifest.targets.kind == "dense"
    model = BertForTokenClassification.from_pretrained(files / "tagger").eval()
    tokenizer = AutoTokenizer.from_pretrained(files / "tagger")
    documents = [json.loads(line) for line in (files / "tagged.jsonl").read_text().splitlines()]
    words: dict[int, list[str]] = {}
    tags: dict[int, list[str]] = {}
    for row in cache:
        assert row.input_ids[0] == 2
        assert row.input_ids[-1] == 3
        with torch.no_grad():
            same_as_live(row, model(row.input_ids[None]).logits[0, row.positions])
        document = row.row_id >> 24
        ends = [*row.positions.tolist()[1:], len(row.input_ids) - 1]
        for start, end in zip(row.positions.tolist(), ends, strict=True):
            text = tokenizer.decode(row.input_ids[start:end]).replace(" ##", "")
            words.setdefault(document, []).append(text.replace("##", ""))
        tags.setdefault(document, []).extend(TAGS[label] for label in row.labels)
    for index, document in enumerate(documents):
        assert words.get(index, []) == document["tokens"]  # whole words, also where rows were cut
        assert tags.get(index, []) == document["tags"]
    assert max(len(row.input_ids) for row in cache) <= 24
    assert len(cache) > 60
    assert check(
        CheckConfig(cache=tmp_path / "c", teacher=str(files / "tagger"), device="cpu")
    ).sound


@pytest.fixture(scope="module")
def with_states(files, tmp_path_factory) -> Path:
    """Tagged words with the states after block 0 and after the last one."""
    out, teacher = tmp_path_factory.mktemp("states") / "c", str(files / "tagger")
    options = {"task": "token-classification", "teacher": teacher, "hidden_layers": (-1, 0)}
    capture(files, out, "tagged", **options)
    return out


def test_states_are_the_model_s_at_the_first_tokens_of_words(files, with_states):
    model = BertForTokenClassification.from_pretrained(files / "tagger").eval()
    found = check(CheckConfig(cache=with_states, teacher=str(files / "tagger"), device="cpu"))
    assert found.sound
    for row in open_cache(with_states):
        with torch.no_grad():
            live = model.bert(row.input_ids[None], output_hidden_states=True)
        for layer, states_TD in ((-1, live.last_hidden_state[0]), (0, live.hidden_states[1][0])):
            cached = row.hidden[layer].float()
            torch.testing.assert_close(cached, states_TD[row.positions], rtol=1e-2, atol=1e-2)


def test_the_loss_of_states_equals_a_dense_reference(files, with_states):
    """A narrower student, by a projection for each pair of layers."""
    cache = open_cache(with_states)
    torch.manual_seed(5)
    teacher = BertForTokenClassification.from_pretrained(files / "tagger").eval()
    config = BertConfig.from_pretrained(files / "tagger", hidden_size=16, num_hidden_layers=2)
    student = BertForTokenClassification(config).eval()
    pairs = ((-1, -1), (0, 0))
    attachment = attach(
        student,
        Objective(
            spec=LossSpec(),
            num_classes=3,
            target_kind="dense",
            soft_weight=0.7,
            hard_weight=0.4,
            hidden_weight=0.25,
            layer_pairs=pairs,
            deviations={layer: cache.channel_deviation(layer) for layer, _ in pairs},
        ),
    )
    batch = batches(cache, 300, hidden_layers=(-1, 0))[1]
    output = student(**batch)
    output["loss"].backward()
    found = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}
    attachment.detach()
    student.zero_grad()

    at, labels = batch["position_index"], batch["labels"]
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    own = student(**inputs, output_hidden_states=True)
    with torch.no_grad():
        its = teacher(**inputs, output_hidden_states=True)
        logp = its.logits.flatten(0, 1)[at].log_softmax(-1)
    logq = own.logits.flatten(0, 1)[at].log_softmax(-1)
    soft = (logp.exp() * (logp - logq)).sum()
    hard = torch.nn.functional.cross_entropy(logq, labels, reduction="sum")
    hidden = torch.zeros(())
    for layer, name in ((-1, "m1_m1"), (0, "0_0")):
        place = -1 if layer == -1 else layer + 1
        mine, theirs = (each.hidden_states[place].flatten(0, 1)[at] for each in (own, its))
        error = student.distillation_projections[name](mine) - theirs
        hidden = hidden + (error / cache.channel_deviation(layer)).square().mean(1).sum()
    loss = (0.7 * soft + 0.4 * hard + 0.25 * hidden) / len(labels)
    loss.backward()
    # Log-probabilities are float16 and states bfloat16.
    torch.testing.assert_close(output["loss"], loss.detach(), rtol=5e-3, atol=0)
    for name, parameter in student.named_parameters():
        largest = float(parameter.grad.abs().max())
        torch.testing.assert_close(found[name], parameter.grad, rtol=0, atol=2e-2 * largest + 1e-7)


def test_a_tagger_learns_from_states_through_the_command(files, with_states, tmp_path):
    BertConfig.from_pretrained(files / "tagger", hidden_size=16).save_pretrained(tmp_path / "s")
    options = {"student": str(tmp_path / "s"), "cache": (with_states,), "device": "cpu"}
    result = train(
        TrainConfig(
            out=tmp_path / "run",
            max_steps=30,
            batch_tokens=300,
            learning_rate=3e-3,
            log_every=5,
            hidden_weight=0.5,
            hidden_map=("-1:-1", "0:0"),
            validation_cache=with_states,
            **options,
        )
    )
    assert "entity_f1" in result["validation"]
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    states = [line["hidden"] for line in lines if "hidden" in line]
    assert states[-1] < 0.9 * states[0]


def test_inspection_names_the_tags_of_words(files, tmp_path):
    path, teacher = tmp_path / "c", str(files / "tagger")
    cache = capture(files, path, "tagged", task="token-classification", teacher=teacher)
    numbers = inspect(InspectConfig(cache=path, rows=1))
    (shown,) = numbers["rows_shown"]
    row = next(row for row in cache if row.row_id == shown["row_id"])
    position, targets = shown["positions"][0], row.targets.logprobs[0]
    assert position["hard_label"] == TAGS[int(row.labels[0])]
    assert {e["token"]: e["p"] for e in position["teacher"]} == {
        name: pytest.approx(float(p.exp()), abs=1e-4) for name, p in zip(TAGS, targets, strict=True)
    }
    word = AutoTokenizer.from_pretrained(path / "tokenizer").decode([int(row.input_ids[1])])
    assert f"{word!r} in " in inspect_text(numbers)
    assert f"is {position['hard_label']}; the teacher says" in inspect_text(numbers)


@pytest.mark.parametrize("corpus", ["classified", "pairs"])
def test_texts_and_pairs_have_one_target_each(files, tmp_path, corpus):
    teacher = str(files / "classifier")
    cache = capture(files, tmp_path / "c", corpus, task="sequence-classification", teacher=teacher)
    model = BertForSequenceClassification.from_pretrained(teacher).eval()
    rows = [json.loads(line) for line in (files / f"{corpus}.jsonl").read_text().splitlines()]
    for row in cache:
        assert row.positions.tolist() == [0]
        types = row.token_type_ids
        if corpus == "pairs":
            second = row.input_ids.tolist().index(3) + 1
            assert types.tolist() == [int(i >= second) for i in range(len(types))]
        inputs = {} if types is None else {"token_type_ids": types[None]}
        with torch.no_grad():
            same_as_live(row, model(row.input_ids[None], **inputs).logits)
        label = rows[row.row_id >> 24]["label"]
        assert row.labels.tolist() == [label if corpus == "pairs" else CLASSES.index(label)]
    assert len(cache) == (60 if corpus == "pairs" else 59)
    assert check(CheckConfig(cache=tmp_path / "c", teacher=teacher, device="cpu")).sound


def test_hard_labels_need_no_teacher(files, tmp_path):
    options = {"task": "sequence-classification", "targets": "none"}
    tokenizer = str(files / "classifier")
    cache = capture(files, tmp_path / "c", "classified", tokenizer=tokenizer, **options)
    assert cache.manifest.labels == CLASSES  # sorted names of the corpus
    assert cache[0].targets is None
    (tmp_path / "labels.json").write_text(json.dumps(CLASSES[::-1]))
    asked = capture(
        files,
        tmp_path / "d",
        "classified",
        tokenizer=tokenizer,
        labels=tmp_path / "labels.json",
        **options,
    )
    assert [3 - int(row.labels) for row in asked] == [int(row.labels) for row in cache]


def test_labels_that_are_not_the_teacher_s_are_refused(files, tmp_path):
    (tmp_path / "labels.json").write_text(json.dumps(["calm", "odd", "loud", "plain"]))
    with pytest.raises(CacheMismatch, match="the first that differ are 'odd' and 'loud'"):
        capture(
            files,
            tmp_path / "c",
            "classified",
            task="sequence-classification",
            teacher=str(files / "classifier"),
            labels=tmp_path / "labels.json",
        )


def rows_of(files, document, labels=CLASSES, max_length=24):
    tokenizer = AutoTokenizer.from_pretrained(files / "tagger")
    counters = Counter()
    build = tagged.build if isinstance(document, Tagged) else labelled.build
    return list(build([(7, document)], tokenizer, max_length, labels, counters)), counters


def test_a_word_longer_than_a_row_keeps_its_first_tokens(files):
    document = Tagged(("so", "making" * 12, "long"), ("O", "B-thing", "O"))
    rows, counters = rows_of(files, document, TAGS, max_length=12)
    assert [row.labels.tolist() for row in rows] == [[0], [1], [0]]
    assert max(len(row.input_ids) for row in rows) == 12
    assert counters["cut_words"] == 1


def test_unlabelled_words_have_no_target(files):
    rows, _ = rows_of(files, Tagged(("so", "long", "no"), ("O", None, -100)), TAGS)
    assert [len(row.supervised) for row in rows] == [1]
    rows, counters = rows_of(files, Tagged(("so",), (None,)), TAGS)
    assert rows == []
    assert counters["rows_without_targets"] == 1


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (Labelled("so long", None, "wild"), r"document 7: found the label 'wild'.*calm, loud, odd"),
        (Labelled("so long", None, 4), "document 7: found the label 4, expected a number below 4"),
        (Tagged(("so", "long"), ("calm",)), "document 7: 2 tokens but 1 tags"),
        (Tagged(("so", "long"), ("calm", "x")), "document 7, token 1: found the label 'x'"),
    ],
)
def test_a_wrong_label_names_its_document(files, document, message):
    with pytest.raises(CorpusError, match=message):
        rows_of(files, document)


def test_columns_of_a_task_are_guessed_or_asked_for(files, tmp_path):
    def corpus(name, **options):
        defaults = {"targets": "none", "tokenizer": "x", "out": tmp_path / "c"}
        return open_corpus(CaptureConfig(corpus=str(files / f"{name}.jsonl"), **defaults | options))

    task = "sequence-classification"
    assert corpus("pairs", task=task).columns == {
        "text": "sentence1",
        "text_pair": "sentence2",
        "label": "label",
    }
    asked = corpus("pairs", task=task, columns=("text=sentence2", "label=label"))
    assert asked.columns == {"text": "sentence2", "label": "label"}
    with pytest.raises(CorpusError, match="reads tokens and tags, and there are the columns text"):
        corpus("classified", task="token-classification")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "topk"}, "--targets topk: --task .* keeps every class, which is dense"),
        ({"pack": True}, "--pack is not there"),
        ({"hidden_layers": (-1,)}, "--hidden-layers is not there for --task sequence-class"),
        ({"task": "causal-lm", "labels": Path("x")}, "--labels is only read with --task"),
    ],
)
def test_what_a_label_space_has_not_is_refused(options, message, tmp_path):
    defaults = {"task": "sequence-classification", "teacher": "t", "corpus": "c", "out": tmp_path}
    with pytest.raises(ConfigError, match=message):
        CaptureConfig(**defaults | options)
