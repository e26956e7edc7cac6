"""Rows of JSON and JSONL files, each with the line on which it starts. Knows nothing of what a row must be."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from troupe.dataset.files import read_text
from troupe.errors import DatasetError


def read_json(path: Path) -> Iterator[tuple[int, Any]]:
    """Line and value of each row of a list of objects. DatasetError, naming file and line, where it is none."""
    return _parse_json(path, read_text(path))


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """Line and value of each row of one object a line; empty lines are skipped. DatasetError as `read_json`."""
    return _parse_jsonl(path, read_text(path))


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value; write null or a finite number")


def repeated_key(pairs: Sequence[tuple[str, Any]]) -> str | None:
    """The first key that stands twice in an object, of which readers silently take one value; None where all differ."""
    seen = set[str]()
    for key, _ in pairs:
        if key in seen:
            return key
        seen.add(key)
    return None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if (repeated := repeated_key(pairs)) is not None:
        raise ValueError(f"the key {repeated!r} stands twice in one object; remove one of them")
    return dict(pairs)


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, object_pairs_hook=_once)
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
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path}:{line}: the row starting here cannot be read: {error}") from None


def _parse_jsonl(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    # Not str.splitlines: it also breaks at U+2028 and others that JSON strings may hold.
    for line, record in enumerate(text.split("\n"), start=1):
        record = record.strip(_SPACE)
        if not record:
            continue
        value, end = _decode(path, line, record, 0)
        if end != len(record):
            raise DatasetError(
                f"{path}:{line}: malformed JSON: more text after the object; .jsonl has one object a line"
            )
        yield line, value


def _parse_json(path: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Rows one by one, so that each has its line."""
    cursor = _Cursor(path, text)
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
