"""Rows that took long to make, kept for the next start in the user's cache (`$XDG_CACHE_HOME/troupe/rows`).

A file is named by all that its rows depend on, and used only if it is whole. Nothing depends on it: what cannot be read
is made once more, and what cannot be written is not kept.
"""

from __future__ import annotations

import hashlib
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from troupe.dataset.query import split_query
from troupe.runtime.files import drafted, expanded

_FORMAT = 1
_MOST_FILES = 64


class _File(msgspec.Struct, frozen=True):
    """What a file holds."""

    key: dict[str, Any]
    digest: str
    """sha256 of the rows."""
    rows: msgspec.Raw


class KeptRows:
    """The rows of one source, as this version of Python and of the library that makes them has them."""

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
            file = msgspec.json.decode(self.path.read_bytes(), type=_File)
            if file.key == self._key and file.digest == hashlib.sha256(file.rows).hexdigest():
                return msgspec.json.decode(file.rows, type=list[dict[str, Any]])
        except (OSError, UnicodeDecodeError, RecursionError, msgspec.MsgspecError):
            pass
        return None

    def write(self, rows: list[dict[str, Any]]) -> None:
        """Keep them, if there is a place: whole or not at all. The oldest files give way."""
        data = msgspec.json.encode(rows)
        file = _File(key=self._key, digest=hashlib.sha256(data).hexdigest(), rows=msgspec.Raw(data))
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
