"""What workers and the run tell each other: msgpack structs, checked and bounded on both sides.

A worker asks, below `RUN.hub.NAME.VERB`, and is answered; nothing is sent to it unasked. What a kind of work says
within these frames (parts, calls) stands with that work, as bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Literal, TypeAlias

import msgspec

from troupe.runtime.frames import decoder

PROTOCOL = 1
"""Grows where what is said here changes its meaning."""
PIECE_BYTES = 4 * 1024 * 1024
"""Of a body, in one frame."""
MAX_PIECES = 64
"""Of one body."""
MAX_NAMES = 4096
"""Parts or calls that a worker may name in one beat."""
PULL_WAIT_S = 20.0
"""An ask for work is answered by then, with nothing where there is none."""
BEAT_S = 2.0
"""Seconds between two beats of a worker."""

Offer: TypeAlias = Literal["generate", "rewards", "environments"]
"""A kind of work that a worker does."""
RunState: TypeAlias = Literal["running", "paused", "ended"]
_Name: TypeAlias = Annotated[str, msgspec.Meta(max_length=200)]
_Text: TypeAlias = Annotated[str, msgspec.Meta(max_length=2000)]
_Names: TypeAlias = Annotated[tuple[_Name, ...], msgspec.Meta(max_length=MAX_NAMES)]


class Ask(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One frame of a worker: its body, or a piece of one that is too long for one frame."""

    session: _Name = ""
    """As it was admitted; empty with `hello`."""
    body: bytes = b""
    message: int = 0
    """Number of the body, one of a kind in its session, where it comes in pieces."""
    piece: Annotated[int, msgspec.Meta(ge=0, lt=MAX_PIECES)] = 0
    pieces: Annotated[int, msgspec.Meta(ge=1, le=MAX_PIECES)] = 1


class Whole(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """The answer to what was asked."""

    body: bytes = b""


class Incomplete(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """The answer waits for these pieces."""

    missing: tuple[int, ...]


class Unknown(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Nobody of this session is known here, as after another start of the run: say `hello`."""


class Wrong(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """What was asked is no message or may not be asked; asking it again would change nothing."""

    reason: str


class Declined(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """The worker is not taken, or has been put out."""

    reason: str
    later: bool = False
    """Whether it may be taken when it asks again in a while."""


class Over(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """The run has ended."""


Answer: TypeAlias = Whole | Incomplete | Unknown | Wrong | Declined | Over


class Facts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker computes with: what log-prob bits may depend on, in words."""

    troupe: _Text = ""
    mlx: _Text = ""
    device: _Text = ""
    blas: _Text = ""
    """Kernel of the matrix products, where there is one to name."""
    machine: _Text = ""


class Hello(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`hello`: who asks to work; answered with `Admitted`."""

    protocol: int = PROTOCOL
    instance: _Name
    """One of a kind for every start of a worker."""
    offers: Annotated[tuple[Offer, ...], msgspec.Meta(max_length=8)] = ("generate",)
    facts: Facts = Facts()
    details: Mapping[Offer, bytes] = {}
    """What a kind of work has to say, such as the rewards that are offered."""


class Admitted(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The worker may go on; each kind of work tells it how."""

    session: str
    state: RunState = "running"
    lease_s: float = 15.0
    """Its work goes to others so long after its last beat."""
    details: Mapping[Offer, bytes] = {}


class Beat(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`beat`, every `BEAT_S`: the worker is alive and has this in hand; answered with `Pulse`."""

    clock_s: float
    """Its `time.perf_counter` when it sends this."""
    held: Mapping[Offer, _Names] = {}
    """Names of the work in hand."""
    pulled: Mapping[Offer, int] = {}
    """Number of the newest pull that it has the answer of: what later ones gave it, it cannot name yet."""
    tokens_per_second: float | None = None
    version: int | None = None
    """Of the policy, that it holds."""
    doing: _Text = ""


class Pulse(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How the run stands."""

    state: RunState
    drop: Mapping[Offer, tuple[str, ...]] = {}
    """Of what the worker has in hand, what it need not do any more."""
    details: Mapping[Offer, bytes] = {}


class Bye(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`bye`: the worker goes, and what it had goes to others."""

    reason: _Text = ""


decode_ask: Callable[[bytes], Ask] = decoder(Ask, "a worker and the run")
decode_answer: Callable[[bytes], Answer] = decoder(Answer, "the run and a worker")
decode_hello: Callable[[bytes], Hello] = decoder(Hello, "a worker and the run")
decode_admitted: Callable[[bytes], Admitted] = decoder(Admitted, "the run and a worker")
decode_beat: Callable[[bytes], Beat] = decoder(Beat, "a worker and the run")
decode_pulse: Callable[[bytes], Pulse] = decoder(Pulse, "the run and a worker")
decode_bye: Callable[[bytes], Bye] = decoder(Bye, "a worker and the run")


def pieces_of(body: bytes, *, session: str, message: int) -> list[Ask]:
    """The frames that carry a body. ValueError for one that is too long."""
    pieces = max(1, -(-len(body) // PIECE_BYTES))
    if pieces > MAX_PIECES:
        raise ValueError(f"a message of {len(body):,} bytes is over the limit of {MAX_PIECES * PIECE_BYTES:,}")
    return [
        Ask(session=session, body=body[i * PIECE_BYTES :][:PIECE_BYTES], message=message, piece=i, pieces=pieces)
        for i in range(pieces)
    ]
