"""Rows of reasoning-gym's tasks, which a seed makes; needs the extra `reasoning-gym`.

They are made in a process of their own (`gym_rows.py`) in which texts have the same hashes each time: some tasks draw
from sets, and would be others in every start. Knows nothing of rewards: they find in the column `reasoning_gym` which
entry a row is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import msgspec

from troupe.errors import DatasetError
from troupe.installing import remedy

PREFIX = "reasoning_gym:"
DEFAULTS: dict[str, Any] = {"size": 500, "seed": 0}
"""Of every task; the library's own seed differs each time."""

_TOLD = 2000  # characters of what a process said before it died


def read_gym(source: str) -> Iterator[tuple[None, dict[str, Any]]]:
    """The rows of `reasoning_gym:TASK,TASK?size=500&seed=0&OPTION=VALUE&TASK.OPTION=VALUE`.

    Each task gives `size` rows, and the rows of several take turns. `OPTION` is one of the task's configuration.
    Columns: `prompt`, `answer` (a text), `task`, and `reasoning_gym`, an object with `task`, `options` and `index`,
    from which the entry can be made once more.

    Raises:
        DatasetError: for an unknown task or option, or a value that the task refuses.
    """
    if find_spec("reasoning_gym") is None:
        raise DatasetError(
            f"{source}: its tasks need the package reasoning-gym, which is missing; {remedy('reasoning-gym')}"
        )
    path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)])
    child = subprocess.run(
        [sys.executable, "-P", "-m", "troupe.dataset.gym_rows", source],
        env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "0"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    try:
        answer = msgspec.json.decode(child.stdout)
    except msgspec.DecodeError:
        said = child.stderr.decode(errors="replace").strip()[-_TOLD:]
        raise DatasetError(
            f"{source}: the process that makes the rows ended with code {child.returncode}: {said or 'it said nothing'}"
        ) from None
    if "error" in answer:
        raise DatasetError(answer["error"])
    return ((None, row) for row in answer["rows"])
