"""Column files of tagged words: what is read, against sentences written out by hand; refusals."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
import torch
from transformers import BertConfig, BertForTokenClassification

from shared.cache import open_cache
from shared.errors import ConfigError, CorpusError
from teacher_cache.config import CaptureConfig
from teacher_cache.corpus.conll import Columns, columns_of, read_sentences
from teacher_cache.corpus.documents import Tagged
from teacher_cache.corpus.sources import open_corpus
from teacher_cache.job.run import run
from tests.conftest import WORDS

SENTENCES = [
    (["the", "way", "of", "#", "two"], ["O", "B-X", "I-X", "O", "B-Y"]),
    (["#", "go"], ["B-Y", "O"]),
    (["so"], ["O"]),
]
BY_WORDS = "".join(
    "".join(f"{word} NN {tag}\n" for word, tag in zip(*sentence, strict=True)) + "\n"
    for sentence in SENTENCES
)
BY_TABS = BY_WORDS.replace(" ", "\t")


def opened(path: Path | str, **options: object):
    options = {"task": "token-classification", "targets": "none", "tokenizer": "t"} | options
    return open_corpus(CaptureConfig(corpus=str(path), out=Path("o"), **options))


def sentences_of(path: Path | str, **options: object) -> list[tuple[list[str], list[str]]]:
    corpus = opened(path, **options)
    return [(list(d.tokens), list(d.tags)) for d in corpus.read(range(len(corpus)))]


def written(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".conll", ".bio", ".iob", ".iob2", ".tsv"])
@pytest.mark.parametrize("text", [BY_WORDS, BY_TABS], ids=["spaces", "tabs"])
def test_first_and_last_column_are_word_and_tag(text, suffix, tmp_path):
    assert sentences_of(written(tmp_path / f"c{suffix}", text)) == SENTENCES


@pytest.mark.parametrize("text", ["the\nway\n\nso\n", "X\tthe\nX\tway\n\nX\tso\n"])
def test_without_tags_a_column_of_words_is_enough(text, tmp_path):
    """It may be the only one, or the last one, where the tags usually are."""
    path = written(tmp_path / "c.conll", text)
    columns = ("tokens=1",) if "\t" in text else ()
    options = {"unlabelled": True, "targets": "auto", "teacher": "t", "tokenizer": None}
    corpus = opened(path, columns=columns, **options)
    assert [d.tokens for d in corpus.read(range(len(corpus)))] == [("the", "way"), ("so",)]
    assert set(corpus.columns) == {"tokens"}
    with pytest.raises(ConfigError, match="--columns tags=0: with --unlabelled no tags are read"):
        opened(path, columns=("tags=0",), **options)


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: text.rstrip("\n"),
        lambda text: "\n\n" + text.replace("\n\n", "\n\n\n"),
        lambda text: "-DOCSTART- -X- O O\n\n" + text,
        lambda text: text.replace("so NN", "-DOCSTART- -X- O O\n\nso NN"),
        lambda text: text.replace(" ", "  ").replace("\n\n", "\n \n"),
        lambda text: text.replace("the NN", "# id 7f3a\tdomain=en\nthe NN"),
        lambda text: "# text = the way of # two\n# more\n" + text.replace(" ", "\t"),
    ],
    ids=[
        "crlf",
        "bom",
        "no-end",
        "blanks",
        "docstart",
        "docstarts",
        "spaces",
        "id-line",
        "comments",
    ],
)
def test_what_is_no_word_is_left_out(change, tmp_path):
    (tmp_path / "c.conll").write_bytes(change(BY_WORDS).encode())
    assert sentences_of(tmp_path / "c.conll") == SENTENCES


def test_a_hash_is_a_word_where_its_line_has_the_columns_of_a_word(tmp_path):
    for name, text in (("a.conll", "# O\nb O\n"), ("b.conll", "#\tO\n#b\tO\n"), ("c.bio", "# O")):
        tokens = [
            word for words, _ in sentences_of(written(tmp_path / name, text)) for word in words
        ]
        assert tokens == [line.split()[0] for line in text.strip().split("\n")]


def test_a_space_that_is_part_of_a_word_splits_nothing(tmp_path):
    text = "10\u00a0000 O\na\u2028b B-X\n"
    assert sentences_of(written(tmp_path / "c.conll", text)) == [
        (["10\u00a0000", "a\u2028b"], ["O", "B-X"])
    ]
    assert sentences_of(written(tmp_path / "c.tsv", "New York\tB-X\n")) == [(["New York"], ["B-X"])]


@pytest.mark.parametrize("columns", [("tags=1",), ("tokens=0", "tags=-2"), ("tokens=-3", "tags=1")])
def test_columns_by_number(columns, tmp_path):
    path = written(tmp_path / "c.conll", BY_WORDS)
    expected = [(words, ["NN"] * len(words)) for words, _ in SENTENCES]
    assert sentences_of(path, columns=columns) == expected
    assert opened(path, columns=columns).labels() == ("NN",)


def test_universal_dependencies_are_read_by_form_and_upos(tmp_path):
    text = (
        "# sent_id = 1\n# text = can't so\n"
        "1-2\tcan't\t_\t_\n1\tca\tcan\tAUX\n2\tn't\tnot\tPART\n2.1\tgo\tgo\tVERB\n3\tso\tso\tADV\n"
    )
    path = written(tmp_path / "c.conllu", text)
    assert sentences_of(path) == [(["ca", "n't", "so"], ["AUX", "PART", "ADV"])]
    assert sentences_of(path, columns=("tags=2",)) == [(["ca", "n't", "so"], ["can", "not", "so"])]


def test_folders_splits_and_slices(tmp_path):
    first, *others = BY_WORDS.split("\n\n", 1)
    written(tmp_path / "c" / "train-0.conll", first)
    written(tmp_path / "c" / "train-1.conll", others[0])
    written(tmp_path / "c" / "test.conll", "so O\n")
    assert sentences_of(tmp_path / "c") == SENTENCES
    assert sentences_of(tmp_path / "c", split="train[1:]") == SENTENCES[1:]
    assert sentences_of(tmp_path / "c", split="train[:34%]") == SENTENCES[:1]
    assert sentences_of(tmp_path / "c", split="test") == [(["so"], ["O"])]
    assert sentences_of(f"{tmp_path}/c/*-1.conll") == SENTENCES[1:]
    assert opened(tmp_path / "c").read([2, 0]) == [
        Tagged(tuple(words), tuple(tags)) for words, tags in (SENTENCES[2], SENTENCES[0])
    ]


def test_one_changed_byte_is_another_corpus_and_is_read_anew(tmp_path):
    path = written(tmp_path / "c.conll", BY_WORDS)
    date, before = path.stat().st_mtime_ns, opened(path).info.fingerprint
    written(path, BY_WORDS.replace("so NN O", "so NN B"))
    os.utime(path, ns=(date, date))
    assert opened(path).info.fingerprint != before
    assert sentences_of(path)[-1] == (["so"], ["B"])


def test_bad_utf8_can_be_replaced(tmp_path):
    (tmp_path / "c.conll").write_bytes(b"a O\nb\xff B\n")
    expected = [(["a", "b\ufffd"], ["O", "B"])]
    assert sentences_of(tmp_path / "c.conll", encoding_errors="replace") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a X O\nb O\n", "line 2: found 2 columns ('b O'), expected 3 as in line 1. Mend the line"),
        ("a O\n\nb X O\n", "line 3: found 3 columns ('b X O'), expected 2 as in line 1."),
        ("a\tX\tO\n# b\n", "line 2: found 1 columns ('# b'), expected 3 as in line 1."),
        ("\na\nb\n", "line 2: found one column, expected at least two, a word and its tag. Where"),
        ("a\tO\nb\t\n", "line 2: column -1 is empty, expected a text"),
        ("a\tO\n\tO\n", "line 2: column 0 is empty, expected a text"),
        ("a O\nb \xff\n".encode("latin-1"), "line 2: not UTF-8 (invalid start byte at byte 2)."),
    ],
)
def test_a_line_that_cannot_be_read_is_named(text, message, tmp_path):
    path = tmp_path / "c.conll"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CorpusError) as error:
        opened(path)
    assert str(error.value).startswith(f"{path}, {message}")


def test_a_fault_in_the_second_file_names_the_second_file(tmp_path):
    written(tmp_path / "a.bio", "a O\n")
    written(tmp_path / "b.bio", "a O\nb\n")
    with pytest.raises(CorpusError, match=r"b\.bio, line 2: found 1 columns"):
        opened(tmp_path)


def test_a_file_without_words(tmp_path):
    path = written(tmp_path / "c.conll", "-DOCSTART- -X- O O\n\n")
    with pytest.raises(
        CorpusError, match=r"c\.conll: found no word in this file, expected one per"
    ):
        opened(path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (("tags=5",), "line 1: found 3 columns, but tags are expected in column 5. Name another"),
        (("tokens=-4",), "but tokens are expected in column -4. Name another one with --columns"),
        (("tags=-3",), "found 3 columns, of which 0 and -3 are the same one"),
        (("tags=0",), "words and tags are both column 0; expected two columns"),
        (("tags=ner",), "--columns tags=ner: a column file has no names. Expected tokens=N or"),
        (("text=1",), "--columns text=1: a column file has no names. Expected tokens=N or tags=N"),
    ],
)
def test_columns_that_are_not_there(columns, message, tmp_path):
    path = written(tmp_path / "c.conll", BY_WORDS)
    with pytest.raises((CorpusError, ConfigError)) as error:
        opened(path, columns=columns)
    assert message in str(error.value)


def test_column_files_of_another_task_of_two_kinds_or_compressed(tmp_path):
    path = written(tmp_path / "c" / "a.conll", BY_WORDS)
    with pytest.raises(CorpusError, match="a corpus of --task token-classification, not of causal"):
        opened(path, task="causal-lm")
    written(tmp_path / "c" / "b.tsv", BY_TABS)
    with pytest.raises(
        CorpusError, match=r"b\.tsv: its columns may have other meanings than those"
    ):
        opened(tmp_path / "c")
    path.rename(tmp_path / "c.conll.gz")
    with pytest.raises(CorpusError, match="column files are not read compressed: unpack it"):
        opened(tmp_path / "c.conll.gz")


def test_the_parser_alone():
    assert columns_of({}, ".conll") == Columns(0, -1)
    assert columns_of({"tags": "2"}, ".conllu") == Columns(1, 2)
    with pytest.raises(CorpusError, match="no word in this file"):
        list(read_sentences(Path(os.devnull), Columns(0, 1)))


@pytest.fixture(scope="module")
def tagger(tokenizer_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """A random tagger with names for its classes, in the order given."""

    def make(*names: str) -> str:
        folder = tmp_path_factory.mktemp("tagger")
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=300,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=64,
            **({"id2label": dict(enumerate(names))} if names else {"num_labels": 3}),
        )
        BertForTokenClassification(config).save_pretrained(folder)
        for path in tokenizer_dir.iterdir():
            shutil.copy(path, folder)
        return str(folder)

    return make


def captured(out: Path, corpus: Path, teacher: str):
    options = {"teacher": teacher, "corpus": str(corpus), "max_length": 32, "device": "cpu"}
    run(CaptureConfig(task="token-classification", out=out, shard_tokens=300, **options))
    return open_cache(out)


def columns_in(cache) -> list[list[dict[str, object]]]:
    """Every byte of every column of every shard, without the name of the cache."""
    files = [cache.path / commit.file for commit in cache.commits]
    return [pa.ipc.open_file(str(file)).read_all().to_pylist() for file in files]


def test_a_column_file_and_the_same_sentences_as_json_give_the_same_shards(tagger, tmp_path):
    tags = ("O", "B-X", "I-X")
    rows = [
        {"tokens": WORDS[i : i + 9], "tags": [tags[(i + j) % 3] for j in range(9)]}
        for i in range(70)
    ]
    written(tmp_path / "c.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    lines = ["".join(f"{w} {t}\n" for w, t in zip(*r.values(), strict=False)) for r in rows]
    written(tmp_path / "c.conll", "\n".join(lines))
    teacher = tagger(*tags)
    one, other = (
        captured(tmp_path / kind, tmp_path / f"c.{kind}", teacher) for kind in ("conll", "jsonl")
    )
    assert columns_in(one) == columns_in(other)
    assert len(one.commits) > 1
    assert one.manifest.preprocessing.columns == ("tokens=0", "tags=-1")
    assert [c.statistics for c in one.commits] == [c.statistics for c in other.commits]


# Data sets that name their classes


NAMES = ["B-X", "I-X", "O"]


def parquet(path: Path) -> Path:
    features = datasets.Features(
        {
            "tokens": datasets.List(datasets.Value("string")),
            "ner_tags": datasets.List(datasets.ClassLabel(names=NAMES)),
        }
    )
    rows = {"tokens": [["the", "way"], ["so"]] * 20, "ner_tags": [[2, 0], [-1]] * 20}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(path))
    return path


def test_classes_have_the_names_that_the_data_set_gives_them(tmp_path):
    corpus = opened(parquet(tmp_path / "c.parquet"))
    assert corpus.labels() == tuple(NAMES)
    assert corpus.read([0, 1]) == [Tagged(("the", "way"), ("O", "B-X")), Tagged(("so",), (None,))]
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])}
    )
    rows = {"text": ["a", "b"], "label": [1, 0]}
    path = str(tmp_path / "d.parquet")
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)
    corpus = opened(path, task="sequence-classification")
    assert corpus.labels() == ("no", "yes")
    assert [document.label for document in corpus.read([0, 1])] == ["yes", "no"]


def test_a_teacher_that_counts_in_another_order_gets_its_own_numbers(tagger, tmp_path):
    corpus = parquet(tmp_path / "c.parquet")
    cache = captured(tmp_path / "other", corpus, tagger("O", "B-X", "I-X"))
    assert cache.manifest.labels == ("O", "B-X", "I-X")
    assert cache[0].labels.tolist() == [0, 1]
    cache = captured(tmp_path / "unnamed", corpus, tagger())
    assert cache.manifest.labels == tuple(NAMES)
    assert cache[0].labels.tolist() == [2, 0]
    with pytest.raises(
        CorpusError, match=r"found the label 'B-X', expected a number below 2 or one"
    ):
        captured(tmp_path / "none", corpus, tagger("O", "I-X"))
