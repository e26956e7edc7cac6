"""What a run and a worker say about rewards and environments that run there: processes that the run has begun there and
speaks to in frames, as to those on its own machine.

The run never asks: the worker's `call.pull`, which waits, brings what is to be begun, said or ended; its `call.done`
takes what a process answered. Both are numbered, so that either may be lost and asked again.
"""

from collections.abc import Callable
from typing import Annotated, TypeAlias

import msgspec

from troupe.runtime.elsewhere import Code, Service, ServiceKind
from troupe.runtime.frames import decoder

PULL = "call.pull"
DONE = "call.done"
WAIT_S = 2.0
"""A pull is answered by then, with nothing where there is nothing."""
PIECE_BYTES = 1024 * 1024
PIECES_A_TIME = 4
"""That one answer to a pull brings of all frames together."""
MOST_BYTES = 64 * 1024 * 1024
"""Of a frame, either way."""
MOST_SESSIONS = 64
"""Processes of one worker."""

_Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=100)]


class Offered(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """In `Hello.details`: what of a kind the worker's owner lets run there."""

    troupe: Annotated[str, msgspec.Meta(max_length=100)]
    """Its version."""
    code: Annotated[tuple[Code, ...], msgspec.Meta(max_length=256)] = ()
    tools: Annotated[tuple[Code, ...], msgspec.Meta(max_length=256)] = ()


class Pull(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`call.pull`: what is to be done? Answered with `Orders`."""

    kind: ServiceKind
    number: int
    """Of a worker's session, growing: an older one that comes late is not listened to."""
    sessions: Annotated[dict[_Name, int], msgspec.Meta(max_length=2 * MOST_SESSIONS)] = {}
    """Every process in hand → pieces of frames that have come for it."""


class Begin(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Begin a process that loads this."""

    session: str
    service: Service


class Piece(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A piece of a frame for a process; the first of all has number 0."""

    session: str
    number: int
    data: bytes
    is_last: bool
    """Of its frame."""


class Orders(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is to be done; may come twice."""

    begin: tuple[Begin, ...] = ()
    pieces: tuple[Piece, ...] = ()
    end: dict[str, float] = {}
    """Processes that nobody needs any more → seconds that they may take to end; 0: they are to be killed."""

    @property
    def are_none(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.begin or self.pieces or self.end)


class Done(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`call.done`: a process has answered, or has ended."""

    kind: ServiceKind
    session: _Name
    number: int
    """From 0, one more for each."""
    frame: bytes | None = None
    """None: it has ended."""
    code: int = 0
    """Its exit code, or minus the signal that ended it."""
    how: Annotated[str, msgspec.Meta(max_length=10_000)] = ""


decode_offered: Callable[[bytes], Offered] = decoder(Offered, "a worker and the run")
decode_pull: Callable[[bytes], Pull] = decoder(Pull, "a worker and the run")
decode_orders: Callable[[bytes], Orders] = decoder(Orders, "the run and a worker")
decode_done: Callable[[bytes], Done] = decoder(Done, "a worker and the run")
