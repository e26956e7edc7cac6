"""Rows of files: JSON, JSONL, CSV and TSV by the standard library, Parquet by pyarrow (the extra `datasets`)."""

import csv
import importlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from troupe.dataset.query import refuse_repeated_keys
from troupe.errors import DatasetError, remedy

_SEPARATORS = {",": "commas", "\t": "tabs", ";": "semicolons"}


def refuse_folder(path: Path) -> None:
    """DatasetError where the path is a folder's."""
    if path.is_dir():
        raise DatasetError(f"{path}: is a folder; name the file in it that has the prompts, or hf:FOLDER for all")


def read_bytes(path: Path) -> bytes:
    """What is in a file. DatasetError where it cannot be had."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file; relative paths start at {Path.cwd()}") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def read_text(path: Path) -> str:
    """What is in a UTF-8 file, without a byte-order mark. DatasetError where it cannot be had."""
    data = read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DatasetError(
            f"{path}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value; write null or a finite number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=refuse_repeated_keys)
_SPACE = " \t\r\n"


def _decode(path: Path, line: int, text: str, start: int) -> tuple[Any, int]:
    """The JSON value at `start`, which lies on `line`, and the position behind it."""
    try:
        return _DECODER.raw_decode(text, start)
    except json.JSONDecodeError as error:
        at = line + text.count("\n", start, error.pos)
        raise DatasetError(
            f"{path}:{at}: malformed JSON at column {error.colno}: {error.msg}; correct the line"
        ) from None
    except (ValueError, RecursionError, DatasetError) as error:
        raise DatasetError(f"{path}:{line}: the row starting here cannot be read: {error}") from None


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Line and value of each row of one object a line; empty lines are skipped. DatasetError as `read_json`."""
    # Not str.splitlines: it also breaks at U+2028 and others that JSON strings may hold.
    for line, record in enumerate(read_text(path).split("\n"), start=1):
        record = record.strip(_SPACE)
        if not record:
            continue
        value, end = _decode(path, line, record, 0)
        if end != len(record):
            raise DatasetError(
                f"{path}:{line}: malformed JSON: more text after the object; .jsonl has one object a line"
            )
        yield line, value


def read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Line and value of each row of a list of objects. DatasetError, naming file and line, where it is none."""
    cursor = _Cursor(path, read_text(path))
    if not cursor.peek():
        return  # nothing but white space: an empty dataset, which the caller reports
    if cursor.peek() != "[":
        raise DatasetError(f'{path}:{cursor.line}: not a list; a .json file is a list of objects, [{{"prompt": …}}, …]')
    cursor.step()
    if cursor.peek() != "]":
        yield cursor.value()
        while cursor.peek() == ",":
            cursor.step()
            yield cursor.value()
    if cursor.peek() != "]":
        raise cursor.malformed("expected ',' or ']' after a row")
    cursor.step()
    if cursor.peek():
        raise cursor.malformed("more text after the list")


class _Cursor:
    """A place in a JSON text that knows its line."""

    def __init__(self, path: Path, text: str) -> None:
        self.path, self.text, self.at, self.line = path, text, 0, 1

    def _move(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        end = self.at
        while end < len(self.text) and self.text[end] in _SPACE:
            end += 1
        self._move(end)
        return self.text[end : end + 1]

    def step(self) -> None:
        self.at += 1

    def value(self) -> tuple[int, Any]:
        self.peek()
        line = self.line
        value, end = _decode(self.path, line, self.text, self.at)
        self._move(end)
        return line, value

    def malformed(self, problem: str) -> DatasetError:
        found = repr(self.text[self.at]) if self.at < len(self.text) else "the end of the file"
        return DatasetError(f"{self.path}:{self.line}: malformed JSON: {problem}, found {found}; correct it")


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
                names = _check_header(values, path, start, separator)
            elif len(values) != len(names):
                raise DatasetError(
                    f"{path}:{start}: {len(values)} values, but the header names {len(names)} columns; put values that "
                    f'hold {separator!r} or line ends in double quotes ("" for a quote)'
                )
            else:
                yield start, dict(zip(names, values, strict=True))
    except csv.Error as error:
        raise DatasetError(f"{path}:{line}: the row starting here cannot be read: {error}; correct it") from None


def _check_header(names: list[str], path: Path, line: int, separator: str) -> list[str]:
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
    arrow, parquet = import_optional("pyarrow", "datasets", path), import_optional("pyarrow.parquet", "datasets", path)
    try:
        for batch in parquet.ParquetFile(arrow.BufferReader(data)).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield None, row
    except (arrow.ArrowException, OSError) as error:
        raise DatasetError(f"{path}: this is no Parquet file that pyarrow can read: {error}") from error


def import_optional(module: str, extra: str, source: object) -> ModuleType:
    """The module of an extra. DatasetError, which says how to install it, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise DatasetError(
            f"{source}: reading this needs the package {package}, which cannot be imported ({error}); {remedy(extra)}"
        ) from None
