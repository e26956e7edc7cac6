"""Progress for a person: a live display on a terminal (drawn by `display.py`), plain lines elsewhere."""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from troupe.messages import Activity, Evaluated, Finding, GroupClosed, Incident, Status, Update
from troupe.records.diagnosis import in_full
from troupe.records.held_out import Standings
from troupe.records.members import Comings
from troupe.records.sinks.base import RunInfo
from troupe.records.sinks.display import Display
from troupe.records.sinks.display_lines import shown_metrics
from troupe.runtime.outlets import Outlet, outlet_of
from troupe.runtime.terminal import arrows, one_line

_FRAMES_A_SECOND = 2
_SILENT_S, _SILENT_AMID_STEPS_S = 10.0, 60.0
"""Without a line, before one says what the run is at."""
_GATHER_S = 0.1
"""For how long lines that go above the display are collected."""
_MOST_LINES = 1000
"""That may wait for it."""
_LINES = 3
"""About incidents of one kind and actor, before the others are counted."""
_WINDOW_S = 10.0


class ConsoleSink:
    """Progress with time left, the newest metrics, queues, a completion and what went wrong; redrawn in place."""

    name = "console"
    takes: tuple[type, ...] = (Update, Evaluated, Incident, GroupClosed, Status)

    def __init__(self, run: RunInfo, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._display = Display(run, encoding=console.encoding, clock=clock)
        self._live = Live(
            get_renderable=lambda: self._display,
            console=console,
            refresh_per_second=_FRAMES_A_SECOND,
            transient=False,
            redirect_stdout=outlet_of(sys.stdout) is None,
            redirect_stderr=outlet_of(sys.stderr) is None,
        )
        self._above = _Above(console)

    def open(self) -> None:
        self._live.start()
        self._above.open()

    def write(self, message: object) -> None:
        self._display.add(message)

    def flush(self) -> None:
        """The display refreshes by itself."""

    def close(self) -> None:
        self._above.close()
        self._live.stop()


class _Above:
    """What others print while the display is drawn, line by line above it, where it would otherwise be drawn over."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lines: deque[str] = deque(maxlen=_MOST_LINES)
        self._left_out = 0
        self._some, self._over = threading.Event(), threading.Event()
        self._outlets: list[Outlet] = []
        self._thread: threading.Thread | None = None

    def open(self) -> None:
        self._outlets = [
            outlet
            for outlet in (outlet_of(sys.stdout), outlet_of(sys.stderr))
            if outlet is not None and os.isatty(outlet.descriptor)
        ]
        if self._outlets:
            self._thread = threading.Thread(target=self._run, name="troupe-above", daemon=True)
            self._thread.start()
        for outlet in self._outlets:
            outlet.divert(self._take)

    def close(self) -> None:
        for outlet in self._outlets:
            outlet.divert(None)
        self._over.set()
        self._some.set()
        if self._thread is not None:
            self._thread.join()
        self._show()  # what came while the thread wrote for the last time
        self._outlets, self._thread = [], None

    def _take(self, line: str) -> None:
        if len(self._lines) == _MOST_LINES:
            self._left_out += 1
        self._lines.append(line)
        self._some.set()

    def _run(self) -> None:
        while not self._over.is_set():
            self._some.wait()
            self._over.wait(_GATHER_S)
            self._some.clear()
            self._show()

    def _show(self) -> None:
        lines = [self._lines.popleft() for _ in range(len(self._lines))]
        left_out, self._left_out = self._left_out, 0
        if left_out:
            lines.insert(0, f"[{left_out} lines were left out: more came than can be shown]")
        if lines:
            self._console.print(Text("\n").join(map(Text.from_ansi, lines)), highlight=False)


class PlainSink:
    """Lines for logs and pipes: one a step, at most one every `interval_s` seconds; every evaluation; what the figures
    say is wrong, when that begins; every incident, those that come in numbers as a number; and what the run is at where
    no step is told of for long, as before the first one."""

    name = "console"
    takes: tuple[type, ...] = (Update, Evaluated, Incident, Status)

    def __init__(
        self, run: RunInfo, stream: TextIO, *, interval_s: float = 1.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._run, self._folder = run, run.typed
        self._stream, self._interval_s, self._clock = stream, interval_s, clock
        self._encoding = stream.encoding or "utf-8"
        self._last_s = self._said_s = float("-inf")
        self._has_stepped = False
        self._at = ""
        self._repeats = Repeats()
        self._comings = Comings()
        self._held_out = Standings(run.evaluated)
        self._found: frozenset[tuple[str, int]] = frozenset()

    def open(self) -> None:
        self._say(f"{self._run.name}: step {self._run.first_step} of {self._run.total_steps}, into {self._run.folder}")

    def write(self, message: object) -> None:
        """Print an update when the last line is old enough or the run is complete, and an incident at once."""
        now_s = self._clock()
        if isinstance(message, Incident):
            if self._repeats.is_told_alone(message, now_s):
                self._say(f"incident in {message.actor}: {message.message}")
        elif isinstance(message, Update):
            self._has_stepped = message.step < message.total_steps
            if now_s - self._last_s >= self._interval_s or message.step == message.total_steps:
                self._last_s = now_s
                figures = "  ".join(f"{label} {value}" for label, value in shown_metrics(message.metrics))
                self._say(f"step {message.step}/{message.total_steps}  {figures}")
            self._tell_findings(message.findings)
        elif isinstance(message, Evaluated):
            self._held_out.add(message)
            if (standing := self._held_out.sets.get(message.name)) is not None:
                self._say(arrows(f"evaluated {message.name}: {standing}", self._encoding))
        elif isinstance(message, Status):
            for line in self._comings.look(message.members):
                self._say(line)
            if message.activity is not None:
                self._tell_of(message.activity, now_s)
        for line in self._repeats.counted(now_s):
            self._say(f"incidents: {line}")

    def flush(self) -> None:
        """Every line is printed at once."""

    def close(self) -> None:
        """Say what was counted and not told; the stream belongs to the caller."""
        for line in self._repeats.counted(self._clock(), all_of_them=True):
            self._say(f"incidents: {line}")

    def _tell_findings(self, findings: Sequence[Finding]) -> None:
        """Each once when it begins, and once more when it begins again."""
        for finding in findings:
            if (finding.rule, finding.since) not in self._found:
                self._say(f"diagnosis: {in_full(finding, self._folder)}")
        self._found = frozenset((finding.rule, finding.since) for finding in findings)

    def _tell_of(self, activity: Activity, now_s: float) -> None:
        """Before the first step, and after the last, each thing once; what lasts, now and then."""
        silent_s = now_s - self._said_s
        is_new = activity.what != self._at and not self._has_stepped
        if is_new or silent_s >= (_SILENT_AMID_STEPS_S if self._has_stepped else _SILENT_S):
            self._at = activity.what
            self._say(activity.text)

    def _say(self, line: str) -> None:
        self._said_s = self._clock()
        print(one_line(line, self._encoding), file=self._stream, flush=True)


class Repeats:
    """Which incidents are worth a line each: the first of a kind at once, and of many like it how many there were.

    A judge that is away can make hundreds in a second. Nothing is lost by it: run.sqlite has every one.
    """

    def __init__(self) -> None:
        self._windows: dict[tuple[str, str], _Window] = {}

    def is_told_alone(self, incident: Incident, now_s: float) -> bool:
        """Whether this one is told by itself; it is not where the same was, or several of its kind, a moment ago."""
        window = self._windows.setdefault((incident.actor, incident.kind), _Window(now_s))
        if incident.message not in window.told and len(window.told) < _LINES:
            window.told.add(incident.message)
            return True
        window.left_out += 1
        window.newest = incident.message
        return False

    def counted(self, now_s: float, *, all_of_them: bool = False) -> list[str]:
        """A line for each kind of which some were left out, when it is time to say so."""
        lines = []
        for (actor, kind), window in list(self._windows.items()):
            if now_s - window.since_s < _WINDOW_S and not all_of_them:
                continue
            del self._windows[actor, kind]
            if window.left_out:
                times = f"{window.left_out:,} more {kind} in {actor} within {max(1.0, now_s - window.since_s):.0f} s"
                lines.append(f"{times}, the newest: {window.newest}")
                again = self._windows[actor, kind] = _Window(now_s)  # what goes on like this is told as a number
                again.told |= window.told
        return lines


class _Window:
    def __init__(self, since_s: float) -> None:
        self.since_s = since_s
        self.told: set[str] = set()
        self.left_out = 0
        self.newest = ""
