"""A folder with a package `shared` of its own: ours is used, or one paragraph says what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = {"student_train": "train-student", "teacher_cache": "cache-teacher"}
# What an editable install of setuptools does: its packages are found last of all, so that a folder
# without an __init__.py in front of them wins.
LAST_OF_ALL = """
import sys
from importlib.machinery import PathFinder

class Last:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, [{root!r}]) if path is None else None

sys.path = [each for each in sys.path if each != {root!r}]
sys.meta_path.append(Last)
"""


@pytest.fixture(params=["package", "package with options", "file"])
def foreign(request, tmp_path: Path) -> Path:
    """What Python finds as `shared` in the current folder `tmp_path`."""
    if request.param == "file":
        found = tmp_path / "shared.py"
    else:
        found = tmp_path / "shared" / "__init__.py"
        found.parent.mkdir()
    if request.param == "package with options":
        (found.parent / "options.py").write_text("command = 1\n")
    found.write_text("raise SystemExit('a stranger was run')\n")
    return found


def python(*arguments: str, folder: Path) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment | {"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("package", COMMANDS)
def test_a_command_started_by_its_module_names_the_stranger_and_the_way_out(
    package, foreign, tmp_path
):
    done = python("-m", f"{package}.cli", "--help", folder=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.count("\n") == 1  # one paragraph and no traceback
    for part in (str(foreign), str(ROOT), COMMANDS[package], "PYTHONSAFEPATH=1"):
        assert part in done.stderr


@pytest.mark.parametrize("package", COMMANDS)
def test_the_ways_out_work(package, foreign, tmp_path):
    safe = python("-P", "-m", f"{package}.cli", "--help", folder=tmp_path)
    assert safe.returncode == 0, safe.stderr
    in_front = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {package}, shared.options"
    done = python("-c", in_front, folder=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", COMMANDS)
def test_an_import_from_python_says_the_same(package, foreign, tmp_path):
    code = f"""
try:
    import {package}
except ImportError as error:
    print(error)
"""
    done = python("-c", code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(foreign) in done.stdout


@pytest.mark.parametrize("package", COMMANDS)
def test_a_folder_without_init_is_no_stranger_where_ours_is_on_the_path(package, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "options.py").write_text("command = 1\n")
    done = python("-m", f"{package}.cli", "--help", folder=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", COMMANDS)
def test_a_folder_without_init_is_named_where_it_hides_an_editable_install(package, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "options.py").write_text("command = 1\n")
    code = LAST_OF_ALL.format(root=str(ROOT)) + f"import {package}"
    done = python("-c", code, folder=tmp_path)
    assert done.returncode == 1
    assert f"{package} needs the package `shared` in {ROOT}" in done.stderr
    assert str(tmp_path / "shared") in done.stderr


def test_the_check_loads_nothing_heavy(tmp_path):
    code = "import sys, student_train, teacher_cache; print('shared' in sys.modules, len(heavy))"
    heavy = "heavy = {'torch', 'numpy', 'transformers', 'typer'} & sys.modules.keys()"
    done = python("-c", code.replace("; print", f"; {heavy}; print"), folder=tmp_path)
    assert done.stdout == "False 0\n", done.stderr
