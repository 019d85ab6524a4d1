"""Rules on the source that no other test sees broken: who imports whom, what is never called."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("shared", "teacher_cache", "student_train")
MAY_IMPORT = {
    "shared": {"shared"},
    "teacher_cache": {"shared", "teacher_cache"},
    "student_train": {"shared", "student_train"},
}
HEAVY = {"torch", "transformers", "datasets", "accelerate", "peft"}
# They can run code found in a file.
UNSAFE_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
UNSAFE_YAML = {
    *("load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all"),
    *("Loader", "CLoader", "FullLoader", "CFullLoader", "UnsafeLoader", "CUnsafeLoader"),
}

SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").rglob("*.py"))
CLIS = [path for path in SOURCES if path.name == "cli.py"]


def name_of(path: Path) -> str:
    """`shared/options.py` -> `shared.options`; a package's __init__.py -> `shared`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def each_source(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def all_nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(tree_of(path))


def nodes_that_run(path: Path, *, in_functions: bool) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`."""
    waiting: list[ast.AST] = [tree_of(path)]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            continue
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not in_functions:
            continue
        yield node
        waiting += ast.iter_child_nodes(node)


def imports(nodes: Iterator[ast.AST]) -> set[str]:
    """Dotted names imported; `from a import b` gives `a` and `a.b`, as b may be a module."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"line {node.lineno}: imports are absolute, so that grep finds them"
            )
            names.add(str(node.module))
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports_only_an_error(node: ast.AST) -> bool:
    """`torch.load` raises it, and to catch it nothing else of the module is needed."""
    return ast.unparse(node) == "from pickle import UnpicklingError"


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in all_nodes(path):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(each.value) for each in call.keywords if each.arg == name), None)


@each_source(SOURCES)
def test_a_package_imports_only_what_its_layer_may(path):
    package = path.relative_to(ROOT).parts[0]
    ours = {name.split(".")[0] for name in imports(all_nodes(path))} & set(PACKAGES)
    assert ours <= MAY_IMPORT[package]


@each_source(CLIS)
def test_a_cli_imports_nothing_heavy_at_the_top(path):
    assert (
        not {name.split(".")[0] for name in imports(nodes_that_run(path, in_functions=False))}
        & HEAVY
    )


LIGHT = [
    "shared.options",
    "shared.format.manifest_file",
    "shared.format.writer",
    "student_train.compare.report",
    "student_train.compare.table",
    "teacher_cache.tools.report",
]


@pytest.mark.parametrize("name", [*LIGHT, *map(name_of, CLIS)])
def test_what_only_reads_and_prints_loads_nothing_heavy(name):
    code = f"import sys, {name}; print(*sorted({HEAVY} & set(sys.modules)))"
    found = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert found.stdout.strip() == ""


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_inside_a_package_have_no_cycle(package):
    modules = {name_of(path): path for path in SOURCES if path.parts[len(ROOT.parts)] == package}
    # Naming a module of a package is no import of the package itself, though Python runs both.
    left = {
        name: (imports(nodes_that_run(path, in_functions=True)) & modules.keys()) - {name}
        for name, path in modules.items()
    }
    for name in left:
        left[name] -= {package}
    while leaves := {name for name, needed in left.items() if not needed & left.keys()}:
        left = {name: needed for name, needed in left.items() if name not in leaves}
    assert left == {}, "these import each other in a circle"


@each_source(SOURCES + BENCHMARKS)
def test_every_module_says_what_it_is_for(path):
    assert (ast.get_docstring(tree_of(path)) or "").strip()


@each_source(SOURCES + BENCHMARKS)
def test_nothing_that_runs_code_from_a_file_is_imported(path):
    nodes = (node for node in all_nodes(path) if not imports_only_an_error(node))
    assert not {name.split(".")[0] for name in imports(nodes)} & UNSAFE_MODULES
    assert not imports(all_nodes(path)) & {f"yaml.{name}" for name in UNSAFE_YAML}


@each_source(SOURCES + BENCHMARKS)
def test_nothing_that_runs_code_from_a_file_is_called(path):
    for name, call in calls(path):
        where = f"{path.relative_to(ROOT)}:{call.lineno}: {name}"
        assert name not in {"eval", "exec", "compile", "__import__"}, where
        if name.endswith("torch.load"):
            assert keyword(call, "weights_only") == "True", where
        assert keyword(call, "allow_pickle") in (None, "False"), where
    for node in all_nodes(path):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "yaml":
            assert node.attr not in UNSAFE_YAML, f"{path.relative_to(ROOT)}:{node.lineno}"


@each_source([path for path in SOURCES if path.name != "cli.py"])
def test_no_library_code_prints(path):
    assert "print" not in {name for name, _ in calls(path)}
