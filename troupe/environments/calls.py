"""What the policy has said, understood: thoughts, text, and calls of tools in two ways of writing.

`hermes`, as Qwen3 writes it, is `<tool_call>{"name": …, "arguments": {…}}</tool_call>`; `xml`, as Qwen3-Coder does, is
`<tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>`. All of it takes time linear in the
text, whatever that is.
"""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from troupe.environments.convention import Call, Said, ToolSpec
from troupe.messages.episodes import ChatMessage

CallStyle: TypeAlias = Literal["hermes", "xml"]

OPEN, CLOSE = "<tool_call>", "</tool_call>"
THINK, THOUGHT = "<think>", "</think>"
FUNCTION, PARAMETER, PARAMETER_END = "<function=", "<parameter=", "</parameter>"

MOST_CALLS = 100
"""In one turn. Those beyond are not made, and the policy is told so."""
MOST_DEPTH = 50
"""Of lists and objects in arguments."""
LEAST_INT, GREATEST_INT = -(2**63), 2**64 - 1
"""Whole numbers that can be recorded."""


class _Malformed(Exception):  # noqa: N818 - it says what is wrong
    def __init__(self, error: str, name: str = "") -> None:
        super().__init__(error)
        self.error, self.name = error, name


class _Piece(NamedTuple):
    """A part of a turn."""

    kind: Literal["text", "thought", "call"]
    text: str
    """Without the tags around it."""
    is_closed: bool = True


def which_calls(chat_template: str) -> CallStyle | None:
    """How a chat template has tools called, by its source; None where it is in neither way."""
    if OPEN not in chat_template:
        return None
    if FUNCTION in chat_template:
        return "xml"
    return None if "<arg_key>" in chat_template else "hermes"


def parse_turn(text: str, style: CallStyle | None, tools: Sequence[ToolSpec] = (), begun: str = "") -> Said:
    """Understand one turn.

    `text` is what was sampled, decoded without special tokens but with the tags of calls; `begun` what the prompt had
    begun of the thoughts, such as "<think>", where `text` does not have it. Without tools nothing is taken for a call.
    A call that is written wrongly has an `error`, and stays in the content as it was written.
    """
    schemas = {tool.name: _parameters(tool) for tool in tools}
    parts: list[list[str]] = [[]]
    thoughts: list[str] = []
    calls: list[Call] = []
    for piece in _pieces(begun + text, has_calls=bool(tools) and style is not None):
        if piece.kind == "text":
            parts[-1].append(piece.text)
        elif piece.kind == "thought":
            thoughts.append(piece.text.strip())
        elif len(calls) < MOST_CALLS:
            call = _call(piece, style or "hermes", schemas)
            calls.append(call)
            if call.error:
                parts[-1].append(OPEN + piece.text + (CLOSE if piece.is_closed else ""))
            else:
                parts.append([])
        elif len(calls) == MOST_CALLS:
            calls.append(Call(name="", error=f"a turn may have {MOST_CALLS} calls; those after were not made"))
    return Said(message=_message(parts, thoughts, calls), calls=tuple(calls))


