"""The help of the real commands: grouped by concern, what is used most first, nothing cut short."""

import re

import pytest
from typer.main import get_command

import student_train.cli
import teacher_cache.cli
from shared import options

APPS = {"cache-teacher": teacher_cache.cli.app, "train-student": student_train.cli.app}
COMMANDS = [
    (name, command) for name, app in APPS.items() for command in sorted(get_command(app).commands)
]


def help_of(name, command, capsys):
    with pytest.raises(SystemExit) as exit_:
        options.main(APPS[name], [command, "--help"])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def panels(text: str) -> dict[str, list[str]]:
    """Flags by heading, in the order of the page."""
    found: dict[str, list[str]] = {}
    for heading, flag in re.findall(r"╭─ ([^─]+) ─|^│ (--[\w-]+)", text, re.MULTILINE):
        if heading:
            found[heading] = []
        else:
            found[list(found)[-1]].append(flag)
    return found


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize(("name", "command"), COMMANDS)
def test_the_help_names_every_option_in_full(name, command, columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = help_of(name, command, capsys)
    assert "…" not in text
    shown = [flag for flags in panels(text).values() for flag in flags]
    parameters = get_command(APPS[name]).commands[command].params
    expected = {flag for each in parameters for flag in each.opts if flag.startswith("--")}
    assert sorted(shown) == sorted(expected | {"--help"})
    assert list(panels(text))[-1] == "Every command"


@pytest.mark.parametrize(
    ("name", "heading", "first"),
    [
        ("cache-teacher", "What to cache", ["--teacher", "--corpus", "--out", "--task"]),
        ("train-student", "What to train", ["--student", "--cache", "--out"]),
    ],
)
def test_the_help_of_a_run_begins_with_what_every_run_names(name, heading, first, capsys):
    text = help_of(name, "run", capsys)
    found = panels(text)
    assert next(iter(found)) == heading
    assert found[heading][: len(first)] == first
    assert "Options" not in found  # every option of a run has a concern
    assert max(len(flags) for flags in found.values()) <= 10
    example = next(line for line in text.splitlines() if line.strip().startswith(f"{name} run --"))
    assert set(re.findall(r"--[\w-]+", example)) <= set(first)
