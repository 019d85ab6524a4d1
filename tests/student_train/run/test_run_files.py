"""Damaged files of a run folder: an error of our own that names file, finding and way out."""

import json
import shutil
from pathlib import Path

import pytest

from shared.errors import CorruptRun, TeacherCacheError
from student_train.compare.report import compare
from student_train.config import CompareConfig
from student_train.run.folder import RunFolder
from tests.student_train.run.test_trainer import losses

JUNK = b"\x80\x04\x95\xff\xfe\x00binary"


@pytest.fixture
def finished(train, cache_dir, tmp_path):
    """A finished run of 4 steps, with a checkpoint and held-out numbers."""
    train(max_steps=4, save_every=2, validation_cache=cache_dir)
    return tmp_path / "run"


def nested(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


def test_every_damage_to_every_file_has_its_message(finished, train, cache_dir, tmp_path):
    """One finished run, damaged in one way after another."""
    before = tmp_path / "before"
    shutil.copytree(finished, before)
    for name, damages in DAMAGES.items():
        for data, message in damages:
            if callable(data):
                data = data((before / name).read_bytes())
            (finished / name).write_bytes(data)
            with pytest.raises(TeacherCacheError) as error:
                train(max_steps=6, save_every=2, validation_cache=cache_dir)
            said = str(error.value)
            assert type(error.value) is CorruptRun, (name, data[:40], said)
            assert said.startswith(f"{finished / name}: {message}"), (name, data[:40], said)
            assert said.endswith(ADVICE[name]), (name, data[:40], said)
            (finished / name).write_bytes((before / name).read_bytes())
    train(max_steps=6, save_every=2, validation_cache=cache_dir)  # and undamaged it goes on


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def changed(**fields):
    """A JSON object with other fields."""
    return lambda data: json.dumps(json.loads(data) | fields).encode()


def without(field):
    return lambda data: json.dumps(
        {name: value for name, value in json.loads(data).items() if name != field}
    ).encode()


def other_line(text: str):
    """The second line of a log replaced."""

    def make(data: bytes) -> bytes:
        lines = data.splitlines(keepends=True)
        return b"".join([lines[0], text.encode() + b"\n", *lines[2:]])

    return make


SHARDS = {"0": "a" * 32}
ADVICE = {
    "snapshot.json": "It says which shards this run trains on. Restore it from a copy, or start a "
    "new run with another --out.",
    "run.yaml": "It says how this run was started. Restore it from a copy, or start a new run with "
    "another --out.",
    "result.json": "Delete it and run the same train-student run command again: its checkpoints "
    "are kept.",
    "metrics.jsonl": "Restore the file from a copy, or delete the line: nothing is trained from "
    "it, it is only missing in the log.",
}
NO_OBJECT = "found '[]', expected an object"
DAMAGES = {
    "snapshot.json": [
        (b"", "not valid JSON: Expecting value"),
        (half, "not valid JSON: "),
        (JUNK, "not valid JSON: 'utf-8' codec can't decode byte 0x80"),
        (b"[]", NO_OBJECT),
        (nested(100_000), "100,000 values in 100,000 lists and objects, expected at most"),
        (b"{}", "the field 'caches' is missing"),
        (b'{"caches": 5}', "caches: found '5', expected a list"),
        (b'{"caches": ["x"]}', "caches: found 'x', expected an object"),
        (b'{"caches": [{"shards": {}}]}', "caches: the field 'cache_id' is missing"),
        (b'{"caches": [{"cache_id": 1, "shards": {}}]}', "caches: cache_id: found '1', expected"),
        (b'{"caches": [{"cache_id": "", "shards": []}]}', "caches: shards: found '[]', expected"),
        (
            b'{"caches": [{"cache_id": "", "shards": {"0": 7}}]}',
            "caches: shards: found '7', expected a value of type str",
        ),
    ],
    "run.yaml": [
        (b"", "expected a mapping from options to values, found None"),
        (JUNK, "not valid yaml: 'utf-8' codec can't decode"),
        (lambda data: data[:9] + b": [" + data[9:], "not valid yaml: "),
        (b"- 1\n- 2\n", "expected a mapping from options to values, found [1, 2]"),
        (nested(10_000), "found lists in lists without end"),
        (b"x" * (1 << 20) + b"y", "1,048,577 bytes where at most 1,048,576 are expected"),
        (b"student: s\n", "missing option --cache, --out"),
        (lambda data: data + b"studnet: x\n", "unknown option studnet; did you mean student"),
        (
            lambda data: data.replace(b"seed: 0", b"seed: zero"),
            "seed is 'zero', but must be a whole number (at least 0)",
        ),
    ],
    "result.json": [
        (b"", "not valid JSON: Expecting value"),
        (half, "not valid JSON: "),
        (JUNK, "not valid JSON: 'utf-8' codec can't decode byte 0x80"),
        (b"[]", NO_OBJECT),
        (without("max_steps"), "the field 'max_steps' is missing"),
        (changed(max_steps="6"), "max_steps: found '6', expected a value of type int"),
        (changed(weights=[1]), "weights: found '[1]', expected an object"),
        (changed(seconds=None), "seconds: found 'None', expected a value of type float"),
        (changed(validation=3), "validation: found '3', expected an object"),
        (changed(validation={}), "validation: the field 'loss' is missing"),
        (
            changed(validation={"loss": "low", "positions": 1}),
            "validation: loss: found 'low', expected a value of type float",
        ),
        (
            changed(validation={"loss": 1.0, "positions": 1, "metric": "f2"}),
            "validation: metric: found 'f2', expected one of accuracy, entity_f1",
        ),
        (changed(validation_cache_id=5), "validation_cache_id: found '5', expected a value of"),
    ],
    "metrics.jsonl": [
        (JUNK + b"\n", "line 1: found b'"),
        (other_line("{"), "line 2: found b'{\\n', expected a JSON object"),
        (other_line("[1]"), "line 2: found list, expected a JSON object"),
        (other_line("{}"), "line 2: step: found None, expected a whole number"),
        (other_line('{"step": true}'), "line 2: step: found True, expected a whole number"),
        (other_line('{"step": 1}'), "line 2: kind: found None, expected train, speed, eval"),
        (other_line('{"step": 1, "kind": []}'), "line 2: kind: found [], expected train, speed"),
        (
            other_line('{"step": 1, "kind": "speed", "seconds": "long"}'),
            "line 2: seconds: found 'long', expected a number",
        ),
        (
            other_line('{"step": 1, "kind": "train", "loss": 1, "hard": []}'),
            "line 2: hard: found [], expected a number",
        ),
        (other_line(nested(5000).decode()), "line 2: found b'[[[["),
        (other_line("9" * 70_000), "line 2: found b'9999"),
    ],
}


def test_a_missing_config_is_named(finished, train, cache_dir):
    (finished / "run.yaml").unlink()
    with pytest.raises(CorruptRun, match=r"run\.yaml: this file is missing\. It says how this run"):
        train(max_steps=6, save_every=2, validation_cache=cache_dir)


def test_the_last_line_of_a_log_may_be_cut(finished, train, cache_dir, caplog):
    """As a crash in the middle of a write leaves it: no error, and nothing else is lost."""
    before = losses(finished)
    path = finished / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"kind": "train", "st')
    train(max_steps=6, save_every=2, validation_cache=cache_dir)
    assert "was cut short by a crash and is left out" in caplog.text
    assert losses(finished)[:4] == before
    assert [step for step, _ in losses(finished)] == [1, 2, 3, 4, 5, 6]


def test_a_log_that_is_one_endless_line_is_an_error(tmp_path):
    """No line cut short by a crash, however it ends, and read no further than one could be."""
    (tmp_path / "metrics.jsonl").write_bytes(b"\0" * (1 << 20))
    with pytest.raises(CorruptRun, match=r"metrics\.jsonl: line 1: found b'.x00"):
        list(RunFolder(tmp_path).metrics())


def test_compare_says_the_same(finished):
    (finished / "result.json").write_bytes(b"{")
    with pytest.raises(CorruptRun, match=r"result\.json: not valid JSON: .* Delete it and run"):
        compare(CompareConfig(runs=(finished,)))


def test_a_snapshot_of_very_many_shards_is_read(tmp_path):
    """More than a file of the cache has values: a snapshot holds a hash for every shard."""
    from student_train.run_files import read_snapshot

    shards = {str(number): f"{number:032x}" for number in range(200_000)}
    text = json.dumps({"caches": [{"cache_id": "c", "shards": shards}]})
    (tmp_path / "snapshot.json").write_text(text)
    (found,) = read_snapshot(RunFolder(tmp_path).storage)
    assert found.shards == shards


def test_the_run_folder_is_a_path_that_may_not_exist(tmp_path: Path):
    assert RunFolder(tmp_path / "none").result(0) is None
    assert list(RunFolder(tmp_path / "none").metrics()) == []
