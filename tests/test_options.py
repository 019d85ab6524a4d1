"""shared/options on toy configs: flags, files, bounds, errors, help, and the round trip."""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import options
from shared.errors import ConfigError, CorruptCache, Stopped
from shared.options import SET, Option, check_bounds, command, group, load, resolved, write_resolved
from student_train.config import TrainConfig
from teacher_cache.config import CaptureConfig

ROOT = Path(__file__).parents[1]

TEACHER = Option(help="Hub id or folder.")
TARGETS = Option(help="What is kept.")
TOP_K = Option(help="Entries.", min=1, max=256, read_when={"targets": ("topk", "dense")})
MEAN = Option(help="Entries on average.", min=1, read_when={"targets": ("adaptive", "sample")})
SEED = Option(help="Seed.", read_when={"mean_entries": (2.0, 16.0)})
CODEC = Option(help="How hidden states are kept.", read_when={"hidden_layers": (SET,)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Toy:
    teacher: Annotated[str, TEACHER]
    targets: Annotated[Literal["topk", "adaptive", "sample", "dense"], TARGETS] = "topk"
    top_k: Annotated[int, TOP_K] = 32
    mean_entries: Annotated[float, MEAN] = 16.0
    sample_seed: Annotated[int, SEED] = 0
    value_bits: Annotated[Literal[7, 8, 16], Option(help="Bits per value.")] = 7
    temperature: Annotated[tuple[float, ...], Option(help="Temperatures [0, C).", min=0.1)] = (2.0,)
    hidden_layers: Annotated[tuple[int, ...], Option(help="Layers.")] = ()
    hidden_codec: Annotated[Literal["bf16", "fp8"], CODEC] = "bf16"
    pack: Annotated[bool, Option(help="Pack documents.")] = False
    processes: Annotated[int | Literal["auto"], Option(help="Processes.", min=1)] = "auto"
    revision: Annotated[str | None, Option(help="Revision.")] = None
    out: Annotated[Path, Option(help="Folder.", show_default="beside the corpus")] = Path("out")
    trainer_settings: Annotated[tuple[str, ...], Option(help="Others.", flag="--set")] = ()

    def __post_init__(self) -> None:
        check_bounds(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    cache: Annotated[Path, Option(help="The cache.", argument=True)]
    runs: Annotated[tuple[str, ...], Option(help="Runs.", argument=True)] = ()
    as_json: Annotated[bool, Option(help="One object.", flag="--json")] = False
    fail: Annotated[Literal["no", "corrupt", "stop", "os", "interrupt"], Option(help="How.")] = "no"

    def __post_init__(self) -> None:
        check_bounds(self)


@group("What is kept")
@dataclass(frozen=True, kw_only=True)
class Kept:
    first_kept: Annotated[str, Option(help="A.")] = "a"
    with_a_name_of_many_words: Annotated[bool, Option(help="A switch.")] = False


@group("How it runs")
@dataclass(frozen=True, kw_only=True)
class Running:
    processes: Annotated[int, Option(help="B.", min=1)] = 1
    worker: Annotated[int, Option(help="C.", read_when={"first_kept": ("b",)})] = 0


@group("Which documents")
@dataclass(frozen=True, kw_only=True)
class Grouped(Kept, Running):
    corpus: Annotated[str, Option(help="D.")]
    processes: Annotated[int, Option(help="One more.", min=1)] = 2

    def __post_init__(self) -> None:
        check_bounds(self)


app = typer.Typer(add_completion=False)
seen: list[Any] = []


@command(app, "run", Toy)
def run(config: Toy) -> None:
    """Runs a teacher over a corpus [once]

    and keeps
    its targets.
    """
    seen.append(config)


@command(app, "grouped", Grouped)
def grouped(config: Grouped) -> None:
    """Runs with groups.

    Most need
    no more:

        run grouped --corpus a \\
            --first-kept b
    """
    seen.append(config)


@command(app, "read", Reading)
def read(config: Reading) -> None:
    """Reads."""
    seen.append(config)
    if config.fail == "corrupt":
        raise CorruptCache("shards/1.arrow: block 3 is damaged\nrun verify")
    if config.fail == "stop":
        raise Stopped("stopped, run again")
    if config.fail == "os":
        raise PermissionError(13, "Permission denied", "shards")
    if config.fail == "interrupt":
        raise KeyboardInterrupt


def start(*arguments: str) -> int:
    """The exit code of the command line."""
    with pytest.raises(SystemExit) as exit_:
        options.main(app, arguments)
    return exit_.value.code


def config_of(*arguments: str) -> Any:
    assert start(*arguments) == 0
    return seen.pop()


def file(tmp_path: Path, text: str, name: str = "run.yaml") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


def test_every_kind_of_field_becomes_a_flag():
    assert config_of(
        *("run", "--teacher", "t", "--targets", "dense", "--top-k", "3", "--value-bits", "16"),
        *("--temperature", "1", "--temperature", "4.5", "--hidden-layers", "-1", "--pack"),
        *("--hidden-codec", "fp8", "--processes", "4", "--revision", "main", "--out", "a b"),
        *("--set", "x=1", "--set", "y=2"),
    ) == Toy(
        teacher="t",
        targets="dense",
        top_k=3,
        value_bits=16,
        temperature=(1.0, 4.5),
        hidden_layers=(-1,),
        hidden_codec="fp8",
        pack=True,
        processes=4,
        revision="main",
        out=Path("a b"),
        trainer_settings=("x=1", "y=2"),
    )


def test_nothing_given_is_all_defaults():
    assert config_of("run", "--teacher", "t") == Toy(teacher="t")


def test_positional_arguments_and_a_switch_without_opposite():
    expected = Reading(cache=Path("c"), runs=("a", "b"), as_json=True)
    assert config_of("read", "c", "a", "b", "--json") == expected
    assert config_of("read", "c") == Reading(cache=Path("c"))


def test_a_flag_beats_the_file_which_beats_the_default(tmp_path):
    path = file(tmp_path, "teacher: t\ntop-k: 8\nvalue_bits: 8\npack: true\n")
    # 32 and no-pack are the defaults: given, they still beat the file.
    config = config_of("run", "--config", str(path), "--top-k", "32", "--no-pack")
    assert config == Toy(teacher="t", top_k=32, value_bits=8, pack=False)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "teacher: t\ntemperature: [1, 2.5]\nout: x\nset: [a=1]\nmean_entries: 1e1\n"),
        ("a.YML", "teacher: t\ntemperature: [1, 2.5]\nout: x\ntrainer-settings: [a=1]"),
        ("a.toml", 'teacher = "t"\ntemperature = [1, 2.5]\nout = "x"\nset = ["a=1"]'),
        ("a.json", '{"teacher": "t", "temperature": [1, 2.5], "out": "x", "set": ["a=1"]}'),
    ],
)
def test_every_file_format_gives_the_same_config(tmp_path, name, text):
    given = {"targets": "sample"} if "mean" in text else {}
    config = load(Toy, given, file(tmp_path, text, name))
    assert config.temperature == (1.0, 2.5)
    assert all(type(value) is float for value in config.temperature)
    assert (config.out, config.trainer_settings) == (Path("x"), ("a=1",))
    assert config.mean_entries == (10.0 if "mean" in text else 16.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("teacher: t\ntop_kk: 1", "run.yaml: unknown option top_kk; did you mean top_k?"),
        ("teacher: t\nzzz: 1", "unknown option zzz; known: teacher, targets"),
        ("1: 2", "unknown option 1; known"),
        ("top_k: many", "run.yaml: top_k is 'many', but must be a whole number (from 1 to 256)"),
        ("top-k: 0", "top-k is 0, but must be a whole number (from 1 to 256)"),
        ("top_k: true", "top_k is True, but must be a whole number"),
        ("top_k: 2.0", "top_k is 2.0, but must be a whole number"),
        ("top_k:", "top_k is None, but must be a whole number"),
        ("pack: 1", "pack is 1, but must be true or false"),
        ("value_bits: 9", "value_bits is 9, but must be one of 7, 8, 16"),
        ("value_bits: '8'", "value_bits is '8', but must be one of 7, 8, 16"),
        ("targets: topp", "but must be one of topk, adaptive, sample, dense; did you mean topk?"),
        ("revision: 12345", "revision is 12345, but must be text; write it in quotes"),
        ("revision: 2026-01-01", "but must be text; write it in quotes"),
        ("out: 7", "out is 7, but must be a path; write it in quotes"),
        ("temperature: [2, x]", "temperature is 'x', but must be a number (at least 0.1)"),
        ("temperature: [.inf]", "temperature is inf, but must be a number"),
        ("temperature: {a: 1}", "temperature is {'a': 1}, but must be a number"),
        ("processes: 0", "processes is 0, but must be a whole number (at least 1) or auto"),
        ("top_k: 1\ntop_k: 2", "not valid yaml: top_k is given twice"),
        ("top_k: 1\ntop-k: 2", "top_k is given twice"),
        ("set: []\ntrainer_settings: []", "trainer_settings is given twice"),
        ("- a\n- b", "expected a mapping from options to values, found ['a', 'b']"),
        ("", "expected a mapping from options to values, found None"),
        ("top_k: [1", "not valid yaml: while parsing"),
        ("top_k: !!python/object:os.system x", "not valid yaml: could not determine a constructor"),
        ("? [a]\n: 1", "not valid yaml: while constructing a mapping"),
        ("mean_entries: 3", "run.yaml: --mean-entries is only read with --targets adaptive|sample"),
    ],
)
def test_a_wrong_yaml_file_is_refused_with_what_was_found(tmp_path, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(Toy, {"teacher": "t"}, file(tmp_path, text))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"top_k": 1, "top_k": 2}', "not valid json: top_k is given twice"),
        ("a.json", '{"top_k": }', "not valid json"),
        ("a.json", '{"temperature": [NaN]}', "temperature is nan, but must be a number"),
        ("a.toml", "top_k = 1\ntop_k = 2", "not valid toml"),
        ("a.toml", "[top_k]\nx = 2", "top_k is {'x': 2}, but must be a whole number"),
        ("a.ini", "top_k = 1", "expected a file named .yaml, .yml, .toml, .json"),
    ],
)
def test_a_wrong_file_of_another_format_is_refused(tmp_path, name, text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(Toy, {"teacher": "t"}, file(tmp_path, text, name))


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read: No such file"):
        load(Toy, {}, tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not valid yaml"):
        load(Toy, {}, tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top-k", "0"], "--top-k is 0, but must be a whole number (from 1 to 256)"),
        (["--top-k", "257"], "--top-k is 257, but must be a whole number (from 1 to 256)"),
        (["--temperature", "0"], "--temperature is 0.0, but must be a number (at least 0.1)"),
        (["--temperature", "nan"], "--temperature is nan, but must be a number (at least 0.1)"),
        (["--targets", "topp"], "did you mean topk?"),
        (["--value-bits", "9"], "--value-bits is '9', but must be one of 7, 8, 16"),
        (["--processes", "x"], "--processes is 'x', but must be a whole number (at least 1) or"),
        (["--processes", "0"], "--processes is 0, but must be a whole number (at least 1) or auto"),
        (
            ["--mean-entries", "3"],
            "--mean-entries is only read with --targets adaptive|sample, but --targets is 'topk'",
        ),
        (["--mean-entries", "16"], "--mean-entries is only read with"),  # the default, but given
        (["--hidden-codec", "fp8"], "--hidden-codec is only read with --hidden-layers, but"),
        (
            ["--sample-seed", "1"],
            "--sample-seed is only read with --mean-entries 2.0|16.0, and --mean-entries is only",
        ),
    ],
)
def test_a_refused_flag_is_one_line_and_exit_code_2(capsys, arguments, message):
    assert start("run", "--teacher", "t", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["--top-k", "x"], ["--tagrets", "topk"]])
