"""Progress for a person: a live display on a terminal (drawn by `sinks/display.py`), plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.live import Live

from troupe.messages import GroupClosed, Incident, Status, Update
from troupe.sinks.base import RunInfo
from troupe.sinks.display import Display, shown_metrics

_FRAMES_A_SECOND = 2


class ConsoleSink:
    """Progress with time left, the newest metrics, queues, a completion and what went wrong; redrawn in place."""

    name = "console"
    takes: tuple[type, ...] = (Update, Incident, GroupClosed, Status)

    def __init__(self, run: RunInfo, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._display = Display(run, encoding=console.encoding, clock=clock)
        self._live = Live(
            get_renderable=lambda: self._display,
            console=console,
            refresh_per_second=_FRAMES_A_SECOND,
            transient=False,
        )

    def open(self) -> None:
        """Start the live display."""
        self._live.start()

    def write(self, message: object) -> None:
        """Take over what is new; the display refreshes by itself."""
        self._display.take(message)

    def flush(self) -> None:
        """The display refreshes by itself."""

    def close(self) -> None:
        """Draw the last state and give the terminal back."""
        self._live.stop()


class PlainSink:
    """One line a step, at most one every `interval_s` seconds, and every incident: for logs and pipes."""

    name = "console"
    takes: tuple[type, ...] = (Update, Incident)

    def __init__(self, run: RunInfo, stream: TextIO, *, interval_s: float = 1.0) -> None:
        self._run = run
        self._stream = stream
        self._interval_s = interval_s
        self._last_s = float("-inf")

    def open(self) -> None:
        """Say what begins."""
        self._say(f"{self._run.name}: step {self._run.first_step} of {self._run.total_steps}, into {self._run.folder}")

    def write(self, message: object) -> None:
        """Print an update when the last line is old enough or the run is complete, and any incident at once."""
        if isinstance(message, Incident):
            self._say(f"incident in {message.actor}: {message.message}")
        elif isinstance(message, Update):
            now_s = time.monotonic()
            if now_s - self._last_s >= self._interval_s or message.step == message.total_steps:
                self._last_s = now_s
                figures = "  ".join(f"{label} {value}" for label, value in shown_metrics(message.metrics))
                self._say(f"step {message.step}/{message.total_steps}  {figures}")

    def flush(self) -> None:
        """Every line is printed at once."""

    def close(self) -> None:
        """Nothing is held open: the stream belongs to the caller."""

    def _say(self, line: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        print(line.encode(encoding, errors="backslashreplace").decode(encoding), file=self._stream, flush=True)
