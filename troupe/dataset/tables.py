"""Rows of tables: CSV and TSV files by the standard library, Parquet files by pyarrow (the extra `datasets`).

Knows nothing of what a row must be.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from troupe.dataset.extras import optional
from troupe.dataset.files import read_bytes, read_text
from troupe.errors import DatasetError

_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons"}


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Line and columns of each row; the first row names the columns, and every value is text.

    DatasetError, naming file and line, for what is no table. Lines without any value are skipped.
    """
    text = read_text(path)
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    names: list[str] | None = None
    line = 1
    try:
        for values in reader:
            start, line = line, reader.line_num + 1
            if not values:
                continue
            if names is None:
                names = _checked_names(values, path, start, separator)
            elif len(values) != len(names):
                raise DatasetError(
                    f"{path}:{start}: {len(values)} values, but the header names {len(names)} columns; put values that "
                    f'hold {separator!r} or line ends in double quotes ("" for a quote)'
                )
            else:
                yield start, dict(zip(names, values, strict=True))
    except csv.Error as error:
        raise DatasetError(f"{path}:{line}: the row starting here cannot be read: {error}; correct it") from None


def _checked_names(names: list[str], path: Path, line: int, separator: str) -> list[str]:
    others = {other: kind for other, kind in _SEPARATORS.items() if other != separator}
    if len(names) == 1 and (other := next((other for other in others if other in names[0]), None)):
        remedy = "name the file .tsv" if other == "\t" else f"save it with {_SEPARATORS[separator]}"
        raise DatasetError(
            f"{path}:{line}: the first line has {others[other]} between the names of the columns, but columns of a "
            f"{path.suffix} file are separated by {_SEPARATORS[separator]}; {remedy}"
        )
    names = [name.strip() for name in names]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DatasetError(f"{path}:{line}: two columns are called {repeated[0]!r}; the first line names the columns")
    return names


def read_parquet(path: Path) -> Iterator[tuple[None, dict[str, Any]]]:
    """The columns of each row. DatasetError where the file is none, or pyarrow is missing."""
    data = read_bytes(path)
    arrow, parquet = optional("pyarrow", "datasets", path), optional("pyarrow.parquet", "datasets", path)
    try:
        for batch in parquet.ParquetFile(arrow.BufferReader(data)).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield None, row
    except (arrow.ArrowException, OSError) as error:
        raise DatasetError(f"{path}: this is no Parquet file that pyarrow can read: {error}") from error
