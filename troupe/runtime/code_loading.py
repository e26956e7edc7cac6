"""From "FILE.py:NAME" or "MODULE:NAME", as a configuration has it, to what the user's code has under that name.

User files are run as Python, so they must be the user's own.
"""

import difflib
import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from troupe.errors import InputError
from troupe.runtime.code_files import module_name, spec_of
from troupe.runtime.files import expanded


class Wanted(NamedTuple):
    """What is loaded, as messages speak of it."""

    noun: str
    """"reward"."""
    kinds: str
    """"function or RewardActor"."""
    forms: str
    """What may be given, a clause."""
    error: type[InputError]
    described: Callable[[BaseException], str]
    """An error that a module's import raised, in one line."""
    known: Sequence[str] = ()
    """Names of our own, one of which may have been meant."""
    imported: Callable[[str], None] | None = None
    """Told the module's name when a file was run."""


class Found(NamedTuple):
    """What a name stands for, and where."""

    value: Any
    name: str
    path: Path
    """The file, or the module's name."""


def load_named(spec: str, base: Path | None, wanted: Wanted) -> Found:
    """What "FILE.py:NAME" or "MODULE:NAME" names.

    A relative FILE starts at `base`, by default the working folder. The file is run once under a module name of its
    own, however much is taken from it; its folder is appended to `sys.path` and stays there, so that it can import its
    neighbours, also later, but never hides an installed package. MODULE is one that can be imported, such as a
    package's.

    Raises:
        wanted.error: with file and line, for whatever keeps it from being found.
    """
    file, colon, name = spec.rpartition(":")
    if not colon or not file or not name:
        kind = spec.partition(":")[0]
        if kind.endswith(".py"):
            raise wanted.error(f"{wanted.noun} {spec!r} names a file and nothing in it; write {kind}:NAME")
        raise wanted.error(f"{wanted.noun} {spec!r} is unknown{suggestion(kind, wanted.known)}; {wanted.forms}")
    if _is_module(file):
        module, path = _import_module(file, wanted), Path(file)
    else:
        path = (base or Path()) / expanded(file)
        module = _import_file(path, wanted)
    if not hasattr(module, name):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise wanted.error(f"{path}: has no {name!r}{suggestion(name, names)}; name a {wanted.kinds} of it")
    return Found(getattr(module, name), name, path)


def suggestion(name: str, names: Sequence[str]) -> str:
    """(did you mean …?), or nothing."""
    close = difflib.get_close_matches(name, names, n=3)
    return f" (did you mean {', '.join(close)}?)" if close else ""


def _is_module(name: str) -> bool:
    parts = name.split(".")
    return (
        not name.endswith(".py")
        and all(map(str.isidentifier, parts))
        and importlib.util.find_spec(parts[0]) is not None
    )


def _import_module(name: str, wanted: Wanted) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit, GeneratorExit) as error:
        raise wanted.error(f"{name}: the module does not import: {wanted.described(error)}; {wanted.forms}") from error


def _import_file(path: Path, wanted: Wanted) -> ModuleType:
    if path.suffix != ".py":
        raise wanted.error(
            f"{path}: {wanted.noun} code is a .py file, not {path.suffix or 'without suffix'!r}; {wanted.forms}"
        )
    if not path.is_file():
        raise wanted.error(f"{path}: no such file; relative paths start at {path.parent.absolute()}")
    path = path.resolve()
    name = module_name(path)
    if name in sys.modules:
        return sys.modules[name]
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = spec_of(name, path)
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and typing look a class's module up here
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit, GeneratorExit) as error:
        del sys.modules[name]
        raise wanted.error(
            f"{path}:{_line_in(path, error)}: the file does not import: {type(error).__name__}: {error}; correct it"
        ) from error
    if wanted.imported is not None:
        wanted.imported(name)
    return module


def _line_in(path: Path, error: BaseException) -> int:
    """The last line of the user's file on the way to the error."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return error.lineno or 1
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return (lines[-1] if lines else None) or 1
