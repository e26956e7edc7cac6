"""What a trainer's guardian says of a run that does not answer, as it stands in the run folder."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

from troupe.runtime.guardian import SILENT
from troupe.runtime.lock import read_owner


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
