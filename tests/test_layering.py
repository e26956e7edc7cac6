"""The house: four floors of rooms. Imports go down, or to the left on the same floor, and never in a circle."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import troupe

FLOORS = (
    ("messages", "policy", "grpo"),
    ("runtime", "dataset", "rewards", "environments", "cluster"),
    ("checkpoint", "records", "actors"),
    ("run", "daemon", "cli"),
)
PLACE = {room: (floor, side) for floor, rooms in enumerate(FLOORS) for side, room in enumerate(rooms)}
PLACE |= {"errors": (-1, 0), "__init__": (9, 0), "__main__": (9, 1)}

HOUSE = Path(troupe.__file__).parent
FILES = {".".join(file.relative_to(HOUSE).with_suffix("").parts): file for file in sorted(HOUSE.rglob("*.py"))}


@cache
def trees() -> dict[str, list[ast.AST]]:
    """All nodes of each file."""
    return {name: list(ast.walk(ast.parse(file.read_text(encoding="utf-8")))) for name, file in FILES.items()}


def file_of(dotted: str) -> str:
    """The file that a dotted name of ours is, or is in."""
    name = dotted.removeprefix("troupe").removeprefix(".")
    while name not in FILES and f"{name}.__init__".removeprefix(".") not in FILES:
        name = name.rpartition(".")[0]
    return name if name in FILES else f"{name}.__init__".removeprefix(".")


def imports_of(nodes: list[ast.AST]) -> set[str]:
    """The files of ours that a file imports, anywhere in it, for typing too."""
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide who knows whom"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {file_of(name) for name in names if name.partition(".")[0] == "troupe"}


IMPORTS = {name: imports_of(nodes) for name, nodes in trees().items()}


def test_the_house_is_its_rooms_and_nothing_else() -> None:
    there = {path.name for path in HOUSE.iterdir() if path.name != "__pycache__"}
    assert there == {room for floor in FLOORS for room in floor} | {
        "__init__.py",
        "__main__.py",
        "errors.py",
        "py.typed",
    }


@pytest.mark.parametrize("name", FILES)
def test_imports_go_down_or_to_the_left(name: str) -> None:
    (floor, side), room = PLACE[name.partition(".")[0]], name.partition(".")[0]
    for other in {name.partition(".")[0] for name in IMPORTS[name]} - {room}:
        assert (PLACE[other][0] == floor and PLACE[other][1] < side) or PLACE[other][0] < floor, other


def test_no_files_import_each_other_in_a_circle() -> None:
    left = {name: imports - {name} for name, imports in IMPORTS.items()}
    while leaves := {name for name, imports in left.items() if not imports & left.keys()}:
        left = {name: imports for name, imports in left.items() if name not in leaves}
    assert not left


def test_numpy_and_pickle_are_nowhere_in_the_product() -> None:
    for name, nodes in trees().items():
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
        assert not {part.split(".")[0] for part in imported} & {"numpy", "pickle", "torch", "transformers"}, name
        calls = {n.func.id for n in nodes if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
        assert not calls & {"eval", "exec"}, name
