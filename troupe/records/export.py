"""Completions as files: all that is stored of each, or a dataset to train on, in JSONL or Parquet.

A dataset has the columns that TRL takes, `prompt` and `completion`: texts, or messages where the prompt is messages.
"""

import importlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from troupe.errors import OutputError, remedy
from troupe.records.store.completions import StoredCompletion
from troupe.records.text import plain_text

_AT_ONCE = 500
"""Rows of a Parquet file that are held in memory."""


def export(completions: Iterable[StoredCompletion], path: Path, *, whole: bool) -> int:
    """Write completions to a file, which then is whole; how many they are. OutputError where it cannot be written.

    `whole`: all that is stored of them, one JSON object a line; else a dataset, JSONL, or Parquet if its name ends so.
    """
    arrow = None if whole or path.suffix != ".parquet" else _arrow(path)
    try:
        with path.open("wb") as file:
            if arrow is not None:
                return _write_parquet(map(as_row, completions), file, arrow)
            return _write_lines(completions if whole else map(as_row, completions), file)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error}") from None


def as_row(completion: StoredCompletion) -> dict[str, Any]:
    """A completion as a row of a dataset."""
    prompt: Any = completion.prompt
    said: Any = completion.text
    if (episode := completion.episode) is not None:
        prompt = list(episode.opening.messages) or _as_messages(prompt)
        said = [message for turn in episode.turns for message in (turn.answer.said, *turn.answer.messages) if message]
    elif isinstance(prompt, list):
        said = [{"role": "assistant", "content": said}]
    return {
        "prompt": prompt,
        "completion": said,
        "reward": completion.reward,
        "advantage": completion.advantage,
        "scores": completion.scores,
        "step": completion.step,
        "row": completion.row,
        "gid": completion.gid,
        "sample": completion.sample,
        "tokens": len(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "state": completion.state,
        "columns": completion.columns or {},
    }


def _as_messages(prompt: Any) -> list[dict[str, Any]]:
    return prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt or ""}]


def _write_lines(rows: Iterable[Any], file: BinaryIO) -> int:
    count = 0
    for row in rows:
        file.write(msgspec.json.encode(row) + b"\n")
        count += 1
    return count


def _arrow(path: Path) -> Any:
    try:
        importlib.import_module("pyarrow.parquet")
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise OutputError(
            f"{path}: writing Parquet needs the package pyarrow, which cannot be imported ({error}); "
            f"{remedy('parquet')}, or give a name that ends in .jsonl"
        ) from None


def _write_parquet(rows: Iterator[dict[str, Any]], file: BinaryIO, arrow: Any) -> int:
    """Rows of one kind: where the first has messages, all have, with `role` and `content` alone; scores and columns,
    which may differ from row to row, are JSON."""
    first = next(rows, None)
    talks = first is not None and isinstance(first["prompt"], list)
    schema = _schema(arrow, talks=talks)
    count = 0
    with arrow.parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        waiting = chain([] if first is None else [first], rows)
        while some := [_plain(row, talks=talks) for row in islice(waiting, _AT_ONCE)]:
            writer.write_table(arrow.Table.from_pylist(some, schema))
            count += len(some)
    return count


def _schema(arrow: Any, *, talks: bool) -> Any:
    message = arrow.struct([("role", arrow.string()), ("content", arrow.string())])
    text = arrow.list_(message) if talks else arrow.string()
    kinds = dict.fromkeys(("finish_reason", "state", "scores", "columns"), arrow.string())
    kinds |= dict.fromkeys(("reward", "advantage"), arrow.float64())
    kinds |= dict.fromkeys(("step", "row", "gid", "sample", "tokens"), arrow.int64())
    return arrow.schema([("prompt", text), ("completion", text), *kinds.items()])


def _plain(row: dict[str, Any], *, talks: bool) -> dict[str, Any]:
    plain = {**row, **{name: msgspec.json.encode(row[name]).decode() for name in ("scores", "columns")}}
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        text = row[name]
        if talks:
            messages = text if isinstance(text, list) else [{"role": role, "content": text or ""}]
            plain[name] = [
                {"role": plain_text(one.get("role", "")), "content": plain_text(one.get("content") or "")}
                for one in messages
            ]
        elif text is not None:
            plain[name] = plain_text(text)
    return plain
