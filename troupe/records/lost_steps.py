"""Steps that a run's files told of when a checkpoint was written, and that they do not tell of any more."""

from collections.abc import Collection, Iterable, Mapping
from itertools import count, groupby
from pathlib import Path

from troupe.records.layout import METRICS, STORE
from troupe.records.sinks.jsonl import steps_in
from troupe.records.store.write import stored_steps

_FILES = {"jsonl": (METRICS, steps_in), "sqlite": (STORE, stored_steps)}
"""Sink → its file in the run folder, and who reads which steps are in it."""


def lost_steps(folder: Path, version: int, lacking: Mapping[str, int], sinks: Collection[str]) -> list[str]:
    """What the user should know of files that were cut, removed or exchanged since the checkpoint of `version`.

    `lacking`: sink → steps up to there that its file lacked already; of others nothing is known. `sinks`: those of this
    start. Nothing is told of a file that cannot be read now.
    """
    told = []
    for sink in (name for name in _FILES if name in lacking and name in sinks):
        name, read = _FILES[sink]
        try:
            there = read(folder / name, version)
        except OSError:
            continue
        if len(there) < version - lacking[sink]:
            missing = _ranges(step for step in range(1, version + 1) if step not in there)
            told.append(
                f"{folder / name}: of the {version} steps that are done it lacks {missing}, which it had, or was "
                "about to get, when the checkpoint was written: it was cut, removed or exchanged since, or its disk "
                "failed then. The run goes on, for its weights are whole; what was told of these steps is lost"
            )
    return told


def _ranges(steps: Iterable[int]) -> str:
    """1, 2, 3, 7 → 1-3, 7."""
    numbers = count()
    runs = [list(run) for _, run in groupby(steps, key=lambda step: step - next(numbers))]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
