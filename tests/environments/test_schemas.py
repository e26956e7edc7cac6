"""Schemas of tools are those of transformers, and what there is no schema for is refused by file, line and name."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any, Literal, Union

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import tools
from tests.support.extras import extra
from troupe.environments.schemas import json_schema, schema_of_hint
from troupe.errors import WorldError


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function", tools.FUNCTIONS, ids=lambda each: each.__name__)
def test_a_schema_is_that_of_transformers_key_by_key(function: Callable[..., Any]) -> None:
    theirs = extra("transformers.utils").get_json_schema(function)
    assert json.dumps(json_schema(function)) == json.dumps(theirs)


PIECES = [
    "Adds.",
    "a: one",
    "b (int): two",
    "b :",
    "more: text",
    "  a: deeper",
    "    Args:",
    "Args:",
    "Returns:",
    "Raises:",
]
PIECES += ["\tb: tab", "", "  ", "x y: z", "Returns: a", "\n", "(choices: [1])", "Args: a"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@settings(max_examples=2000, deadline=None)
@given(st.lists(st.sampled_from(PIECES), min_size=1, max_size=10))
def test_docstrings_are_read_as_transformers_does(lines: list[str]) -> None:
    def function(a: int, b: int) -> int:
        return a

    function.__doc__ = "\n".join(lines)
    theirs: object
    try:
        theirs = json.dumps(extra("transformers.utils").get_json_schema(function))
    except Exception:
        theirs = None
    try:
        ours = json.dumps(json_schema(function))
    except WorldError:
        ours = None
    assert ours == theirs


SIMPLE: list[Any] = [int, float, str, bool, type(None), list, dict, tuple, Any, tools.Unit, set, object, list[bytes]]


def random_hint(dice: random.Random, depth: int) -> Any:
    kind = dice.randrange(4 + 5 * bool(depth))
    if kind < 3:
        return dice.choice(SIMPLE)
    if kind == 3:
        return Literal[tuple(dice.sample([1, "a", None, True, 2.5, "b"], dice.randrange(1, 4)))]
    inner = [random_hint(dice, depth - 1) for _ in range(dice.randrange(1, 4))]
    made = [list[inner[0]], dict[str, inner[0]], tuple[tuple(inner)], tuple[inner[0], ...], Union[tuple(inner)]]  # type: ignore[misc, valid-type]  # noqa: UP007
    return made[kind - 4]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_hints_are_read_as_transformers_does() -> None:
    parse = extra("transformers.utils.chat_template_utils")._parse_type_hint
    read = 0
    for seed in range(10_000):
        hint = random_hint(random.Random(seed), 3)
        theirs: Any
        try:
            theirs = json.dumps(parse(hint))
        except Exception:
            theirs = None
        try:
            ours = json.dumps(schema_of_hint(hint))
        except ValueError:
            ours = None
        assert ours == theirs, hint
        read += ours is not None
    assert 2_000 < read < 9_000


def test_a_schema_in_full() -> None:
    assert json_schema(tools.defaults) == {
        "type": "function",
        "function": {
            "name": "defaults",
            "description": "Tells the weather of a city,\nover two lines.\n\nAnd a paragraph more.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "enum": ["Paris", "Rome"], "description": "Its name"},
                    "unit": {"type": "string", "enum": ["celsius", "kelvin"], "description": "Of degrees"},
                    "days": {"type": "integer", "description": "How many. Blank lines do not end it."},
                },
                "required": ["city"],
            },
            "return": {"type": "object", "additionalProperties": {}},
        },
    }


def no_docstring(a: int) -> int:
    return a


def no_hint(a):  # type: ignore[no-untyped-def]
    """Has none.

    Args:
        a: A number
    """


def no_description(a: int, b: int) -> None:
    """Lacks one.

    Args:
        a: A number
    """


def strange(a: set[int]) -> None:
    """Takes a set.

    Args:
        a: Numbers
    """


def unreadable(a: Missing) -> None:  # type: ignore[name-defined]  # noqa: F821
    """Has a hint of nothing.

    Args:
        a: Something
    """


def packed(*numbers: int) -> None:
    """Takes any number.

    Args:
        numbers: Some
    """


def bad_choices(a: str) -> None:
    """Chooses.

    Args:
        a: A letter (choices: x, y)
    """


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (no_docstring, "has no docstring"),
        (no_hint, "no type hint for its argument 'a'"),
        (no_description, "no description of its argument 'b'"),
        (strange, r"argument 'a' of type set\[int\]"),
        (unreadable, "hints that cannot be read: NameError"),
        (packed, "'\\*numbers'"),
        (bad_choices, "choices of 'a' that are no JSON list: x, y"),
    ],
)
def test_what_has_no_schema_is_refused_with_its_place(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(WorldError, match=rf"test_schemas\.py:\d+: tool {function.__name__} .*{message}"):
        json_schema(function)
