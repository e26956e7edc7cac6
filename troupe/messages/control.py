"""What the outside may ask of a run while it plays."""

from __future__ import annotations

import msgspec


class Drain(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Control → Prompter: issue no further step; finish, checkpoint and flush what has been issued."""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Control → Learner: write a checkpoint at the end of the step in hand."""
