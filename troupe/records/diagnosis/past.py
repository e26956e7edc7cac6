"""The diagnosis of a run that is there already, from what its folder has of the steps."""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from troupe.errors import InputError
from troupe.messages import Finding
from troupe.records.diagnosis.watch import Diagnosis
from troupe.records.evaluations import read_evaluations
from troupe.records.layout import METRICS, RUN_TOML, STORE
from troupe.records.sinks.jsonl import decode_step
from troupe.records.store.read import open_store
from troupe.runtime.files import read_toml


def begin_again(config: Mapping[str, Any], folder: Path, step: int) -> Diagnosis:
    """That of a run that goes on after a step: as if it had watched all steps up to it. What cannot be read is left
    out."""
    diagnosis = awaiting(config, folder, step) if step else Diagnosis(config)
    if step:
        with suppress(InputError, OSError):
            for number, metrics in _steps(folder):
                if number > step:
                    break
                diagnosis.add(number, metrics)
    return diagnosis


def diagnose(folder: str | Path) -> tuple[Finding, ...]:
    """What the figures of the run in a folder say is wrong with it: findings that hold, the most serious first, and
    behind them those that are over (`until`). InputError where there is no run, or its steps cannot be read."""
    folder = Path(folder)
    if not (folder / RUN_TOML).is_file():
        raise InputError(f"{folder}: there is no {RUN_TOML}, so this is not the folder of a run")
    diagnosis = awaiting(read_toml(folder / RUN_TOML), folder)
    try:
        for number, metrics in _steps(folder):
            diagnosis.add(number, metrics)
    except OSError as error:
        raise InputError(f"{folder}: the steps cannot be read: {error}") from None
    return diagnosis.all_findings


def awaiting(config: Mapping[str, Any], folder: Path, newest: float = math.inf) -> Diagnosis:
    """One that knows of the run's evaluations, up to a version, and of no step yet."""
    diagnosis = Diagnosis(config)
    for told in read_evaluations(folder):
        if told.version <= newest:
            diagnosis.add_evaluation(told.version, told.metrics)
    return diagnosis


def _steps(folder: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Number and metrics of each step, in order, from metrics.jsonl, or where there is none from run.sqlite."""
    if (folder / METRICS).is_file():
        with (folder / METRICS).open("rb") as lines:
            for line in lines:
                if (told := decode_step(line)) is not None:
                    yield told
    elif (folder / STORE).is_file():
        with open_store(folder) as run:
            for step in run.steps():
                yield step.step, step.metrics
