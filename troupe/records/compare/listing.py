"""The runs below a folder, each at a glance: what it trains, how far it is, and what came of it.

Of each run little is read, so that hundreds take a second; whatever is damaged is said of the run and stops nothing.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from troupe.dataset import source_name
from troupe.errors import InputError, TroupeError
from troupe.messages import Evaluated
from troupe.records.compare.held_out import held_out_before
from troupe.records.compare.settings import settings_of
from troupe.records.evaluations import read_evaluations
from troupe.records.held_out import HeldOut, held_out_of
from troupe.records.layout import METRICS, RUN_TOML, STORE
from troupe.records.report.picture import STATES, State, planned_steps
from troupe.records.sinks.jsonl import decode_step
from troupe.records.standing import Standing, Summary, read_standing, read_summary
from troupe.records.store.glance import Glance
from troupe.records.store.read import open_store
from troupe.runtime.files import read_toml
from troupe.runtime.lock import read_owner

_DEEPEST = 3
"""Folders between the one that is looked through and a run."""
_RULE = "diagnosis/"
_TAIL_BYTES = 1 << 16
_NO_RUN = ("checkpoints", "final", "node_modules", "__pycache__")
"""Folders in which nobody keeps runs."""

Ends = tuple[float | None, float | None]
"""A figure at first and at last."""


class ListedRun(msgspec.Struct, frozen=True, kw_only=True):
    """A run at a glance; what nothing tells is None."""

    name: str
    """Its folder, from the one that was looked through."""
    folder: str
    state: State | None
    """None where the folder cannot be read."""
    step: int = 0
    """The newest that is done."""
    total_steps: int | None = None
    model: str | None = None
    data: str | None = None
    seed: int | None = None
    reward: Ends = (None, None)
    """Of the first and of the newest step."""
    trend: tuple[float, ...] = ()
    """Rewards of some steps, from the first to the newest."""
    held_out: Ends = (None, None)
    """On rows that are not trained on, by the first and by the newest evaluation: the first set's `held_out_metric`."""
    held_out_metric: str | None = None
    """`eval/SET/FIGURE`."""
    teacher_kl: Ends = (None, None)
    """Nats a token, where a teacher is learned from."""
    findings: tuple[str, ...] = ()
    """The rules of the diagnosis that hold at the newest step."""
    began_unix_s: float | None = None
    newest_unix_s: float | None = None
    """When something was written last."""
    seconds: float | None = None
    """For how long it was at work, all starts together."""
    note: str = ""
    """What else is to be known: a dead lock, or what of it is damaged."""


def find_runs(folder: Path) -> Iterator[Path]:
    """The run folders in a folder and the folders in it, or the folder itself, by name. InputError where it cannot be
    read."""
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder; give the one that your runs lie in")
    try:
        yield from _found(folder, _DEEPEST)
    except OSError as error:
        raise InputError(f"{folder}: the folder cannot be read: {error}") from None


def runs_meant(folders: Sequence[Path]) -> list[Path]:
    """The runs that are meant by these folders: one that is no run, but that runs lie in, stands for all of them."""
    return [run for folder in folders for run in (list(find_runs(folder)) if folder.is_dir() else []) or [folder]]


def _found(folder: Path, deeper: int) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        there = {entry.name: entry for entry in entries}
    if RUN_TOML in there or STORE in there:
        yield folder
        return
    for name in sorted(there) if deeper else ():
        if name.startswith(".") or name in _NO_RUN:
            continue
        try:
            if there[name].is_dir():
                yield from _found(folder / name, deeper - 1)
        except PermissionError:
            continue