def test_what_typer_refuses_is_exit_code_2(capsys, arguments):
    assert start("run", "--teacher", "t", *arguments) == 2
    assert arguments[0] in capsys.readouterr().err


def test_a_missing_option_is_named(capsys, tmp_path):
    assert start("run") == 2
    assert "missing option --teacher: give it on the command line or" in capsys.readouterr().err
    assert start("read") == 2
    assert "missing option CACHE" in capsys.readouterr().err
    assert config_of("run", "--config", str(file(tmp_path, "teacher: t"))) == Toy(teacher="t")


@pytest.mark.parametrize(
    ("fail", "code", "text"),
    [
        ("corrupt", 1, "Error: shards/1.arrow: block 3 is damaged run verify\n"),
        ("stop", 75, "Error: stopped, run again\n"),
        ("os", 1, "Error: [Errno 13] Permission denied: 'shards'\n"),
        ("interrupt", 130, ""),
    ],
)
def test_an_error_is_one_paragraph_and_its_exit_code(capsys, fail, code, text):
    assert start("read", "c", "--fail", fail) == code
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", text)


def test_traceback_shows_where_an_error_arose(capsys):
    assert start("read", "c", "--fail", "corrupt", "--traceback") == 1
    assert "test_options.py" in capsys.readouterr().err


