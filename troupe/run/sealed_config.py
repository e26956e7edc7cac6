"""`run.toml` as a run writes it: with a sum, by which a resume sees whether somebody has edited it since."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import msgspec

from troupe.errors import ConfigError
from troupe.runtime.files import read_toml

_SEAL = "# What a resume may take for settled, unless it was edited since: sha256 "


def seal(path: Path) -> None:
    """Add the sum, in a comment at the end, to a file that was just written. OSError where the disk fails."""
    with path.open("a", encoding="utf-8") as file:
        file.write(f"\n{_SEAL}{_sum(read_toml(path))}\n")


def is_as_written(path: Path) -> bool:
    """Whether the file says what a run wrote into it; layout, order and comments may differ. False, too, without a
    sum."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        sums = [line.removeprefix(_SEAL).strip() for line in lines if line.startswith(_SEAL)]
        return sums[-1:] == [_sum(read_toml(path))]
    except (OSError, UnicodeDecodeError, ConfigError):
        return False


def _sum(table: dict[str, Any]) -> str:
    text = msgspec.json.encode(table, order="deterministic")
    return hashlib.sha256(text).hexdigest()
