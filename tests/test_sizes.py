"""How large the parts of the house may be: what does not fit in a head at once is two things."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.test_layering import FILES, trees

MOST_LINES_OF_A_FILE = 350
MOST_LINES_OF_A_FUNCTION = 60
MOST_PARAMETERS_OF_A_CONSTRUCTOR = 12


@pytest.mark.parametrize("name", FILES)
def test_no_file_is_longer(name: str) -> None:
    lines = len(FILES[name].read_text(encoding="utf-8").splitlines())
    assert lines <= MOST_LINES_OF_A_FILE


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for name, nodes in trees().items():
        for node in nodes:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}:{node.name}", node


def test_no_function_is_longer() -> None:
    lengths = {name: (node.end_lineno or 0) - node.lineno + 1 for name, node in functions()}
    assert not {name: length for name, length in lengths.items() if length > MOST_LINES_OF_A_FUNCTION}


def test_no_constructor_takes_more() -> None:
    counts = {
        name: len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs) - 1
        for name, node in functions()
        if node.name == "__init__"
    }
    assert not {name: count for name, count in counts.items() if count > MOST_PARAMETERS_OF_A_CONSTRUCTOR}
