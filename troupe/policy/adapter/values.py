"""Values of an adapter's settings, checked."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from troupe.errors import ModelError

_MOST = 1e30
"""Far above what any of these numbers is."""
_SHOWN = 40


def number_of(file: Path, settings: Mapping[str, Any], key: str, otherwise: float | None, *, within: str = "") -> float:
    """A finite number, or the default where the key is missing. ModelError for anything else, or without a default.
    `within`: the table's own key, with a dot behind it, for messages."""
    value = settings.get(key)
    if value is None:
        value = otherwise
    if isinstance(value, bool) or not isinstance(value, int | float) or not -_MOST <= value <= _MOST:
        what = "missing" if value is None else f"{str(value)[:_SHOWN]} is refused"
        raise ModelError(f"{file}: {within}{key}: {what}; it must be a finite number")
    return value


def dropout_of(file: Path, settings: Mapping[str, Any], key: str) -> float:
    """A part of all, below 1; 0 where the key is missing."""
    dropout = number_of(file, settings, key, 0.0)
    if not 0.0 <= dropout < 1.0:
        raise ModelError(f"{file}: {key}: {dropout} is refused; it must be at least 0 and below 1")
    return dropout


def numbers_of(file: Path, settings: Mapping[str, Any], key: str) -> dict[str, float]:
    """A table of finite numbers; empty where the key is missing."""
    table = settings.get(key) or {}
    if not isinstance(table, dict):
        raise ModelError(f"{file}: {key}: {table!r} is refused; it must be a table of numbers")
    return {name: number_of(file, table, name, None, within=f"{key}.") for name in table}


def names_of(file: Path, settings: Mapping[str, Any], key: str) -> str | list[str] | None:
    """What names modules: a regular expression, or a list of names; None where the key is missing or null. ModelError
    for anything else."""
    value = settings.get(key)
    if isinstance(value, str):
        check_expression(file, key, value)
    elif value is not None and not (isinstance(value, list) and all(isinstance(name, str) for name in value)):
        raise ModelError(f"{file}: {key}: {str(value)[:_SHOWN]} is refused; it must be a text or a list of names")
    return value


def check_expression(file: Path, key: str, expression: str) -> None:
    """Raise ModelError where a text is no regular expression."""
    try:
        re.compile(expression)
    except (re.error, OverflowError, RecursionError) as error:
        raise ModelError(f"{file}: {key}: {expression!r} is no regular expression: {error}") from None
