"""Environments and tools that tests of the manager act in, by the name of this module or file: they do what they are
told, and note each call in a file."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from troupe.environments import StepResult


def _note(line: str) -> None:
    with Path(os.environ["ACTING_NOTES"]).open("a", encoding="utf-8") as file:
        file.write(line + "\n")


def notes() -> list[str]:
    """What was noted."""
    path = Path(os.environ["ACTING_NOTES"])
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def forget() -> None:
    """Begin the notes anew."""
    Path(os.environ["ACTING_NOTES"]).unlink()


def away(is_away: bool) -> None:
    """Whether `Away` is."""
    file = Path(os.environ["ACTING_NOTES"] + ".away")
    file.touch() if is_away else file.unlink()


def _act(what: str) -> str:
    match what:
        case "hang":
            time.sleep(600)
        case "exit":
            os._exit(7)
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "raise":
            raise ValueError("no such thing")
        case "leave":
            sys.exit(3)
        case "flood":
            return "x" * 100_000_000
        case "garbage":
            for descriptor in range(3, 64):
                with suppress(OSError):
                    if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                        os.write(descriptor, b"\xff" * 64)
        case "away":
            raise ConnectionRefusedError("nobody is there")
    return what


class Counter:
    """Counts what is said to it."""

    made = 0

    def __init__(self) -> None:
        _note("made")
        self.total, self.words = 0, [""]
        self.hidden, self.marks = object(), {1}
        self._threads = {threading.get_ident()}

    def reset(self, start: int = 0, act: str = "", **columns: Any) -> str | None:
        """Begin."""
        _note(f"reset {start}")
        _act(act)
        self.total, self.words = start, []
        return f" from {start}"

    def step(self, text: str) -> StepResult:
        """Add one."""
        _note(f"step {text}")
        self._threads.add(threading.get_ident())
        self.words.append(_act(text))
        self.total += 1
        return StepResult(
            f"{self.total} {text}" if text != "flood" else self.words.pop(), 0.5, text == "stop", {"n": (1, 2)}
        )

    def add(self, number: int) -> int:
        """Add to the total.

        Args:
            number: what to add.
        """
        _note(f"add {number}")
        self.total += number
        return self.total

    def do(self, what: str) -> str:
        """Do what is said.

        Args:
            what: that is to be done.
        """
        _note(f"do {what}")
        return _act(what)

    async def later(self, what: str) -> str:
        """Do it later.

        Args:
            what: that is to be done.
        """
        _note(f"later {what}")
        await asyncio.sleep(0.01)
        if what == "hang":
            await asyncio.sleep(600)
        self.words.append(what)
        return f"{len(self.words)} {_act(what)}"

    async def get_reward(self) -> float:
        """The total."""
        _note("reward")
        return float(self.total)

    def close(self) -> None:
        """The end."""
        _note("close")


class Saving(Counter):
    """One that saves itself."""

    def save_state(self) -> dict[str, Any]:
        """All that it is."""
        return {"total": self.total, "words": self.words}

    def load_state(self, data: dict[str, Any]) -> None:
        """Be that."""
        _note("load")
        self.total, self.words = data["total"], data["words"]


class Once(Counter):
    """To be made anew for each episode."""

    reuse = False


class Changed(Counter):
    """Answers otherwise each time that it is begun."""

    def reset(self, start: int = 0, act: str = "", **columns: Any) -> str | None:
        """Begin."""
        return super().reset(start + len(notes()))


class Heavy(Counter):
    """One whose state is too large."""

    def save_state(self) -> bytes:
        """Too much."""
        return b"x" * 2_000_000

    def load_state(self, data: bytes) -> None:
        """Never called."""
        raise AssertionError


class Away(Counter):
    """Fails as a service that is away, as long as a file is there; may be asked again."""

    retries = True

    def reset(self, start: int = 0, act: str = "", **columns: Any) -> str | None:
        """Begin, or not."""
        if Path(os.environ["ACTING_NOTES"] + ".away").exists():
            raise ConnectionRefusedError("nobody is there")
        return super().reset(start)


class Again(Counter):
    """May be asked again, and takes its time."""

    retries = True

    def step(self, text: str) -> StepResult:
        """Slowly."""
        time.sleep(0.01)
        return super().step(text)


class AgainSaving(Again, Saving):
    """The same, which saves itself."""


class Flaky(Counter):
    """May be asked again, and answers every second time."""

    retries = True

    def step(self, text: str) -> StepResult:
        """Fail first."""
        self.words.append("try")
        if len(self.words) % 2:
            _note("flaky")
            raise ConnectionResetError("try again")
        return super().step(text)


def double(number: int) -> int:
    """Twice a number.

    Args:
        number: any.
    """
    _note(f"double {number}")
    return 2 * number


def act(what: str) -> str:
    """Do what is said.

    Args:
        what: that is to be done.
    """
    _note(f"act {what}")
    return _act(what)


async def wait(what: str) -> str:
    """Do it later.

    Args:
        what: that is to be done.
    """
    _note(f"wait {what}")
    await asyncio.sleep(600 if what == "hang" else 0.01)
    return _act(what)
