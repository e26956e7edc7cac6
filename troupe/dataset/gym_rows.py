"""The child's side of reasoning-gym's rows: make them, and print them as one JSON document.

`python -m troupe.dataset.gym_rows SOURCE [FIRST]` prints `{"rows": […], "in_all": N}` or `{"error": …}`, and before it
lines that say how far it is; see `gym.py`. It ends with who started it.
"""

import contextlib
import dataclasses
import difflib
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import msgspec

from troupe.dataset.gym import DEFAULTS, MADE, PREFIX
from troupe.dataset.query import parse_value, split_query
from troupe.errors import DatasetError
from troupe.runtime.process import end_with_parent

_EVERY_S = 1.0  # between two lines about how far it is


def make_rows(source: str, on_count: Callable[[int], None] = lambda in_all: None) -> Iterator[dict[str, Any]]:
    """The rows of a source, as `gym.read_gym` describes them; `on_count` is told how many there will be, before the
    first. DatasetError for what cannot be made."""
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
    on_count(sum(options[task]["size"] for task in tasks))
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
            value = parse_value(text)
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
    """Print the rows of the source that the command line names, or the first few of them."""
    answer: dict[str, Any]
    out = sys.stdout.buffer
    counts: list[int] = []
    first = int(sys.argv[2]) if len(sys.argv) > 2 else None
    with contextlib.redirect_stdout(sys.stderr):  # whatever a task prints
        try:
            rows, told_s = [], time.monotonic()
            for row in islice(make_rows(sys.argv[1], counts.append), first):
                rows.append(row)
                if time.monotonic() - told_s >= _EVERY_S:
                    told_s = time.monotonic()
                    out.write(MADE + f"{len(rows)} {counts[0]}\n".encode())
                    out.flush()
            answer = {"rows": rows, "in_all": counts[0]}
        except DatasetError as error:
            answer = {"error": str(error)}
    out.write(msgspec.json.encode(answer))


if __name__ == "__main__":
    end_with_parent(sys.stdin.fileno())
    main()
