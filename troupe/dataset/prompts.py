"""Checked prompts, epochs, and an order that a seed fixes."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from troupe.dataset.rows import PromptRow, check_row
from troupe.dataset.settings import ChatMode, DataConfig
from troupe.dataset.sources import read_file, read_source
from troupe.errors import DatasetError
from troupe.runtime.files import expanded


class PromptDataset:
    """Checked prompts in a fixed order.

    Rows may have different columns: the dataset has the union of them, with `None` where a row lacks one.
    """

    def __init__(self, rows: Sequence[PromptRow], source: str = "rows", in_all: int | None = None) -> None:
        if not rows:
            raise DatasetError(f"{source}: the dataset has no rows; give it at least one prompt")
        self._rows = tuple(rows)
        self.source = source
        """File or name that error messages start with."""
        self.in_all = len(rows) if in_all is None else in_all
        """Rows of the source; more than there are here where only the first few were read."""

    @classmethod
    def load(cls, source: str | Path, config: DataConfig | None = None, *, first: int | None = None) -> PromptDataset:
        """Read a source as the `[data]` section has it: a file, `hf:NAME?…` or `reasoning_gym:TASK?…`.

        Each row has a column of prompts, texts or lists of messages, and any others. `first`: so many rows are enough
        where each has to be made; `in_all` then tells how many there are.

        Raises:
            DatasetError: naming source, line, row and column, for whatever cannot be used.
        """
        source, config = str(source), DataConfig() if config is None else config
        rows, in_all = read_source(source, first)
        return cls.from_numbered(rows, source, config, in_all)

    @classmethod
    def from_json(cls, path: str | Path, chat: ChatMode = "auto") -> PromptDataset:
        """Read `.json` (a list of objects) or `.jsonl` (one object a line; empty lines are skipped).

        Each object has "prompt", a text or a list of messages, and any other columns.

        Raises:
            DatasetError: naming file and line, for whatever in the file cannot be used.
        """
        path = expanded(path)
        if path.suffix.lower() not in (".json", ".jsonl"):
            raise DatasetError(f"{path}: unknown suffix {path.suffix!r}; give a .json or .jsonl file of prompts")
        return cls.from_numbered(read_file(path), str(path), DataConfig(chat=chat))

    @classmethod
    def from_rows(
        cls, rows: Iterable[Mapping[str, Any]], source: str = "rows", chat: ChatMode = "auto"
    ) -> PromptDataset:
        """The same from objects in memory; `source` stands for the file in error messages."""
        return cls.from_numbered(((None, row) for row in rows), source, DataConfig(chat=chat))

    @classmethod
    def from_numbered(
        cls,
        numbered: Iterable[tuple[int | None, Any]],
        source: str,
        config: DataConfig,
        in_all: int | None = None,
    ) -> PromptDataset:
        """The same from lines (None where there are none) and objects; `in_all`: how many there are of them."""
        rows = [check_row(value, source, row, line, config) for row, (line, value) in enumerate(numbered)]
        names = sorted({name for row in rows for name in row.columns})
        filled = [msgspec.structs.replace(row, columns={name: row.columns.get(name) for name in names}) for row in rows]
        return cls(filled, source, in_all)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> PromptRow:
        return self._rows[index]

    def __iter__(self) -> Iterator[PromptRow]:
        return iter(self._rows)

    @property
    def columns(self) -> frozenset[str]:
        """Names of all columns but the prompt: what reward functions can ask for."""
        return frozenset(self._rows[0].columns)

    @property
    def fingerprint(self) -> str:
        """sha256 (64 hex digits) of prompts and columns in order; the file format does not count."""
        digest = hashlib.sha256()
        for row in self._rows:
            digest.update(msgspec.msgpack.encode([row.prompt, row.columns], order="deterministic"))
        return digest.hexdigest()

    def head(self, rows: int) -> PromptDataset:
        """The first rows alone."""
        return PromptDataset(self._rows[:rows], self.source, self.in_all)

    def batches(self, batch_size: int) -> Iterator[list[PromptRow]]:
        """Rows in order, `batch_size` at a time; the last batch may be shorter.

        Raises:
            DatasetError: for a batch size below 1.
        """
        if batch_size < 1:
            raise DatasetError(f"batch_size = {batch_size}, but a batch has at least 1 prompt; give 1 or more")
        starts = range(0, len(self), batch_size)
        return (list(self._rows[start : start + batch_size]) for start in starts)

    def shuffle(self, seed: int) -> PromptDataset:
        """A new dataset in the order of epoch 0 of `seed`; this one stays as it is."""
        return PromptDataset([self._rows[i] for i in self.order(seed, epoch=0)], self.source)

    def order(self, seed: int, epoch: int, shuffle: bool = True) -> list[int]:
        """The permutation of row indices in which one epoch has them, the same on every platform.

        The key is sha256("troupe.dataset/SEED/EPOCH") read as a big-endian integer. It seeds `random.Random`,
        whose `random()` Python promises to keep. Fisher–Yates from the last place i down to 1 swaps places i
        and ⌊random()·(i+1)⌋.
        """
        places = list(range(len(self)))
        if not shuffle:
            return places
        key = hashlib.sha256(f"troupe.dataset/{seed}/{epoch}".encode()).digest()
        rng = random.Random(int.from_bytes(key, "big"))
        for i in range(len(places) - 1, 0, -1):
            j = int(rng.random() * (i + 1))
            places[i], places[j] = places[j], places[i]
        return places
