"""JSON schemas of tools from their type hints and Google-style docstrings, equal to transformers' `get_json_schema`.

The order of keys is the same too, since chat templates write a schema down as it is.
"""

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from troupe.errors import WorldError, sayable

_SCALARS: dict[type, str] = {int: "integer", float: "number", str: "string", bool: "boolean", type(None): "null"}
_BASIC: dict[Any, dict[str, Any]] = {
    **{kind: {"type": name} for kind, name in _SCALARS.items()},
    list: {"type": "array"},
    tuple: {"type": "array"},
    dict: {"type": "object"},
    Any: {},
}
_ENTRY = re.compile(r"([ \t]*)(\w+)(?:[ \t]*\([^()\n]*\))?:")
"""The beginning of an argument's description: its indentation and name."""
_SECTIONS = ("Args:", "Returns:", "Raises:")


class _Unusable(Exception):  # noqa: N818 - it says what is wrong
    """Why there is no schema."""


def place_of(function: Any) -> str:
    """`FILE:LINE: ` of a function's definition, to start a message with; empty where it cannot be told."""
    code = getattr(inspect.unwrap(getattr(function, "__func__", function)), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}: " if code else ""


def json_schema(function: Callable[..., Any], label: str = "", *, is_unbound: bool = False) -> dict[str, Any]:
    """What a chat template is told of a tool.

    `label` stands for it in messages; `is_unbound`: the first parameter is the instance that it is called on.

    Raises:
        WorldError: with file and line, where hints or docstring lack what is needed.
    """
    name = function.__name__
    try:
        told = _read_docstring(function)
        properties, required, returned = _parameters(function, is_unbound)
        for argument, schema in properties.items():
            _describe(schema, argument, told.arguments)
    except _Unusable as wrong:
        raise WorldError(f"{place_of(function)}tool {label or name} {wrong}") from None
    parameters: dict[str, Any] = {"type": "object", "properties": properties}
    if required:
        parameters["required"] = required
    described: dict[str, Any] = {"name": name, "description": told.description, "parameters": parameters}
    if returned is not None:
        described["return"] = returned if told.returned is None else {**returned, "description": told.returned}
    return {"type": "function", "function": described}


def _parameters(
    function: Callable[..., Any], is_unbound: bool
) -> tuple[dict[str, dict[str, Any]], list[str], dict[str, Any] | None]:
    """The schemas of the arguments, the names of those without a default, the schema of what is returned."""
    try:
        hints = typing.get_type_hints(function)
        parameters = list(inspect.signature(function).parameters.values())[1 if is_unbound else 0 :]
    except Exception as error:  # a hint in quotes is code
        raise _Unusable(f"has hints that cannot be read: {type(error).__name__}: {sayable(str(error))}") from None
    properties, required = {}, []
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise _Unusable(
                f"has the argument {str(parameter).partition(':')[0]!r}, but tools are called with named arguments; "
                "declare each by its name"
            )
        if parameter.name not in hints:
            raise _Unusable(f"has no type hint for its argument {parameter.name!r}; add one, such as {_EXAMPLE}")
        properties[parameter.name] = _of_argument(hints[parameter.name], parameter.name)
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    returned = None
    if "return" in hints:
        try:
            returned = schema_of_hint(hints["return"])
        except ValueError:
            returned = None  # the policy never writes it
    return properties, required, returned


_EXAMPLE = "int, str, list[float] or Literal['a', 'b']"


def _of_argument(hint: Any, name: str) -> dict[str, Any]:
    try:
        return schema_of_hint(hint)
    except ValueError as error:
        raise _Unusable(f"has an argument {name!r} {error}; use what JSON has, such as {_EXAMPLE}") from None


