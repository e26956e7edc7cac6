"""Progress for a person: a live display on a terminal (drawn by `sinks/display.py`), plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.live import Live

from troupe.escapes import one_line
from troupe.messages import Activity, GroupClosed, Incident, Status, Update
from troupe.sinks.base import RunInfo
from troupe.sinks.display import Display, shown_metrics
from troupe.sinks.repeats import Repeats

_FRAMES_A_SECOND = 2
_SILENT_S, _SILENT_AMID_STEPS_S = 10.0, 60.0
"""Without a line, before one says what the run is at."""


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
    """Lines for logs and pipes: one a step, at most one every `interval_s` seconds; every incident, those that come in
    numbers as a number; and what the run is at where no step is told of for long, as before the first one."""

    name = "console"
    takes: tuple[type, ...] = (Update, Incident, Status)

    def __init__(self, run: RunInfo, stream: TextIO, *, interval_s: float = 1.0) -> None:
        self._run = run
        self._stream = stream
        self._interval_s = interval_s
        self._last_s = self._said_s = float("-inf")
        self._has_stepped = False
        self._at = ""
        self._repeats = Repeats()

    def open(self) -> None:
        """Say what begins."""
        self._say(f"{self._run.name}: step {self._run.first_step} of {self._run.total_steps}, into {self._run.folder}")

    def write(self, message: object) -> None:
        """Print an update when the last line is old enough or the run is complete, and an incident at once."""
        now_s = time.monotonic()
        if isinstance(message, Incident):
            if self._repeats.take(message, now_s):
                self._say(f"incident in {message.actor}: {message.message}")
        elif isinstance(message, Update):
            self._has_stepped = message.step < message.total_steps
            if now_s - self._last_s >= self._interval_s or message.step == message.total_steps:
                self._last_s = now_s
                figures = "  ".join(f"{label} {value}" for label, value in shown_metrics(message.metrics))
                self._say(f"step {message.step}/{message.total_steps}  {figures}")
        elif isinstance(message, Status) and message.activity is not None:
            self._tell_of(message.activity, now_s)
        for line in self._repeats.counted(now_s):
            self._say(f"incidents: {line}")

    def flush(self) -> None:
        """Every line is printed at once."""

    def close(self) -> None:
        """Say what was counted and not told; the stream belongs to the caller."""
        for line in self._repeats.counted(time.monotonic(), all_of_them=True):
            self._say(f"incidents: {line}")

    def _tell_of(self, activity: Activity, now_s: float) -> None:
        """Before the first step, and after the last, each thing once; what lasts, now and then."""
        silent_s = now_s - self._said_s
        is_new = activity.what != self._at and not self._has_stepped
        if is_new or silent_s >= (_SILENT_AMID_STEPS_S if self._has_stepped else _SILENT_S):
            self._at = activity.what
            self._say(activity.text)

    def _say(self, line: str) -> None:
        self._said_s = time.monotonic()
        print(one_line(line, self._stream.encoding or "utf-8"), file=self._stream, flush=True)
