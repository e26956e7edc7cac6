"""What stands behind an adapter's colon: a name, and options behind a `?`."""

import importlib
import re
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

from troupe.dataset.query import parse_value, split_query
from troupe.errors import DatasetError, WorldError
from troupe.rewards.faults import described
from troupe.runtime.code_loading import Wanted, load_named


def package(module: str) -> Any:
    """A module of the package that is adapted. ImportError where it is missing."""
    return importlib.import_module(module)


def check_version(distribution: str, least: tuple[int, int]) -> None:
    """WorldError where an older version of a package is installed than the adapter was written for."""
    found = version(distribution)
    numbers = tuple(int(each) for each in re.findall(r"\d+", found)[:2])
    if numbers < least:
        wanted = ".".join(map(str, least))
        raise WorldError(f"{distribution} is installed as {found}; its environments need {wanted} or later: upgrade it")


def read_options(rest: str, prefix: str) -> tuple[str, dict[str, Any]]:
    """Name and options of `NAME?key=value&key=value`; values are JSON where they can be, else texts."""
    try:
        name, options = split_query(rest)
        return name, {key: parse_value(value) for key, value in options.items()}
    except DatasetError as error:
        raise WorldError(f"{prefix}:{error}") from None


def load_code(spec: Any, noun: str) -> Callable[..., Any]:
    """A function or class of "MODULE:NAME" or "FILE.py:NAME", a relative file counted from the working folder."""
    wanted = Wanted(noun, "class or function", "give FILE.py:NAME or MODULE:NAME", WorldError, described)
    found = load_named(str(spec), None, wanted).value
    if not callable(found):
        raise WorldError(f"{noun} {spec!r} is of type {type(found).__name__} and cannot be called")
    return found  # type: ignore[no-any-return]
