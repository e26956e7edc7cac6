"""`~` in the names of files that somebody gives. Quick to import."""

from __future__ import annotations

from pathlib import Path


def expanded(path: str | Path) -> Path:
    """The path with the home folder in place of `~` or `~USER`; as it is where that has none, to be told of as any
    other file that is not there."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