def _message(parts: list[list[str]], thoughts: list[str], calls: list[Call]) -> ChatMessage:
    """Texts before and after calls are put together by line ends."""
    texts = ["".join(part).strip() for part in parts]
    message: ChatMessage = {"role": "assistant", "content": "\n".join(text for text in texts if text)}
    if kept := "\n".join(thought for thought in thoughts if thought):
        message["reasoning_content"] = kept
    if made := [call for call in calls if not call.error]:
        message["tool_calls"] = [
            {"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in made
        ]
    return message


def _pieces(text: str, has_calls: bool) -> list[_Piece]:
    """The parts in their order. A thought or call that is never closed goes to the end."""
    tags = {THINK: ("thought", THOUGHT)} | ({OPEN: ("call", CLOSE)} if has_calls else {})
    where = {tag: text.find(tag) for tag in tags}
    pieces: list[_Piece] = []
    start = 0
    while True:
        for tag, place in where.items():
            if 0 <= place < start:
                where[tag] = text.find(tag, start)
        found = [(place, tag) for tag, place in where.items() if place >= 0]
        if not found:
            break
        place, tag = min(found)
        kind, closing = tags[tag]
        if place > start:
            pieces.append(_Piece("text", text[start:place]))
        inside = place + len(tag)
        end = text.find(closing, inside)
        pieces.append(_Piece(kind, text[inside : end if end >= 0 else len(text)], end >= 0))  # type: ignore[arg-type]
        start = end + len(closing) if end >= 0 else len(text)
    if start < len(text):
        pieces.append(_Piece("text", text[start:]))
    return pieces


def _call(piece: _Piece, style: CallStyle, schemas: Mapping[str, Mapping[str, Any]]) -> Call:
    try:
        call = _hermes(piece) if style == "hermes" else _xml(piece, schemas)
        arguments = cast_arguments(call.arguments, schemas.get(call.name, {}))
        _check_plain(arguments, call.name)
        _check_plain(call.name, "")
    except _Malformed as wrong:
        return Call(name=wrong.name, error=wrong.error)
    return Call(name=call.name, arguments=arguments)


def _hermes(piece: _Piece) -> Call:
    """One in JSON. Without arguments it is a call with none; without the closing tag it must be whole."""
    try:
        value = json.loads(piece.text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        if not piece.is_closed:
            raise _Malformed(f"the call is not closed: {CLOSE} is missing") from None
        said = error.args[0] if isinstance(error, json.JSONDecodeError | _NotJSON) else "it is too deep or too long"
        raise _Malformed(f"the call is not valid JSON: {said}; {_HERMES_FORM}") from None
    if not isinstance(value, dict):
        raise _Malformed(f"the call is not a JSON object; {_HERMES_FORM}")
    name = value.get("name")
    if not isinstance(name, str) or not name:
        raise _Malformed(f'the call has no "name"; {_HERMES_FORM}')
    if unknown := sorted(value.keys() - {"name", "arguments"}):
        raise _Malformed(f'the call has "{unknown[0][:50]}", which is unknown; {_HERMES_FORM}', name)
    arguments = value.get("arguments")
    if arguments is not None and not isinstance(arguments, dict):
        raise _Malformed(f'"arguments" is not a JSON object; {_HERMES_FORM}', name)
    return Call(name=name, arguments=arguments or {})


_HERMES_FORM = f'write {OPEN}{{"name": NAME, "arguments": {{KEY: VALUE}}}}{CLOSE}'


class _NotJSON(ValueError):  # noqa: N818 - it says what is wrong
    """A number that JSON does not have."""


def _no_constant(name: str) -> float:
    raise _NotJSON(f"{name} is no number of JSON")


def _xml(piece: _Piece, schemas: Mapping[str, Mapping[str, Any]]) -> Call:
    """One in tags. `</function>` may be missing, and what stands between parameters does not count."""
    text = piece.text
    start = len(text) - len(text.lstrip())
    end = text.find(">", start)
    if not text.startswith(FUNCTION, start) or end < 0 or "\n" in text[start:end] or end == start + len(FUNCTION):
        raise _Malformed(f"the call does not begin with {FUNCTION}NAME>; {_XML_FORM}")
    name = text[start + len(FUNCTION) : end]
    arguments: dict[str, str] = {}
    while (found := text.find(PARAMETER, end)) >= 0:
        key_end = text.find(">", found)
        key = text[found + len(PARAMETER) : key_end]
        if key_end < 0 or "\n" in key or not key:
            raise _Malformed(f"a parameter does not begin with {PARAMETER}KEY>; {_XML_FORM}", name)
        if (end := text.find(PARAMETER_END, key_end)) < 0:
            raise _Malformed(f"the parameter {key[:50]} is not closed: {PARAMETER_END} is missing; {_XML_FORM}", name)
        arguments[key] = text[key_end + 1 : end].removeprefix("\n").removesuffix("\n")
    if not piece.is_closed and "</function>" not in text[end:]:
        raise _Malformed(f"the call is not closed: {CLOSE} is missing", name)
    return Call(name=name, arguments=arguments)


_XML_FORM = f"write {OPEN}{FUNCTION}NAME>{PARAMETER}KEY>VALUE{PARAMETER_END}</function>{CLOSE}"


def cast_arguments(arguments: Mapping[str, Any], properties: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that are text made into what the schema says; text where it cannot be."""
    return {
        key: _cast(value, _types_of(properties.get(key))) if isinstance(value, str) else value
        for key, value in arguments.items()
    }


def _parameters(tool: ToolSpec) -> Mapping[str, Any]:
    """The schemas of a tool's arguments by their names."""
    properties: Mapping[str, Any] = tool.schema.get("function", {}).get("parameters", {}).get("properties", {})
    return properties


def _types_of(schema: Any) -> list[str]:
    """The JSON types that a schema allows, in its order."""
    if not isinstance(schema, dict):
        return []
    declared = schema.get("type", [])
    types = [declared] if isinstance(declared, str) else [each for each in declared if isinstance(each, str)]
    for choice in [*schema.get("anyOf", ()), *schema.get("oneOf", ())]:
        types += _types_of(choice)
    return [*types, "null"] if schema.get("nullable") and "null" not in types else types


def _cast(text: str, types: Sequence[str]) -> Any:
    """The first of the types that the text can be read as; else the text."""
    for name in types:
        try:
            return _READERS[name](text.strip())
        except (KeyError, ValueError, RecursionError):
            continue
    return text


def _read_integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


def _read_number(text: str) -> int | float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return int(number) if number.is_integer() and "." not in text else number


def _read_boolean(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


def _read_null(text: str) -> None:
    return {"null": None, "None": None}[text]


def _read_container(text: str, kind: type) -> Any:
    value = json.loads(text, parse_constant=_no_constant)
    if isinstance(value, kind):
        return value
    raise ValueError(text)


_READERS: dict[str, Any] = {
    "integer": _read_integer,
    "number": _read_number,
    "boolean": _read_boolean,
    "null": _read_null,
    "object": lambda text: _read_container(text, dict),
    "array": lambda text: _read_container(text, list),
}


def _check_plain(value: Any, name: str, depth: int = 0) -> None:
    """_Malformed for what cannot be recorded or shown: numbers too large, text that is none, endless nesting."""
    if depth > MOST_DEPTH:
        raise _Malformed(f"arguments are nested more than {MOST_DEPTH} deep", name)
    if isinstance(value, str):
        if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
            raise _Malformed("the call has half of a character (a lone surrogate)", name)
    elif isinstance(value, int) and not LEAST_INT <= value <= GREATEST_INT:
        raise _Malformed("a whole number lies outside −2^63 … 2^64 − 1; give it as text", name)
    elif isinstance(value, float) and not math.isfinite(value):
        raise _Malformed("a number is too large", name)
    elif isinstance(value, dict):
        for key, item in value.items():
            _check_plain(key, name)
            _check_plain(item, name, depth + 1)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item, name, depth + 1)
