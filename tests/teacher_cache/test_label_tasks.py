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
from teacher_cache.check import check
from teacher_cache.config import CaptureConfig, CheckConfig
from teacher_cache.corpus import open_corpus
from teacher_cache.job import run
from teacher_cache.label_rows import Labelled, Tagged, build
from tests.conftest import WORDS

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
        ({"pack": True}, "--pack and --hidden-layers are not there"),
        ({"task": "causal-lm", "labels": Path("x")}, "--labels is only read with --task"),
    ],
)
def test_what_a_label_space_has_not_is_refused(options, message, tmp_path):
    defaults = {"task": "sequence-classification", "teacher": "t", "corpus": "c", "out": tmp_path}
    with pytest.raises(ConfigError, match=message):
        CaptureConfig(**defaults | options)