def test_an_error_is_wrapped_on_a_terminal_only(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "30")
    assert start("read", "c", "--fail", "corrupt") == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["Error: shards/1.arrow: block 3", "is damaged", "run verify"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"top_k": 300}, "--top-k is 300"),
        ({"top_k": True}, "--top-k is True"),
        ({"top_k": "3"}, "--top-k is '3'"),
        ({"value_bits": 7.0}, "--value-bits is 7.0"),
        ({"temperature": [2.0]}, "--temperature is [2.0], but must be a list"),
        ({"out": "x"}, "--out is 'x', but must be a path"),
        ({"pack": None}, "--pack is None"),
        ({"mean_entries": 3.0}, "--mean-entries is only read with"),
    ],
)
def test_an_invalid_config_cannot_be_built_from_python(values, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Toy(teacher="t", **values)
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace(Toy(teacher="t"), **values)


def test_resolved_holds_what_this_config_reads_as_plain_values():
    assert resolved(Toy(teacher="t", targets="sample")) == {
        "teacher": "t",
        "targets": "sample",
        "mean_entries": 16.0,
        "sample_seed": 0,
        "value_bits": 7,
        "temperature": [2.0],
        "hidden_layers": [],
        "pack": False,
        "processes": "auto",
        "revision": None,
        "out": "out",
        "trainer_settings": [],
    }


# What YAML may take for something else; a path that is not UTF-8; a line break of YAML only.
ODD = ["1e4", "12", "null", "no", "1_0", "~", "0x1", "1:30", "=", "a\udc80", "\x85", "a\n b", " a "]
TEXT = st.one_of(
    st.text(), st.sampled_from(ODD), st.text("\n\r\t #:-'\\\"{[&*!|>%@,?\u2028\ufeff\x00é")
).filter(lambda text: not text.startswith("~/"))  # is the home folder when read
CONFIGS = st.builds(
    Toy,
    teacher=TEXT,
    value_bits=st.sampled_from([7, 8, 16]),
    temperature=st.lists(st.floats(0.1, 1e300)).map(tuple),
    hidden_layers=st.lists(st.integers(-9, 9)).map(tuple),
    pack=st.booleans(),
    processes=st.one_of(st.just("auto"), st.integers(1, 9)),
    revision=st.one_of(st.none(), TEXT),
    out=TEXT.map(Path),
    trainer_settings=st.lists(TEXT).map(tuple),
)


@settings(max_examples=100, deadline=None)
@given(config=CONFIGS)
def test_the_written_config_loads_to_an_equal_one(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("config") / "config.yaml"
    write_resolved(config, path)
    assert load(Toy, {}, path) == config
    assert [each.name for each in path.parent.iterdir()] == ["config.yaml"]


def test_the_help_shows_defaults_bounds_choices_and_conditions(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("TERMINAL_WIDTH", "100")
    assert start("run", "--help") == 0
    text = " ".join(re.sub(r"[│╭╮╰╯─]|\x1b\[[0-9;]*m", " ", capsys.readouterr().out).split())
    for part in (
        "Runs a teacher over a corpus [once]",
        "Hub id or folder. [required]",
        "One of topk, adaptive, sample, dense. [default: topk]",
        "Entries. From 1 to 256. Read with --targets topk or dense. [default: 32]",
        "Temperatures [0, C). At least 0.1. [default: 2.0]",
        "Read with --hidden-layers. [default: bf16]",
        "[default: no-pack]",
        "A whole number (at least 1) or auto. [default: auto]",
        "Folder. [default: beside the corpus]",
        "Seed. Read with --mean-entries 2.0 or 16.0. [default: 0]",
        "--config",
        "--traceback",
    ):
        assert part in text


def test_options_stand_under_the_heading_of_the_class_that_declares_them(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert start("grouped", "--help") == 0
    text = capsys.readouterr().out
    found = re.findall(r"╭─ ([\w ]+) ─|^│ (--[\w-]+)", text, re.MULTILINE)
    assert [heading or flag for heading, flag in found] == [
        *("Which documents", "--corpus", "--processes"),
        *("What is kept", "--first-kept", "--with-a-name-of-many-words"),
        *("How it runs", "--worker"),
        *("Every command", "--config", "--traceback", "--help"),
    ]
    assert "One more" in text  # of the field that was declared last


def test_the_help_cuts_no_name_and_keeps_the_lines_of_an_example(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert start("grouped", "--help") == 0
    text = capsys.readouterr().out
    assert "…" not in text
    lines = [line.rstrip() for line in text.splitlines()]
    assert " run grouped --corpus a \\" in lines
    assert "     --first-kept b" in lines
    assert " Most need no more:" in lines


def test_a_config_of_several_classes_is_flat():
    config = config_of("grouped", "--corpus", "c", "--first-kept", "b", "--worker", "3")
    assert config == Grouped(corpus="c", first_kept="b", worker=3)
    assert list(resolved(config)) == [
        *("corpus", "processes", "first_kept", "with_a_name_of_many_words", "worker")
    ]
    assert config_of("grouped", "--corpus", "c", "--no-with-a-name-of-many-words").processes == 2
    with pytest.raises(ConfigError, match="--worker is only read with --first-kept b"):
        Grouped(corpus="c", worker=1)


def test_a_field_no_option_can_be_made_of_is_a_programming_error():
    @dataclass(frozen=True, kw_only=True)
    class Wrong:
        field: Annotated[dict[str, int], Option(help="")]

    with pytest.raises(TypeError, match="no option can be made of the type"):
        command(app, "wrong", Wrong)(lambda config: None)


def test_the_help_needs_no_torch():
    code = "import shared.options, sys; print(*{'torch', 'transformers', 'numpy'} & {*sys.modules})"
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert found.stdout.strip() == ""


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.parametrize("by_flag", [True, False])
def test_a_leading_tilde_is_the_home_folder(home, tmp_path, by_flag):
    """Also of what may be a Hub id, and of a folder with a weight; nothing else changes."""
    given = {
        "student": "~/student",
        "cache": ["~/one=2", "other/~/two=1"],
        "validation_cache": "~/held-out",
        "out": "~/o",
    }
    file = tmp_path / "run.json"
    file.write_text(json.dumps({} if by_flag else given))
    flags = {name: list(map(Path, v)) if name == "cache" else v for name, v in given.items()}
    flags = {n: Path(v) if n in ("validation_cache", "out") else v for n, v in flags.items()}
    fields = options.configs.fields_of(TrainConfig)
    flags = {name: fields[name].from_flag(value) for name, value in flags.items()}
    config = options.load(TrainConfig, flags if by_flag else {}, file)
    assert config.student == str(home / "student")
    assert config.cache_paths == (home / "one", Path("other/~/two"))
    assert config.cache_weights == (2.0, 1.0)
    assert config.validation_cache == home / "held-out"
    assert config.out == home / "o"


def test_a_tilde_before_a_name_that_nobody_has_stays(tmp_path):
    file = tmp_path / "run.json"
    file.write_text(json.dumps({"student": "~no-such-user/x", "cache": "c", "out": "o"}))
    assert options.load(TrainConfig, {}, file).student == "~no-such-user/x"


def test_teachers_tokenizers_and_corpora_may_be_at_home_too(home, tmp_path):
    given = {"teacher": "~/t", "tokenizer": "~/k", "corpus": "~/*.txt", "out": "~/c", "like": "~/l"}
    file = tmp_path / "run.json"
    file.write_text(json.dumps(given))
    config = options.load(CaptureConfig, {}, file)
    found = (config.teacher, config.tokenizer, config.corpus, config.out, config.like)
    assert found == (
        *(str(home / name) for name in ("t", "k", "*.txt")),
        *(home / name for name in ("c", "l")),
    )
