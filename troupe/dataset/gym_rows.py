"""The child's side of reasoning-gym's rows: make them, and print them as one JSON document.

`python -m troupe.dataset.gym_rows SOURCE` prints `{"rows": […]}` or `{"error": …}`; see `gym.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import importlib
import sys
from collections.abc import Iterator
from typing import Any

import msgspec

from troupe.dataset.gym import DEFAULTS, PREFIX
from troupe.dataset.queries import parsed, split_query
from troupe.errors import DatasetError


def make_rows(source: str) -> Iterator[dict[str, Any]]:
    """The rows of a source, as `gym.read_gym` describes them. DatasetError for what cannot be made."""
    name, texts = split_query(source)
    tasks = [task.strip() for task in name.removeprefix(PREFIX).split(",")]
    gym, known = importlib.import_module("reasoning_gym"), importlib.import_module("reasoning_gym.factory").DATASETS
    for task in tasks:
        if task not in known:
            close = difflib.get_close_matches(task, known, n=3)
            hint = f"did you mean {', '.join(close)}?" if close else f"there are {len(known)}, such as chain_sum"
            raise DatasetError(f"{source}: reasoning-gym has no task {task!r}; {hint}")
    if repeated := sorted({task for task in tasks if tasks.count(task) > 1}):
        raise DatasetError(f"{source}: the task {repeated[0]} is named twice; raise its size instead")
    options = _options(source, tasks, texts)
    for task in tasks:
        _check_names(source, tasks, task, options[task], known[task][1])
    entries = [_entries(source, gym, task, options[task]) for task in tasks]
    while entries:  # in turns, so that without shuffling a batch is mixed too
        for rows in list(entries):
            row = next(rows, None)
            if row is None:
                entries.remove(rows)
            else:
                yield row


def _options(source: str, tasks: list[str], texts: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Task → its options; `TASK.OPTION` wins over `OPTION`."""
    options = {task: dict(DEFAULTS) for task in tasks}
    own: list[tuple[str, str, Any]] = []
    for key, text in texts.items():
        task, dot, option = key.partition(".")
        try:
            value = parsed(text)
        except DatasetError as error:
            raise DatasetError(f"{source}: {key}: {error}") from None
        if not dot:
            for values in options.values():
                values[key] = value
        elif task in options:
            own.append((task, option, value))
        else:
            raise DatasetError(f"{source}: {key} is for the task {task!r}, which the source does not name")
    for task, option, value in own:
        options[task][option] = value
    for task, values in options.items():
        for key in ("size", "seed"):
            value, least = values[key], 1 if key == "size" else 0
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 2**63:
                raise DatasetError(f"{source}: {key} of {task} is {value!r}; give a whole number from {least} on")
    return options


def _check_names(source: str, tasks: list[str], task: str, options: dict[str, Any], config: Any) -> None:
    """Refuse options that the task's configuration does not have."""
    fields = [field.name for field in dataclasses.fields(config)]
    for key in options:
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(fields)}"
            another = f" (for one task alone, write TASK.{key}=…)" if len(tasks) > 1 else ""
            raise DatasetError(f"{source}: the task {task} has no option {key!r}; {hint}{another}")


def _entries(source: str, gym: Any, task: str, options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    try:
        dataset = gym.create_dataset(task, **options)
        for index in range(options["size"]):
            entry = dataset[index]
            yield {
                "prompt": str(entry["question"]),
                "answer": None if entry["answer"] is None else str(entry["answer"]),
                "task": task,
                "reasoning_gym": {"task": task, "options": options, "index": index},
            }
    except Exception as error:  # a task checks its options by assertions, and meets bad ones as it may
        shown = " ".join(str(error).split()) or type(error).__name__
        raise DatasetError(f"{source}: the task {task} refuses its options {options}: {shown}; correct them") from error


def main() -> None:
    """Print the rows of the source that the command line names."""
    answer: dict[str, Any]
    with contextlib.redirect_stdout(sys.stderr):  # whatever a task prints
        try:
            answer = {"rows": list(make_rows(sys.argv[1]))}
        except DatasetError as error:
            answer = {"error": str(error)}
    sys.stdout.buffer.write(msgspec.json.encode(answer))


if __name__ == "__main__":
    main()
