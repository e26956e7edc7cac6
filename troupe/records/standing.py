"""What the small files of a run folder say: how a run stands that does not answer, why, and what it came to."""

import re
import shlex
import time
from pathlib import Path
from typing import Any, Literal

import msgspec

from troupe.errors import InputError
from troupe.records.layout import LOG, METRICS, RUN_TOML, STORE, SUMMARY
from troupe.runtime.guardian import SILENT
from troupe.runtime.lock import read_owner

_CHECKPOINT = re.compile(r"step-(\d+)")

Fate = Literal["complete", "ended", "cut off", "not begun", "playing", "silent"]
"""ended: before its last step, on request; cut off: by a crash, a kill or a power cut; playing: by a process that does
not answer on a control socket; silent: the same, and its guardian says why."""


class Summary(msgspec.Struct):
    """What is read of `summary.json`, which `run/result.py` writes; every key may be missing."""

    steps: int = 0
    total_steps: int | None = None
    incidents: dict[str, int] = {}
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    rewards_before: dict[str, float] = {}
    rewards_after: dict[str, float] = {}
    stopped_early: str = ""


class Change(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A key that was set while a run went on; one line of `changes.jsonl`."""

    step: int
    """The first learner batch, counted from 0, that it holds for."""
    key: str
    value: Any


class Standing(msgspec.Struct, frozen=True, kw_only=True):
    """How a run stands that does not answer."""

    folder: str
    fate: Fate
    step: int
    """Steps that a resume would not make again."""
    total_steps: int | None
    """None where nothing says it."""
    checkpoint: str | None
    """The newest, by its name; whether it is whole is seen when it is read."""
    pid: int | None = None
    """Who has the folder, or had it when it died."""
    kept: bool = False
    """Whether a daemon kept it, which goes on with it."""
    reason: str | None = None
    """Why it does not answer; or, where it is complete before its last step, why."""


def read_standing(folder: Path) -> Standing:
    """What the files say. InputError where they are not those of a run, or cannot be read."""
    try:
        return _read_standing(folder)
    except OSError as error:
        raise InputError(f"{folder}: the folder cannot be read: {error}") from None


def _read_standing(folder: Path) -> Standing:
    if not folder.is_dir():
        raise InputError(f"{folder}: there is no such folder")
    owner = read_owner(folder)
    if not (folder / RUN_TOML).is_file() and owner is None:
        raise InputError(f"{folder}: there is no run.toml, so this is not the folder of a run")
    version, name = _newest(folder / "checkpoints")
    summary = read_summary(folder)
    of = None if summary is None else summary.total_steps
    step = max(version, 0)
    fate: Fate
    silence = silence_of(folder)
    if owner is not None and (owner.is_alive or not owner.is_here):
        fate = "playing" if silence is None else "silent"
    elif summary is not None and of is not None and summary.steps >= step:  # one that is older is of an earlier start
        fate, step = ("complete" if summary.steps >= of or summary.stopped_early else "ended"), summary.steps
    elif owner is None and name is None and not any((folder / file).exists() for file in (METRICS, STORE)):
        fate = "not begun"
    else:
        fate = "cut off"
    return Standing(
        folder=str(folder),
        fate=fate,
        step=step,
        total_steps=of,
        checkpoint=name,
        pid=None if owner is None else owner.pid,
        kept=(folder / LOG).is_file(),
        reason=_reason(fate, silence, summary),
    )


def _reason(fate: Fate, silence: "Silence | None", summary: Summary | None) -> str | None:
    if silence is not None and fate == "silent":
        return str(silence)
    early = "" if summary is None or fate != "complete" else summary.stopped_early
    return early or None


def describe_standing(found: Standing) -> str:
    """The same in words."""
    of = "" if found.total_steps is None else f" of {found.total_steps}"
    folder = shlex.quote(found.folder)
    newest = f"newest checkpoint: {found.checkpoint or 'none yet'}"
    go_on = f"go on with: troupe {f'daemon {folder}' if found.kept else f'train -o {folder} --resume'}"
    match found.fate:
        case "complete":
            early = f"; it ended early: {found.reason}" if found.reason else ""
            return f"complete: {found.step}{of} steps{early}"
        case "ended":
            return f"ended after step {found.step}{of}; {go_on}"
        case "playing":
            return (
                f"process {found.pid} runs here, but does not answer, which it cannot while it loads its model; "
                f"{newest}"
            )
        case "silent":
            return f"{found.reason}; {newest}; wait, or end it without saving: troupe stop {folder} --kill"
        case "not begun":
            return f"no step is done yet, and nobody is at it; {go_on}"
        case _:
            return f"cut off; {newest}; {go_on}"


def _newest(folder: Path) -> tuple[int, str | None]:
    found = [
        (int(match[1]), path.name)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _CHECKPOINT.fullmatch(path.name)) and (path / "MANIFEST.json").is_file()
    ]
    return max(found, default=(-1, None))


def read_summary(folder: Path) -> Summary | None:
    """What a run's summary says; None where there is none that can be read."""
    try:
        return msgspec.json.decode((folder / SUMMARY).read_bytes(), type=Summary)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


class Silence(msgspec.Struct, frozen=True):
    """Why a trainer does not answer."""

    pid: int
    """Of the trainer."""
    name: str
    """The reward that it is about; empty where it is something else."""
    reason: str
    """One sentence, without its end."""
    since: float
    """Unix time."""

    def __str__(self) -> str:
        return f"not answering for {max(0.0, time.time() - self.since):.0f} s: {self.reason}"

    @property
    def what(self) -> str:
        """What it is about, to be compared with what it was about before."""
        return self.name or self.reason


def silence_of(folder: Path, pid: int | None = None) -> Silence | None:
    """What is said of the trainer `pid`, or of whoever has the folder and lives; None where it answers, for all that is
    known. A guardian that was killed with its trainer has left what it said."""
    if pid is None:
        owner = read_owner(folder)
        pid = owner.pid if owner is not None and owner.is_alive else None
    try:
        found = msgspec.json.decode((folder / SILENT).read_bytes(), type=Silence)
    except (OSError, msgspec.MsgspecError):
        return None
    return found if found.pid == pid else None


def remedy(silence: Silence) -> str:
    """What helps, as the end of a sentence."""
    return 'run it in a process, which can be killed: rewards.run = ["process"]' if silence.name else "mend that"
