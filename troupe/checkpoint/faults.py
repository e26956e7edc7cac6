"""What it says of a checkpoint that a file of it cannot be read: damage, or a fault of the machine, which passes.

Damage is a reason to go on from an older checkpoint. What passes is none, for steps that are there would be lost.
"""

from __future__ import annotations

import errno

from troupe.errors import CheckpointError, RunError, TroupeError

_OF_THE_MACHINE = {
    errno.EMFILE: "allow more open files",
    errno.ENFILE: "allow more open files",
    errno.ENOMEM: "free memory",
    errno.ESTALE: "mount its file system again",
    errno.EACCES: "allow this user to read it",
}
"""Number of an OSError that says nothing of the file → what to do. EIO is not among them: the disk is damaged."""


def unreadable(told: str, error: Exception) -> TroupeError:
    """What to raise: CheckpointError for damage, otherwise RunError. `told`: which file, and what about it."""
    remedy = _OF_THE_MACHINE.get(getattr(error, "errno", None) or 0)
    if remedy is None:
        return CheckpointError(f"{told}: {error}; use an older checkpoint")
    return RunError(f"{told} now: {error}; that is no damage: {remedy} and resume")
