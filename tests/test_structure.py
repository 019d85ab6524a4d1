"""The house stays in order: rooms, sizes, one direction of imports, one place for each decision."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from shared.format.layouts import LAYOUTS
from shared.targets.kinds import KINDS
from shared.tasks import PROBLEMS, TASKS
from tests.test_layers import PACKAGES, ROOT, SOURCES, imports, name_of, nodes_that_run, tree_of

MOST_FILES_OF_A_ROOM = 14
MOST_LINES_OF_A_FILE = 400
MOST_LINES_OF_A_FUNCTION = 60
MOST_LINES_OF_NEARLY_ALL = 30  # the 95th percentile
MOST_FILES_NAMING_A_TASK = 4
MOST_FILES_NAMING_A_KIND = 5
# Words that mean something else as well: no pooling, no tail, no labels; values of options.
OF_MANY_MEANINGS = {"none", "values"}


def room_of(module: str) -> str:
    """`shared.format.schema` -> `shared.format`; a module beside the rooms is a room of its own."""
    return ".".join(module.split(".")[:2])


@cache
def modules() -> dict[str, Path]:
    return {name_of(path): path for path in SOURCES}


@cache
def imported(module: str) -> frozenset[str]:
    """Our modules that a module imports, at the top or in a function, but not for types alone."""
    found = imports(nodes_that_run(modules()[module], in_functions=True)) & modules().keys()
    return frozenset(found - {module, *PACKAGES})


def functions() -> Iterator[tuple[int, str]]:
    """Length in lines and place of each function."""
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                yield lines, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"


def test_a_room_has_few_files():
    rooms: dict[Path, int] = defaultdict(int)
    for path in SOURCES:
        rooms[path.parent] += 1
    full = {str(room.relative_to(ROOT)): n for room, n in rooms.items() if n > MOST_FILES_OF_A_ROOM}
    assert full == {}


def test_every_room_says_what_lives_there():
    for room in {path.parent for path in SOURCES}:
        assert (room / "__init__.py").is_file(), room.relative_to(ROOT)
        assert ast.get_docstring(tree_of(room / "__init__.py")), room.relative_to(ROOT)


def test_no_file_is_long():
    lines = {str(p.relative_to(ROOT)): p.read_text().count("\n") for p in SOURCES}
    assert {name: n for name, n in lines.items() if n > MOST_LINES_OF_A_FILE} == {}


def test_functions_are_short():
    found = sorted(functions())
    assert [each for each in found if each[0] > MOST_LINES_OF_A_FUNCTION] == []
    assert found[int(len(found) * 0.95)][0] <= MOST_LINES_OF_NEARLY_ALL


def test_no_files_import_each_other_in_a_circle():
    left = {name: set(imported(name)) for name in modules() if name not in PACKAGES}
    while leaves := {name for name, needed in left.items() if not needed & left.keys()}:
        left = {name: needed for name, needed in left.items() if name not in leaves}
    assert left == {}


def test_no_rooms_import_each_other_in_a_circle():
    left: dict[str, set[str]] = defaultdict(set)
    for module in modules():
        if module not in PACKAGES:
            left[room_of(module)] |= {room_of(other) for other in imported(module)}
    for room in left:
        left[room] -= {room}
    while leaves := {room for room, needed in left.items() if not needed & left.keys()}:
        left = {room: needed for room, needed in left.items() if room not in leaves}
    assert left == {}


def naming(literal: str) -> list[str]:
    """The files of the packages in which a text is a string of its own."""
    return [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if any(
            isinstance(node, ast.Constant) and node.value == literal
            for node in ast.walk(tree_of(path))
        )
    ]


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_named_in_few_files(task):
    assert len(naming(task)) <= MOST_FILES_NAMING_A_TASK, naming(task)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - OF_MANY_MEANINGS))
def test_a_kind_is_named_in_few_files(kind):
    assert len(naming(kind)) <= MOST_FILES_NAMING_A_KIND, naming(kind)


COMPARED = re.compile(r"(layout|\.kind|\.task|target_space|problem_type)$")
# Other things have a kind as well, such as adapters: what counts is the name of one of these.
NAMES = {*TASKS, *KINDS, *LAYOUTS, *PROBLEMS, *(task.target_space for task in TASKS.values())}
DEFINES_TRAITS = ROOT / "shared" / "tasks.py"  # a property of Task may ask what its fields say


def test_no_code_compares_the_name_of_a_kind_a_task_or_a_layout():
    """Asked is the object of the table; comparing two manifests with each other is fine."""
    found = []
    for path in SOURCES:
        for node in ast.walk(tree_of(path)):
            if not isinstance(node, ast.Compare) or path == DEFINES_TRAITS:
                continue
            sides = [node.left, *node.comparators]
            named = any(COMPARED.search(ast.unparse(side)) for side in sides)
            literal = any(
                isinstance(each, ast.Constant) and each.value in NAMES
                for side in sides
                for each in ast.walk(side)
            )
            if named and literal:
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}")
    assert found == []


def test_the_tree_of_the_readme_is_the_disk():
    tree = (ROOT / "README.md").read_text().split("## The tree")[1].split("```")[1]
    shown = set(re.findall(r"(\w+)/", tree))
    rooms = {path.parent for path in SOURCES} - {ROOT / package for package in PACKAGES}
    top = {room for room in rooms if room.parent.name in PACKAGES}
    assert shown == {*PACKAGES, "tests", "benchmarks", *(room.name for room in top)}
