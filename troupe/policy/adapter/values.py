"""Numbers of an adapter's settings, checked."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from troupe.errors import ModelError


def number_of(file: Path, settings: Mapping[str, Any], key: str, otherwise: float | None) -> float:
    """A finite number, or the default where the key is missing. ModelError for anything else, or without a default."""
    value = settings.get(key)
    if value is None:
        value = otherwise
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        what = "missing" if value is None else f"{value!r} is refused"
        raise ModelError(f"{file}: {key}: {what}; it must be a finite number")
    return value


def numbers_of(file: Path, settings: Mapping[str, Any], key: str) -> dict[str, float]:
    """A table of finite numbers; empty where the key is missing."""
    table = settings.get(key) or {}
    if not isinstance(table, dict):
        raise ModelError(f"{file}: {key}: {table!r} is refused; it must be a table of numbers")
    return {name: number_of(file, table, name, None) for name in table}