def list_run(folder: Path, name: str) -> ListedRun:
    """The run in a folder, called `name`."""
    try:
        fate = read_standing(folder)
    except InputError as error:
        return ListedRun(name=name, folder=str(folder), state=None, note=str(error))
    notes: list[str] = []
    config = _config(folder, notes)
    ends, evaluations = _ends(folder, notes)
    summary = read_summary(folder) or Summary()
    step = max(ends.step, fate.step)
    sets = held_out_of(evaluations or read_evaluations(folder)) or held_out_before(
        summary if summary.steps >= step else Summary()
    )
    metric, held_out = _held_out(sets)
    model, data, seed = map(settings_of(config).get, ("model.path", "data.path", "seed"))
    notes += _standing_notes(folder, fate)
    return ListedRun(
        name=name,
        folder=str(folder),
        state=STATES[fate.fate],
        step=step,
        total_steps=planned_steps(fate, config, ends.step, ends.newest.get("epoch")),
        model=_model_name(model) if isinstance(model, str) else None,
        data=source_name(data) if isinstance(data, str) else None,
        seed=seed if isinstance(seed, int) else None,
        reward=(ends.first.get("reward"), ends.newest.get("reward")),
        trend=ends.rewards,
        held_out=held_out,
        held_out_metric=metric,
        teacher_kl=(ends.first.get("teacher/kl"), ends.newest.get("teacher/kl")),
        findings=tuple(
            name.removeprefix(_RULE) for name, held in ends.newest.items() if name.startswith(_RULE) and held
        ),
        began_unix_s=ends.began_unix_s,
        newest_unix_s=ends.newest_unix_s or _touched(folder),
        seconds=ends.seconds,
        note="; ".join(notes),
    )


def _config(folder: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return read_toml(folder / RUN_TOML)
    except TroupeError as error:
        notes.append(str(error))
        return {}


def _ends(folder: Path, notes: list[str]) -> tuple[Glance, list[Evaluated]]:
    """From the store, or else from the first and the last line of metrics.jsonl; and the store's evaluations."""
    if (folder / STORE).is_file():
        try:
            with open_store(folder) as run:
                return run.glance(), run.evaluations()
        except TroupeError as error:
            notes.append(str(error))
    try:
        with (folder / METRICS).open("rb") as file:
            first = decode_step(file.readline(_TAIL_BYTES))
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            told = [found for line in file.read().splitlines() if (found := decode_step(line)) is not None]
    except OSError:
        return Glance(), []
    if first is None or not told:
        return Glance(), []
    return Glance(first=first[1], newest=told[-1][1], step=told[-1][0]), []


def _held_out(sets: Mapping[str, HeldOut]) -> tuple[str | None, Ends]:
    """The first set's most telling figure, and what it was."""
    for name, held_out in sets.items():
        points = held_out.compared(held_out.headline)
        first = points[0].value if len(points) > 1 or not points[0].version else None
        return f"eval/{name}/{held_out.headline}", (first, points[-1].value)
    return None, (None, None)


def _standing_notes(folder: Path, fate: Standing) -> Iterator[str]:
    """Why it does not answer or ended early, and whose lock lies there."""
    if fate.reason is not None:
        yield fate.reason if fate.fate == "silent" else f"ended early: {fate.reason}"
    owner = read_owner(folder) if fate.pid is not None else None
    if owner is not None and not owner.is_here:
        yield f"process {owner.pid} of {owner.host} has it, which is not asked from here"
    elif owner is not None and fate.fate == "cut off":
        yield f"process {owner.pid} died and left its lock"


def _touched(folder: Path) -> float | None:
    """When the newest of the files that a run writes was written; unix seconds."""
    times = []
    for name in (METRICS, STORE, RUN_TOML):
        try:
            times.append((folder / name).stat().st_mtime)
        except OSError:
            continue
    return max(times, default=None)


def _model_name(path: str) -> str:
    """The model's folder; of a policy that a run made, that run's name before it."""
    parts = Path(path).parts
    own = next((at for at, part in enumerate(parts) if at and part in ("final", "checkpoints")), len(parts) - 1)
    return "/".join(parts[max(0, own - 1) :]) if own < len(parts) - 1 or parts[-1:] == ("final",) else parts[-1]
