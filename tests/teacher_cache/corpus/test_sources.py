"""Corpora as users have them, good and bad: what is read, its fingerprint, what an error says."""

import gzip
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared.errors import ConfigError, CorpusError
from teacher_cache.config import CaptureConfig
from teacher_cache.corpus.corpus import Corpus
from teacher_cache.corpus.sources import open_corpus

TEXTS = ["one fish", "two fish", "", "red fish", "blue fish", "naïve – ☃"]


@pytest.fixture(autouse=True)
def own_datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` keeps goes with the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets-cache")


def config_of(corpus: Path | str, **options: object) -> CaptureConfig:
    defaults = {"corpus": str(corpus), "out": Path("unused"), "targets": "none", "tokenizer": "x"}
    return CaptureConfig(**defaults | options)


def opened(corpus: Path | str, **options: object) -> Corpus:
    return open_corpus(config_of(corpus, **options))


def texts_of(corpus: Path | str, **options: object) -> list[str]:
    corpus = opened(corpus, **options)
    return corpus.read(range(len(corpus)))


def refusal(corpus: Path | str, **options: object) -> str:
    with pytest.raises(CorpusError) as caught:
        texts_of(corpus, **options)
    return str(caught.value)


def write_txt(path: Path, texts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def write_jsonl(path: Path, texts: list[str], column: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({column: text, "n": 1}) + "\n" for text in texts))
    return path


def write_json(path: Path, texts: list[str]) -> Path:
    path.write_text(json.dumps([{"text": text} for text in texts]))
    return path


def write_parquet(path: Path, texts: list[str]) -> Path:
    pq.write_table(pa.table({"id": range(len(texts)), "text": texts}), path)
    return path


def write_arrow(path: Path, texts: list[str]) -> Path:
    table = pa.table({"text": texts})
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
    return path


WRITERS: dict[str, Callable[[Path, list[str]], Path]] = {
    ".txt": write_txt,
    ".jsonl": write_jsonl,
    ".json": write_json,
    ".parquet": write_parquet,
    ".arrow": write_arrow,
}


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_kind_of_file_gives_its_documents_in_order(suffix, tmp_path):
    corpus = opened(WRITERS[suffix](tmp_path / f"corpus{suffix}", TEXTS))
    assert corpus.read(range(len(corpus))) == TEXTS
    assert corpus.read([4, 0]) == [TEXTS[4], TEXTS[0]]
    assert (corpus.info.source, corpus.info.num_documents) == (f"corpus{suffix}", len(TEXTS))


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [
        ("line", ["a b", "c", "", "d", "e"]),
        ("paragraph", ["a b\nc", "d\ne\n"]),
        ("document", ["a b\nc\n\nd\ne\n"]),
    ],
)
def test_what_a_document_of_a_text_file_is(sample_by, expected, tmp_path):
    path = write_txt(tmp_path / "c.txt", ["a b", "c", "", "d", "e"])
    assert texts_of(path, sample_by=sample_by) == expected


def test_lines_of_windows_have_no_carriage_return(tmp_path):
    (tmp_path / "c.txt").write_bytes(b"one\r\ntwo\r\n")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "one"}\r\n{"text": "two"}\r\n')
    assert texts_of(tmp_path / "c.txt") == texts_of(tmp_path / "c.jsonl") == ["one", "two"]


@pytest.mark.parametrize("name", ["c.txt", "c.jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_document(name, tmp_path):
    content = "one\n" if name == "c.txt" else '{"text": "one"}\n'
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
    assert texts_of(tmp_path / name) == ["one"]


def test_a_line_longer_than_the_readers_buffer_stays_one_document(tmp_path):
    long = "fish " * (3 << 20)  # 15 MiB; `datasets` reads 10 MiB at a time
    assert texts_of(write_txt(tmp_path / "c.txt", ["a", long, "b"])) == ["a", long, "b"]
    assert texts_of(write_jsonl(tmp_path / "c.jsonl", ["a", long, "b"])) == ["a", long, "b"]


def test_a_compressed_file_is_read_as_what_is_inside(tmp_path):
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(write_jsonl(tmp_path / "c.jsonl", TEXTS).read_bytes()))
    assert texts_of(path) == TEXTS


def test_null_is_an_empty_document(tmp_path):
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "c.parquet")
    assert texts_of(tmp_path / "c.parquet") == ["a", ""]


def test_a_folder_is_its_files_in_the_order_of_their_names(tmp_path):
    write_txt(tmp_path / "c" / "b.txt", ["third"])
    write_txt(tmp_path / "c" / "a" / "x.txt", ["first", "second"])
    (tmp_path / "c" / "README.md").write_text("not read")
    assert texts_of(tmp_path / "c") == ["first", "second", "third"]


def test_a_glob_is_the_files_it_matches(tmp_path):
    for name in ("a.txt", "b.txt", "b.jsonl"):
        WRITERS[Path(name).suffix](tmp_path / name, [name])
    assert texts_of(f"{tmp_path}/*.txt") == ["a.txt", "b.txt"]
    assert texts_of(f"{tmp_path}/**/b.t*") == ["b.txt"]


def test_a_path_with_spaces_and_brackets_is_a_path(tmp_path):
    assert texts_of(write_txt(tmp_path / "my corpus [é]" / "a b.txt", ["one"])) == ["one"]


def test_a_folder_of_links_is_read_like_a_folder_of_files(tmp_path):
    """The Hub's own local cache is made of links into another folder."""
    for name in ("a", "b"):
        write_txt(tmp_path / "blobs" / f"0{name}", [name])
        (tmp_path / "c").mkdir(exist_ok=True)
        (tmp_path / "c" / f"{name}.txt").symlink_to(tmp_path / "blobs" / f"0{name}")
    assert texts_of(tmp_path / "c") == ["a", "b"]


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train", ["train-0", "train-1"]),
        ("train[:1]", ["train-0"]),
        ("validation", ["validation"]),
        ("test", ["test"]),
    ],
)
def test_files_named_after_splits_are_those_splits(split, expected, tmp_path):
    for name in ("train-00000", "train-00001", "validation", "test"):
        text = name.replace("-0000", "-")
        write_jsonl(tmp_path / f"{name}.jsonl", [text])
    assert texts_of(tmp_path, split=split) == expected


def test_a_split_that_has_no_file_names_those_that_have(tmp_path):
    for name in ("train", "dev"):
        write_jsonl(tmp_path / f"{name}.jsonl", ["a"])
    message = refusal(tmp_path, split="test[:10%]")
    assert re.search(rf"^{re.escape(str(tmp_path))}: no file of split 'test'.*dev, train", message)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("train[:50%]", range(5)),
        ("train[3:5]", range(3, 5)),
        ("train[-2:]", range(8, 10)),
        ("train[80%:]", range(8, 10)),
        ("train", range(10)),
    ],
)
def test_slices_of_a_split(split, expected, tmp_path):
    path = write_txt(tmp_path / "c.txt", [str(i) for i in range(10)])
    assert texts_of(path, split=split) == [str(i) for i in expected]


@pytest.mark.parametrize("split", ["train[:x]", "train[", "train[:1]+test", "", "train[1:2:3]"])
def test_a_split_that_cannot_be_read_is_named(split, tmp_path):
    path = write_txt(tmp_path / "c.txt", ["a"])
    assert f"--split {split}:" in refusal(path, split=split)


@pytest.mark.parametrize("split", ["train[0:0]", "train[5:2]"])
def test_a_slice_without_documents_is_refused(split, tmp_path):
    path = write_txt(tmp_path / "c.txt", [str(i) for i in range(10)])
    message = refusal(path, split=split)
    assert str(path) in message
    assert split in message


@pytest.mark.parametrize(("limit", "expected"), [(0, 6), (2, 2), (6, 6), (99, 6)])
def test_limit_documents_takes_the_first_ones(limit, expected, tmp_path):
    path = write_txt(tmp_path / "c.txt", TEXTS)
    assert texts_of(path, limit_documents=limit) == TEXTS[:expected]


def test_the_text_column_is_found_or_named(tmp_path):
    assert texts_of(write_jsonl(tmp_path / "a.jsonl", ["x"], column="content")) == ["x"]
    path = write_jsonl(tmp_path / "b.jsonl", ["x"], column="story")
    assert texts_of(path, columns=("text=story",)) == ["x"]


# Fingerprints


def test_equal_content_has_an_equal_fingerprint_in_another_folder(tmp_path):
    for folder in ("here", "there/deeper"):
        for name in ("a.txt", "sub/b.txt"):
            write_txt(tmp_path / folder / name, [name])
    here, there = (opened(tmp_path / folder) for folder in ("here", "there/deeper"))
    assert here.info.fingerprint == there.info.fingerprint
    assert str(tmp_path) not in repr(here.info)


def test_how_a_folder_is_named_does_not_matter(tmp_path, monkeypatch):
    write_txt(tmp_path / "c" / "a.txt", ["a"])
    write_txt(tmp_path / "c" / "b.txt", ["b"])
    monkeypatch.chdir(tmp_path)
    names = [tmp_path / "c", "c", "./c/", "c/*.txt", f"{tmp_path}/c/../c"]
    assert len({opened(name).info.fingerprint for name in names}) == 1


@pytest.mark.parametrize("suffix", WRITERS)
def test_one_changed_byte_changes_the_fingerprint(suffix, tmp_path):
    path = WRITERS[suffix](tmp_path / f"c{suffix}", ["one fish", "two fish"])
    before = opened(path).info.fingerprint
    data = path.read_bytes()
    path.write_bytes(data.replace(b"two", b"too"))
    assert path.read_bytes() != data
    assert opened(path).info.fingerprint != before


def test_a_renamed_or_another_file_changes_the_fingerprint(tmp_path):
    path = write_txt(tmp_path / "c" / "a.txt", ["a"])
    write_txt(tmp_path / "c" / "b.txt", ["b"])
    prints = [opened(tmp_path / "c").info.fingerprint]
    path.rename(path.with_name("c.txt"))
    prints.append(opened(tmp_path / "c").info.fingerprint)
    write_txt(tmp_path / "c" / "d.txt", ["d"])
    prints.append(opened(tmp_path / "c").info.fingerprint)
    assert len(set(prints)) == 3


def test_a_file_replaced_with_its_old_date_is_read_anew(tmp_path):
    """As `cp -p`, `rsync -t` and unpacking an archive do; `datasets` goes by the date."""
    path = write_txt(tmp_path / "c.txt", ["one", "two"])
    date = path.stat().st_mtime_ns
    assert texts_of(path) == ["one", "two"]
    write_txt(path, ["one", "too"])
    os.utime(path, ns=(date, date))
    assert texts_of(path) == ["one", "too"]


# What is refused, and with which words


def test_a_missing_file_is_named(tmp_path):
    path = tmp_path / "none.txt"
    assert refusal(path) == f"{path}: no such file or folder"


def test_a_relative_missing_file_is_no_hub_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal("data/none.jsonl") == "data/none.jsonl: no such file or folder"
    assert refusal("./data") == "./data: no such file or folder"


def test_a_name_that_is_neither_file_nor_data_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refusal("nobody/nothing").startswith("nobody/nothing: no such file or folder, and as a")


def test_a_folder_without_files(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.md").write_text("x")
    message = refusal(tmp_path / "c")
    assert message == (
        f"{tmp_path / 'c'}: no .txt, .jsonl, .json, .parquet, .arrow, .conll, .conllu, .bio, .iob, "
        ".iob2, .tsv file in this folder"
    )


def test_a_pattern_that_matches_nothing(tmp_path):
    assert refusal(f"{tmp_path}/*.txt") == f"{tmp_path}/*.txt: no file matches this pattern"


def test_mixed_kinds_are_counted_with_a_pattern_to_use(tmp_path):
    for name in ("a.txt", "b.txt", "c.jsonl"):
        WRITERS[Path(name).suffix](tmp_path / name, ["x"])
    message = refusal(tmp_path)
    assert "holds files of several kinds (1 .jsonl, 2 .txt)" in message
    pattern = re.search(r"such as '(.*)'", message)
    assert pattern is not None
    assert texts_of(pattern[1]) == ["x", "x"]


@pytest.mark.parametrize("name", ["corpus.csv", "corpus"])
def test_a_kind_we_do_not_read_lists_those_we_do(name, tmp_path):
    (tmp_path / name).write_text("a,b\n")
    assert "is not one of .txt, .jsonl, .json, .parquet, .arrow" in refusal(tmp_path / name)


@pytest.mark.parametrize("suffix", WRITERS)
def test_an_empty_file_is_named(suffix, tmp_path):
    WRITERS[suffix](tmp_path / f"a{suffix}", ["x"])
    (tmp_path / f"b{suffix}").touch()
    assert refusal(tmp_path) == f"{tmp_path / f'b{suffix}'}: this file is empty"


def test_no_text_column_lists_the_columns(tmp_path):
    message = refusal(write_jsonl(tmp_path / "c.jsonl", ["x"], column="story"))
    assert "reads messages or text or prompt and completion, and there are" in message
    assert "--columns text=story" in message


def test_a_wrong_column_lists_the_columns(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", ["x"])
    assert refusal(path, columns=("text=body",)) == f"{path}: no column 'body'; there are text, n"


def test_a_role_that_the_task_does_not_read(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", ["x"])
    assert "--columns summary=...: --task causal-lm" in refusal(path, columns=("summary=n",))


def test_a_column_option_without_a_role():
    with pytest.raises(ConfigError, match=r"--columns body: expected ROLE=COLUMN, such as"):
        config_of("c.txt", columns=("body",))


def test_a_column_of_numbers_names_the_document(tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", ["x"])
    message = refusal(path, columns=("text=n",))
    assert "document 0 has a int in column 'n'" in message
    assert "--columns" in message


@pytest.mark.parametrize("line", [1, 3, 2000])
def test_a_broken_json_line_names_file_and_line(line, tmp_path):
    path = write_jsonl(tmp_path / "c.jsonl", ["a fish"] * 3000)
    lines = path.read_text().splitlines()
    lines[line - 1] = '{"text": "cut o'
    path.write_text("\n".join(lines))
    message = refusal(path)
    assert message.startswith(f"{path}, line {line}: not valid JSON (")
    assert message.endswith("Mend or remove the line.")


def test_a_fault_in_the_second_file_names_the_second_file(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    (tmp_path / "b.jsonl").write_text('{"text": "y"}\n{"text" "z"}\n')
    assert refusal(tmp_path).startswith(f"{tmp_path / 'b.jsonl'}, line 2: not valid JSON")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_bad_utf8_names_file_and_line(suffix, tmp_path):
    path = WRITERS[suffix](tmp_path / f"c{suffix}", ["a fish", "b fish", "c fish"])
    path.write_bytes(path.read_bytes().replace(b"b fish", b"b \xff\xfesh"))
    message = refusal(path)
    assert message.startswith(f"{path}, line 2: not UTF-8 (")
    assert "--encoding-errors replace" in message


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
@pytest.mark.parametrize(("policy", "middle"), [("replace", "b \ufffdsh"), ("ignore", "b sh")])
def test_bad_utf8_can_be_replaced_or_left_out(suffix, policy, middle, tmp_path):
    path = WRITERS[suffix](tmp_path / f"c{suffix}", ["a fish", "b fish", "c fish"])
    path.write_bytes(path.read_bytes().replace(b"b fish", b"b \xffsh"))
    assert texts_of(path, encoding_errors=policy) == ["a fish", middle, "c fish"]


def test_a_file_that_is_not_what_its_name_says(tmp_path):
    path = tmp_path / "c.parquet"
    path.write_text("this is no parquet file")
    assert refusal(path).startswith(f"{path}: cannot be read: ")


def test_the_second_file_with_other_columns_is_an_error_not_a_crash(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ["x"])
    write_jsonl(tmp_path / "b.jsonl", ["y"], column="body")
    assert str(tmp_path) in refusal(tmp_path)


def test_opening_leaves_nothing_beside_the_files(tmp_path):
    folder = tmp_path / "c"
    write_txt(folder / "a.txt", ["x"])
    before = sorted(folder.rglob("*"))
    opened(folder)
    assert sorted(folder.rglob("*")) == before
    shutil.rmtree(folder)
