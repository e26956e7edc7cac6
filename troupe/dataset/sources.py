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


def read_source(source: str, first: int | None = None) -> tuple[Iterable[tuple[int | None, Any]], int | None]:
    """Line (None where there is none) and value of each row; and how many there are, where not all of them come
    because `first` are enough. DatasetError where they cannot be had."""
    if source.startswith(gym.PREFIX):
        rows, in_all = gym.read_gym(source, first)
        return ((None, row) for row in rows), in_all
    if source.startswith(hub.PREFIX):
        return hub.read_hub(source), None
    return read_file(expanded(source)), None


def read_file(path: Path) -> Iterator[tuple[int | None, Any]]:
    """Line and value of each row of a file."""
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
    for prefix in (hub.PREFIX, gym.PREFIX):
        if source.startswith(prefix):
            name = source.removeprefix(prefix).partition("?")[0]
            return Path(name.partition(",")[0]).name or "run"
    return Path(source).stem or "run"
