"""The wheel that the checkout builds, offline: what is read or promised outside Python is in it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("shared", "teacher_cache", "student_train")
BUILD = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel built from a copy of what it is made of."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, source / package, ignore=ignored)
    built = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=source, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return set(archive.namelist())


def on_disk(pattern: str) -> set[str]:
    found = {path for package in PACKAGES for path in (ROOT / package).rglob(pattern)}
    return {path.relative_to(ROOT).as_posix() for path in found}


@pytest.mark.parametrize(
    ("pattern", "at_least"), [("*.py", 100), ("*.html", 5), ("py.typed", 3), ("FORMAT.md", 1)]
)
def test_the_wheel_holds_every_file_that_is_used_after_installing(wheel, pattern, at_least):
    expected = on_disk(pattern)
    assert len(expected) >= at_least
    assert expected <= wheel


def test_every_package_is_typed_and_nothing_else_is_installed(wheel):
    assert {f"{package}/py.typed" for package in PACKAGES} <= wheel
    tops = {name.split("/")[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
