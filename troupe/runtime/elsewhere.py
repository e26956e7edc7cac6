"""Work of a run that processes on other machines do: what they are to load, and how they are spoken to from here.

Code is never sent. Whoever has the other machine names what may run there; a run and it agree on a name and on the sum
of the file, wherever that lies.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import msgspec

from troupe.runtime.files import expanded

ServiceKind: TypeAlias = Literal["rewards", "environments"]


class Code(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Code by name: "FILE.py:NAME" without its folder, "MODULE:NAME", or one of our own names."""

    name: str
    sha256: str = ""
    """Of the file; empty where there is none to read."""

    @classmethod
    def of(cls, spec: str, *, is_ours: bool) -> Code:
        """What a name stands for on this machine; `is_ours`: whether it is a name of our own, without a file.

        Raises:
            OSError: where the file cannot be read.
        """
        if is_ours:
            return cls(spec)
        file, _, name = spec.rpartition(":")
        if file.endswith(".py"):
            path = expanded(file)
            return cls(f"{path.name}:{name}", _sum(path))
        return cls(spec, _sum_of_module(file))


class Service(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one process loads: a reward, under an empty name; or environments and tools."""

    kind: ServiceKind
    named: dict[str, Code] = {}
    """The reward; or environments by name, a single one under an empty name."""
    tools: tuple[Code, ...] = ()

    @property
    def code(self) -> tuple[Code, ...]:
        """All of it."""
        return (*self.named.values(), *self.tools)

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.kind}: {', '.join(code.name for code in self.code)}"


class Child(Protocol):
    """A process that is spoken to in frames of bytes, here (`process.ChildProcess`) or elsewhere."""

    @property
    def returncode(self) -> int | None:
        """None while it runs; then its exit code, or minus the signal that ended it."""

    async def send(self, frame: bytes) -> None:
        """Send one frame. FrameError where it is too long; BrokenResourceError where the process has ended."""

    async def receive(self) -> bytes:
        """The next frame; EndOfStream where none will come, which tells how the process ended."""

    def kill(self) -> None:
        """Kill it. Returns at once."""

    async def aclose(self, grace_s: float | None = None) -> None:
        """Have it end, and killed where it has not within the grace."""

    def how_it_ended(self) -> str:
        """For an error message."""


class DistantChild(Child, Protocol):
    """One on another machine."""

    @property
    def is_away(self) -> bool:
        """Whether its machine is lost, or does not answer now: a call that got no answer has met no fault of its
        own."""

    def accuse(self, why: str) -> None:
        """It has answered what it must not: its machine gets no more such work when that happens again."""


class Elsewhere(Protocol):
    """Where processes on other machines are to be had."""

    async def open(self, service: Service, waits: Callable[[str | None], None]) -> DistantChild:
        """A process that has begun to load this, as its first frame will tell. Waits as long as nobody offers it;
        `waits` is called with why, and with None when the wait is over."""


def _sum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _sum_of_module(name: str) -> str:
    try:
        found = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return ""
    origin = None if found is None or not found.has_location else found.origin
    return "" if origin is None else _sum(Path(origin))
