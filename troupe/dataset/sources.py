"""From the text that names a source of prompts to its rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from troupe.dataset import gym, hub
from troupe.dataset.files import read_csv, read_json, read_jsonl, read_parquet, refuse_folder
from troupe.errors import DatasetError
from troupe.runtime.files import expanded

FILES: dict[str, Callable[[Path], Iterator[tuple[int | None, Any]]]] = {
    ".json": read_json,
    ".jsonl": read_jsonl,
    ".csv": read_csv,
    ".tsv": read_csv,
    ".parquet": read_parquet,
}
"""Suffix → what reads the rows of such a file, each with its line where there are lines."""

PREFIXED: dict[str, Callable[[str], Iterable[tuple[int | None, Any]]]] = {
    hub.PREFIX: hub.read_hub,
    gym.PREFIX: gym.read_gym,
}
"""How a source begins → what reads its rows."""


def read_source(source: str) -> Iterable[tuple[int | None, Any]]:
    """Line (None where there is none) and value of each row. DatasetError where they cannot be had."""
    for prefix, read in PREFIXED.items():
        if source.startswith(prefix):
            return read(source)
    return read_file(expanded(source))


def read_file(path: Path) -> Iterator[tuple[int | None, Any]]:
    """The same of a file."""
    refuse_folder(path)
    read = FILES.get(path.suffix.lower())
    if read is None:
        shown = f"unknown suffix {path.suffix!r}" if path.suffix else "a file of prompts has a suffix"
        raise DatasetError(f"{path}: {shown}; give a {', '.join(FILES)} file of prompts, hf:NAME or reasoning_gym:TASK")
    return read(path)


def anchored_source(source: str, base: Path) -> str:
    """The source as it is found from everywhere: paths, also of an `hf:FOLDER` that exists, counted from `base`."""
    if source.startswith(gym.PREFIX):
        return source
    if source.startswith(hub.PREFIX):
        name, question, query = source.removeprefix(hub.PREFIX).partition("?")
        folder = (base / expanded(name)).absolute()
        return f"{hub.PREFIX}{folder}{question}{query}" if name and folder.exists() else source
    return str((base / expanded(source)).absolute())


def source_name(source: str) -> str:
    """What a run of these prompts may be called: the file's name without suffix, the dataset's or the first task's."""
    for prefix in PREFIXED:
        if source.startswith(prefix):
            name = source.removeprefix(prefix).partition("?")[0]
            return Path(name.partition(",")[0]).name or "run"
    return Path(source).stem or "run"
