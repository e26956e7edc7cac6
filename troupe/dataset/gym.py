"""Rows of reasoning-gym's tasks, which a seed makes; needs the extra `reasoning-gym`.

They are made in a process of their own (`gym_rows.py`) in which texts have the same hashes each time: some tasks draw
from sets, and would be others in every start. It says on stderr how far it is, and ends with this one. What was made is
kept in the user's cache (`$XDG_CACHE_HOME/troupe/rows`), since some tasks take a second a row. Rewards find in the
column `reasoning_gym` which entry a row is.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from troupe.dataset.query import split_query
from troupe.errors import DatasetError, remedy
from troupe.runtime.files import drafted, expanded
from troupe.runtime.terminal import harmless

PREFIX = "reasoning_gym:"
DEFAULTS: dict[str, Any] = {"size": 500, "seed": 0}
"""Of every task; the library's own seed differs each time."""
MADE = b"made "
"""How a line begins in which the process says how far it is: the rows made, and how many there will be."""

_MAKERS: set[subprocess.Popen[bytes]] = set()
_TOLD = 2000  # characters of what a process said before it died
_EVERY_S = 5.0  # between two lines about how far it is
_FORMAT = 1  # of the files of kept rows
_MOST_FILES = 64


def read_gym(source: str, first: int | None = None) -> tuple[list[dict[str, Any]], int]:
    """The rows, and how many there are, of `reasoning_gym:TASK,TASK?size=500&seed=0&OPTION=VALUE&TASK.OPTION=VALUE`.

    Each task gives `size` rows, and the rows of several take turns. `OPTION` is one of the task's configuration.
    Columns: `prompt`, `answer` (a text), `task`, and `reasoning_gym`, an object with `task`, `options` and `index`,
    from which the entry can be made once more. `first`: no more than that many are made where none are kept.

    Raises:
        DatasetError: for an unknown task or option, or a value that the task refuses.
    """
    found = find_spec("reasoning_gym")
    if found is None:
        raise DatasetError(
            f"{source}: its tasks need the package reasoning-gym, which is missing; {remedy('reasoning-gym')}"
        )
    kept = KeptRows.of(source, None if found.origin is None else Path(found.origin).parent)
    if (rows := kept.read()) is not None:
        return rows, len(rows)
    what = "its rows, which are kept for the next start" if first is None else f"its first {first} rows"
    _tell(f"{source}: making {what}; of some tasks this takes a while")
    answer = _make_in_child(source, first)
    if "error" in answer:
        raise DatasetError(answer["error"])
    if first is None:
        kept.write(answer["rows"])
    return answer["rows"], answer["in_all"]


def stop_making_rows() -> None:
    """End the making of rows in every thread, whose `read_gym` then raises a DatasetError: for whoever is interrupted
    while another thread makes some."""
    for child in tuple(_MAKERS):
        child.kill()


def _make_in_child(source: str, first: int | None) -> dict[str, Any]:
    """What the process answers, told of while it works. It is gone afterwards, however this ends."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    with tempfile.TemporaryFile() as said:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "troupe.dataset.gym_rows", source, *([] if first is None else [str(first)])],
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
            stdin=subprocess.PIPE,  # the process ends when this end of it is closed, as it is when we are gone
            stdout=subprocess.PIPE,
            stderr=said,
            start_new_session=True,  # Ctrl-C is for this process, which ends the other one
        )
        _MAKERS.add(child)
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            document = _read_document(source, child.stdout)
            code = child.wait()
        finally:
            _MAKERS.discard(child)
            child.kill()
            child.wait()
            child.stdin.close()
            child.stdout.close()
        try:
            answer: dict[str, Any] = msgspec.json.decode(document, type=dict[str, Any])
        except msgspec.MsgspecError:
            said.seek(max(0, said.seek(0, os.SEEK_END) - 4 * _TOLD))
            last = said.read().decode(errors="replace").strip()[-_TOLD:]
            raise DatasetError(
                f"{source}: the process that makes the rows ended with code {code}: {last or 'it said nothing'}"
            ) from None
    return answer


def _read_document(source: str, stdout: BinaryIO | Any) -> bytes:
    """What the process prints but for how far it is, of which a line is told now and then."""
    document, told_s = b"", time.monotonic()
    for line in stdout:
        if not line.startswith(MADE):
            document += line
        elif time.monotonic() - told_s >= _EVERY_S:
            told_s = time.monotonic()
            made, in_all = line.removeprefix(MADE).split()
            _tell(f"{source}: {int(made):,} of {int(in_all):,} rows made")
    return document


def _tell(line: str) -> None:
    """On stderr, if anybody is there to read it."""
    with suppress(OSError, ValueError):
        print(harmless(line), file=sys.stderr, flush=True)


class _KeptFile(msgspec.Struct, frozen=True):
    """What a file of kept rows holds."""

    key: dict[str, Any]
    digest: str
    """sha256 of the rows."""
    rows: msgspec.Raw


class KeptRows:
    """The rows of one source, as this version of Python and of the library that makes them has them.

    A file is named by all that its rows depend on, and used only if it is whole. Nothing depends on it: what cannot be
    read is made once more, and what cannot be written is not kept.
    """

    def __init__(self, key: dict[str, Any], folder: Path) -> None:
        self._key, self._folder = key, folder
        name = hashlib.sha256(msgspec.json.encode(key, order="deterministic")).hexdigest()
        self.path = folder / f"{name}.json"

    @classmethod
    def of(cls, source: str, package: Path | None) -> KeptRows:
        """Of a source with options; `package`: folder of the library. Another file in it is another version."""
        name, options = split_query(source)
        key = {
            "format": _FORMAT,
            "source": name,
            "options": options,
            "library": None if package is None else _stamp(package),
            "python": sys.version,
        }
        return cls(key, _cache() / "rows")

    def read(self) -> list[dict[str, Any]] | None:
        """The rows, or None where there are none that are whole."""
        try:
            file = msgspec.json.decode(self.path.read_bytes(), type=_KeptFile)
            if file.key == self._key and file.digest == hashlib.sha256(file.rows).hexdigest():
                return msgspec.json.decode(file.rows, type=list[dict[str, Any]])
        except (OSError, UnicodeDecodeError, RecursionError, msgspec.MsgspecError):
            pass
        return None

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Keep them, if there is a place: whole or not at all. The oldest files give way."""
        data = msgspec.json.encode(rows)
        file = _KeptFile(key=self._key, digest=hashlib.sha256(data).hexdigest(), rows=msgspec.Raw(data))
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            with drafted(self.path) as draft:  # who writes it at the same time may cut it: it is not whole then
                draft.write_bytes(msgspec.json.encode(file))
            files = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime)
            for old in files[:-_MOST_FILES]:
                old.unlink(missing_ok=True)


def _cache() -> Path:
    folder = expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return (folder if folder.is_absolute() else Path(os.devnull)) / "troupe"  # a user without a home keeps nothing


def _stamp(package: Path) -> str:
    """Of which files a library consists, by name, size and time: its version, also where somebody works on it."""
    digest = hashlib.sha256(str(package).encode(errors="surrogateescape"))
    for path in sorted(package.rglob("*.py")):
        with suppress(OSError):
            told = path.stat()
            digest.update(f"{path.relative_to(package)} {told.st_size} {told.st_mtime_ns}\n".encode())
    return digest.hexdigest()
