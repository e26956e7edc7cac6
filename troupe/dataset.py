"""Prompts from JSON or JSONL files: checked rows, epochs, and an order that a seed fixes.

Every row is checked when the file is read, so that a bad one is refused before the first token is sampled.
Knows nothing of tokens, templates or policies: whether a prompt fits the model is seen where it is tokenized.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import msgspec

from troupe.errors import DatasetError
from troupe.messages import PromptText

ChatMode = Literal["auto", "always"]
"""How prompts are read: "auto" leaves texts as they are; "always" makes a text one user message."""

RESERVED_COLUMNS = frozenset({"completions", "completion_ids", "prompts", "trainer_state", "log_extra", "log_metric"})
"""Names under which reward functions receive something else, so that no column may have them."""

ROLES = ("system", "user", "assistant", "tool")
"""Roles that Qwen3's chat template renders; it drops any other without a word."""


class DataConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[data]` section."""

    path: str | None = None
    """`.json` or `.jsonl` file of training prompts."""
    eval_path: str | None = None
    """The same for evaluation."""
    shuffle: bool = True
    """Whether each epoch has its own order, fixed by the run's seed."""
    max_prompt_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Longest prompt in tokens; None: what the model's positions leave beside the longest completion."""
    chat: ChatMode = "auto"
    """Message lists always go through the chat template; "always" sends texts through it too."""
    chat_template_kwargs: dict[str, Any] = {}
    """Further variables for the chat template, such as `enable_thinking`."""


class PromptRow(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One checked row."""

    prompt: PromptText
    """A text, or a conversation of at least one message; never empty."""
    columns: dict[str, Any]
    """Every other column of the dataset; `None` where this row lacks it."""
    row: int
    """Place in the source, from 0; shuffling keeps it."""
    line: int | None
    """Line of the file on which the row starts, from 1; None where there is no file."""


class PromptDataset:
    """Checked prompts in a fixed order.

    Rows may have different columns: the dataset has the union of them, with `None` where a row lacks one.
    """

    def __init__(self, rows: Sequence[PromptRow], source: str = "rows") -> None:
        if not rows:
            raise DatasetError(f"{source}: the dataset has no rows; give it at least one prompt")
        self._rows = tuple(rows)
        self.source = source
        """File or name that error messages start with."""

    @classmethod
    def from_json(cls, path: str | Path, chat: ChatMode = "auto") -> PromptDataset:
        """Read `.json` (a list of objects) or `.jsonl` (one object a line; empty lines are skipped).

        Each object has "prompt", a text or a list of messages, and any other columns.

        Raises:
            DatasetError: naming file and line, for whatever in the file cannot be used.
        """
        path = Path(path).expanduser()
        parse = {".json": _parse_json, ".jsonl": _parse_jsonl}.get(path.suffix.lower())
        if parse is None:
            raise DatasetError(f"{path}: unknown suffix {path.suffix!r}; give a .json or .jsonl file of prompts")
        return cls._checked(parse(path, _read_text(path)), str(path), chat)

    @classmethod
    def from_rows(
        cls, rows: Iterable[Mapping[str, Any]], source: str = "rows", chat: ChatMode = "auto"
    ) -> PromptDataset:
        """The same from objects in memory; `source` stands for the file in error messages."""
        return cls._checked(((None, row) for row in rows), source, chat)

    @classmethod
    def _checked(cls, numbered: Iterable[tuple[int | None, Any]], source: str, chat: ChatMode) -> PromptDataset:
        rows = [_check_row(value, source, row, line, chat) for row, (line, value) in enumerate(numbered)]
        names = sorted({name for row in rows for name in row.columns})
        filled = [msgspec.structs.replace(row, columns={name: row.columns.get(name) for name in names}) for row in rows]
        return cls(filled, source)

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
        """The permutation of row indices in which one epoch plays, the same on every platform.

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


def _read_text(path: Path) -> str:
    if path.is_dir():
        raise DatasetError(f"{path}: is a folder; give the .json or .jsonl file in it")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such file; relative paths start at {Path.cwd()}") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DatasetError(
            f"{path}:{line}: byte 0x{error.object[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON value; write null or a finite number")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)
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


def _check_row(value: Any, source: str, row: int, line: int | None, chat: ChatMode) -> PromptRow:
    where = f"{source}: row {row}" if line is None else f"{source}:{line}: row {row}"
    where = f"{where} (counted from 0)"
    if not isinstance(value, Mapping):
        raise DatasetError(f'{where} is {_kind(value)}, not an object; write {{"prompt": …}}')
    columns = dict(value)
    if "prompt" not in columns:
        has = ", ".join(sorted(map(str, columns))) or "no keys"
        raise DatasetError(f'{where} has no "prompt" (it has {has}); add one')
    for name in columns:
        if not isinstance(name, str):
            raise DatasetError(f"{where}: column name {name!r} is {_kind(name)}; column names are texts")
        if name in RESERVED_COLUMNS:
            raise DatasetError(
                f"{where}: column {name!r} is the name of another argument of reward functions; rename it"
            )
    prompt = _check_prompt(columns.pop("prompt"), where)
    if chat == "always" and isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    try:
        msgspec.msgpack.encode([prompt, columns])
    except (UnicodeEncodeError, OverflowError, TypeError, ValueError, RecursionError) as error:
        raise DatasetError(
            f"{where} holds a value that cannot be sent on: {error}; keep to JSON values, "
            "whole numbers of at most 64 bits and texts without lone surrogates"
        ) from None
    return PromptRow(prompt=prompt, columns=columns, row=row, line=line)


def _check_prompt(prompt: Any, where: str) -> PromptText:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise DatasetError(f"{where}: the prompt is empty; write a text or remove the row")
        return prompt
    if not isinstance(prompt, list):
        raise DatasetError(f"{where}: the prompt is {_kind(prompt)}; give a text or a list of messages")
    if not prompt:
        raise DatasetError(f"{where}: the prompt is an empty list; give at least one message")
    for number, message in enumerate(prompt):
        at = f"{where}: message {number} of the prompt"
        if not isinstance(message, dict):
            raise DatasetError(f'{at} is {_kind(message)}, not an object; write {{"role": …, "content": …}}')
        if message.get("role") not in ROLES:
            raise DatasetError(f"{at} has role {message.get('role')!r}; use one of {', '.join(ROLES)}")
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            continue
        if not isinstance(content, str):
            raise DatasetError(f"{at} has content that is {_kind(content)}; give a text")
    return prompt


def _kind(value: Any) -> str:
    """What a JSON author would call a value."""
    if value is None:
        return "null or missing"
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number"}
    return kinds.get(type(value), f"a {type(value).__name__}")
