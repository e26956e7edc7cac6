"""Bus: what the hub and the workers of a run say to each other goes through here; `connection.py` has the real one.

All traffic is asked for by a worker: it sends a request to `RUN.hub.NAME.VERB` and reads one reply. What is large lies
in one stream in the server's memory, a message a subject below `RUN.w`, put there by the hub and read by all. Requests
may be lost, and replies too, so whoever asks asks again, and whoever serves must not mind being asked twice.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Literal, Protocol, TypeAlias

from troupe.errors import RunError

HUB = "hub"
"""The name of the run's own user; no worker has it."""
MAX_BYTES = 8 * 1024 * 1024
"""That a request, a reply or a stored message may have; the server refuses what is larger."""
CHUNK_BYTES = 4 * 1024 * 1024
"""Of something large, a message: a server takes its time for one, and others wait for it."""

Handler: TypeAlias = Callable[[str, bytes], Awaitable[bytes]]
"""(subject, data) → the reply. Where it raises, no reply is sent, and whoever asked will ask again."""
BusState: TypeAlias = Literal["connected", "lost", "refused", "untrusted"]
"""`refused`: the server is there and does not know this key (any more). `untrusted`: what answers there has no
certificate of this run."""
Why: TypeAlias = Literal["timeout", "nobody", "lost", "refused", "untrusted"]


class NoAnswer(Exception):  # noqa: N818 - it is what happens to every request now and then
    """Nothing came back: not in time, nobody serves the subject, or the connection is lost. Whether the request was
    read is not known."""

    def __init__(self, subject: str, why: Why, detail: str = "") -> None:
        super().__init__(f"{subject}: no answer ({why}){detail and ': ' + detail}")
        self.why = why


class TooLargeError(ValueError):
    """A message is longer than `MAX_BYTES`; it was not sent."""


class FullError(RunError):
    """The server does not store any more: its memory for that is full."""


class Bus(Protocol):
    """One end of the run's messages, usable from any asyncio loop."""

    @property
    def name(self) -> str:
        """Whose end this is: a worker's name, or `HUB`."""

    @property
    def epoch(self) -> int:
        """Grows when the server was found anew, with nothing stored in it; 0 until it is first there, then from 1."""

    @property
    def state(self) -> BusState:
        """Of the connection now; `lost` before the first one."""

    async def request(self, subject: str, data: bytes, *, timeout_s: float) -> bytes:
        """Ask, and wait for the reply; while the connection is lost, for that too. NoAnswer, TooLargeError."""

    def serve(self, subject: str, handler: Handler) -> AbstractAsyncContextManager[None]:
        """Answer requests to a subject, which may end in `.>`, within the block; each in a task of its own, on this
        event loop. Of one worker at most some dozens at a time: more are dropped. The hub only."""

    async def put(self, subject: str, data: bytes) -> None:
        """Store a message in place of an older one of its subject, below `RUN.w`; returns when it is stored. NoAnswer,
        TooLargeError, FullError. The hub only."""

    async def get(self, subject: str) -> bytes | None:
        """The message that is stored under a subject; None where there is none. NoAnswer."""

    async def purge(self, subject: str) -> None:
        """Forget what is stored under a subject, which may end in `.>`. NoAnswer. The hub only."""


def hub_subject(run: str, name: str, verb: str) -> str:
    """Where worker `name` asks the hub."""
    return f"{run}.{HUB}.{name}.{verb}"


def asked_subjects(run: str) -> str:
    """All that workers may ask, for `serve`."""
    return f"{run}.{HUB}.>"


def asker_of(subject: str) -> str:
    """The worker that asks on a subject of `asked_subjects`; the server lets nobody else ask there."""
    return subject.split(".")[2]


def stored_subject(run: str, *rest: str) -> str:
    """Where something is stored for all workers."""
    return ".".join((run, "w", *rest))


def inbox_of(name: str) -> str:
    """Below which replies to a worker come."""
    return f"_INBOX_{name}"


def checked_size(subject: str, data: bytes) -> None:
    """TooLargeError where a message may not be sent."""
    if len(data) > MAX_BYTES:
        raise TooLargeError(f"{subject}: a message of {len(data)} bytes; at most {MAX_BYTES} go through the server")
