"""The part of a source behind its `?`: `size=500&seed=1`."""

import json
from typing import Any
from urllib.parse import unquote

from troupe.errors import DatasetError


def split_query(source: str) -> tuple[str, dict[str, str]]:
    """What stands before the `?`, and the options behind it, texts with `%XX` decoded.

    DatasetError for an option without a value, or one that is given twice.
    """
    name, _, query = source.partition("?")
    options: dict[str, str] = {}
    for part in query.split("&") if query else ():
        key, equals, value = part.partition("=")
        key = unquote(key).strip()
        if not key or not equals:
            raise DatasetError(f"{source}: {part!r} is no option; write them as NAME?key=value&key=value")
        if key in options:
            raise DatasetError(f"{source}: {key} is given twice; give it once")
        options[key] = unquote(value).strip()
    return name, options


def parse_value(value: str) -> Any:
    """A number, true, false, null, list or object as JSON has them; anything else as the text that it is.

    DatasetError for an object that has a key twice, of which readers silently take one.
    """
    try:
        return json.loads(value, object_pairs_hook=refuse_repeated_keys)
    except (ValueError, RecursionError):
        return value


def refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; DatasetError where a key stands in it twice, of which readers silently take one."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise DatasetError(f"the key {key!r} stands twice in one object; remove one of them")
        found[key] = value
    return found