def schema_of_hint(hint: Any) -> dict[str, Any]:
    """The JSON schema of a type hint. ValueError, a clause, for what JSON does not have."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is None:
        return _of_plain(hint)
    if origin is Union or origin is types.UnionType:
        return _of_union(args)
    if origin is Literal:
        return _of_values(list(args), "Literal")
    if origin is list:
        return {"type": "array", "items": schema_of_hint(args[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": schema_of_hint(args[1])}
    if origin is tuple and len(args) > 1 and ... not in args:
        return {"type": "array", "prefixItems": [schema_of_hint(each) for each in args]}
    if origin is tuple:
        raise ValueError(f"of type {_named(hint)}, a tuple of one or of any length, for which list[…] is meant")
    raise ValueError(f"of type {_named(hint)}, which JSON does not have")


def _of_plain(hint: Any) -> dict[str, Any]:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _of_values([member.value for member in hint], f"Enum {hint.__name__}")
    try:
        return dict(_BASIC[hint])
    except (KeyError, TypeError):
        raise ValueError(f"of type {_named(hint)}, which JSON does not have") from None


def _of_union(args: Sequence[Any]) -> dict[str, Any]:
    subtypes = [schema_of_hint(each) for each in args if each is not type(None)]
    if len(subtypes) == 1:
        schema = subtypes[0]
    elif all(each.keys() == {"type"} and isinstance(each["type"], str) for each in subtypes):
        names = sorted({each["type"] for each in subtypes})
        schema = {"type": names[0] if len(names) == 1 else names}
    else:
        schema = {"anyOf": subtypes}
    return {**schema, "nullable": True} if type(None) in args else schema


def _of_values(values: list[Any], what: str) -> dict[str, Any]:
    if not values or any(type(value) not in _SCALARS for value in values):
        raise ValueError(f"that is {what} with {values!r}, where values are numbers, texts, True, False or None")
    kinds = list(dict.fromkeys(_SCALARS[type(value)] for value in values))
    return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": values}


def _named(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint).replace("typing.", "")


class _Told(NamedTuple):
    """What a docstring says."""

    description: str
    arguments: dict[str, str]
    returned: str | None


def _first(text: str, marks: Sequence[str], start: int = 0) -> int:
    """Where the first of the marks stands, or the end."""
    return min((place for mark in marks if (place := text.find(mark, start)) >= 0), default=len(text))


def _after_heading(doc: str, heading: str) -> int | None:
    """Where the section of a heading begins that stands on a line of its own and is not the first line."""
    match = re.search(rf"\n[ \t\r\f\v]*{heading}\n", doc)
    return None if match is None else match.end()


def _read_docstring(function: Callable[..., Any]) -> _Told:
    doc = (inspect.getdoc(function) or "").strip()
    if not doc:
        raise _Unusable("has no docstring; tell in one what it does, with its arguments under Args:")
    arguments: dict[str, str] = {}
    if (start := _after_heading(doc, "Args:")) is not None:
        arguments = _read_arguments(doc[start : _first(doc, ("Returns:", "Raises:"), start)].rstrip())
    returned = None
    if (start := _after_heading(doc, "Returns:")) is not None:
        returned = doc[start : _first(doc, ("Raises:",), start)].strip()
    return _Told(doc[: _first(doc, _SECTIONS)].strip(), arguments, returned)


def _read_arguments(section: str) -> dict[str, str]:
    """Name → description. A description goes on over lines that begin no other argument or are indented deeper; the
    line after a name with nothing behind it belongs to it, whatever it is."""
    found: dict[str, list[str]] = {}
    indentation: str | None = None
    lines: list[str] = []
    for line in filter(str.strip, section.split("\n")):
        entry = _ENTRY.match(line)
        is_deeper = indentation is not None and line.startswith((f"{indentation} ", f"{indentation}\t"))
        if entry is not None and not is_deeper and lines != [""]:
            indentation = entry[1]
            lines = found[entry[2]] = [line[entry.end() :].strip()]
        elif indentation is not None:
            lines.append(line.strip())
    return {name: " ".join(line for line in lines if line) for name, lines in found.items()}


def _describe(schema: dict[str, Any], argument: str, told: dict[str, str]) -> None:
    """Put in what the docstring says of an argument; `(choices: […])` at its end are the values that it may have."""
    if argument not in told:
        raise _Unusable(f"has no description of its argument {argument!r} in its docstring; add a line under Args:")
    text = told[argument]
    start = text.lower().find("(choices:")
    if start >= 0 and text.endswith(")"):
        choices = text[start + len("(choices:") : -1].strip()
        try:
            values = json.loads(choices)
        except ValueError:
            raise _Unusable(f"has choices of {argument!r} that are no JSON list: {choices[:80]}") from None
        if not isinstance(values, list):
            raise _Unusable(f"has choices of {argument!r} that are no JSON list: {choices[:80]}")
        schema["enum"] = [value.strip() if isinstance(value, str) else value for value in values]
        text = text[:start].strip()
    schema["description"] = text
