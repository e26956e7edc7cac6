"""What `troupe worker` shows: a line that is drawn anew on a terminal; lines of what changes where there is none."""

import shutil
import sys
import time
from collections.abc import Callable

import anyio
import click

from troupe.run.worker.session import Worker
from troupe.runtime.terminal import one_line, tell

_DRAWN_EVERY_S = 0.5
_SAID_EVERY_S = 60.0
_CLEAR = "\r\x1b[2K"


class Lines:
    """One line of now, below lines of what has happened."""

    def __init__(self, *, on_terminal: bool | None = None, clock: Callable[[], str] | None = None) -> None:
        """`on_terminal`: whether the line of now is drawn anew; None: where the output is a terminal. `clock`: the time
        of day that lines begin with."""
        self._on_terminal = sys.stdout.isatty() if on_terminal is None else on_terminal
        self._clock = clock or (lambda: time.strftime("%H:%M:%S"))
        self._drawn = False

    def say(self, text: str) -> None:
        """A line of what has happened; stays."""
        self._wipe()
        tell(f"{self._clock()} {text}")

    async def follow(self, worker: Worker) -> None:
        """Show what the worker does until cancelled."""
        said, said_s = "", 0.0
        while True:
            if self._on_terminal:
                self._draw(now_line(worker))
                await anyio.sleep(_DRAWN_EVERY_S)
                continue
            doing = state_of(worker)
            if (doing != said and time.monotonic() - said_s >= 1.0) or time.monotonic() - said_s > _SAID_EVERY_S:
                said, said_s = doing, time.monotonic()
                tell(f"{self._clock()} {now_line(worker)}")
            await anyio.sleep(_DRAWN_EVERY_S)

    def end(self) -> None:
        """Nothing more is drawn."""
        self._wipe()

    def _draw(self, line: str) -> None:
        width = max(20, shutil.get_terminal_size().columns - 1)
        shown = one_line(line)
        click.echo(_CLEAR + (shown if len(shown) <= width else shown[: width - 1] + "…"), nl=False)
        self._drawn = True

    def _wipe(self) -> None:
        if self._drawn:
            click.echo(_CLEAR, nl=False)
            self._drawn = False


def state_of(worker: Worker) -> str:
    """What a worker is at, in a word or some."""
    if worker.link.connection == "untrusted":
        return "what answers at the run's address has no certificate of this run; waiting for the run's own server"
    if worker.link.connection != "connected":
        return "waiting for the run's server"
    if worker.link.away_since_s is not None:
        return f"waiting for the run, for {time.monotonic() - worker.link.away_since_s:.0f} s"
    if worker.state is None:
        return "asking to be taken"
    doing = "; ".join(work.doing for work in worker.works if work.doing)
    if doing:
        return doing
    if worker.state == "paused":
        return "the run is paused"
    return "working" if any(work.held for work in worker.works) else "waiting for work"


def now_line(worker: Worker) -> str:
    """The line of now, what matters most first: a narrow terminal shows its beginning."""
    parts = [f"{worker.link.name}: {state_of(worker)}"]
    paces = [work.tokens_per_second for work in worker.works if work.tokens_per_second is not None]
    if paces:
        parts.append(f"{sum(paces):,.0f} tokens/s")
    parts += [said for work in worker.works if (said := work.summary)]
    versions = [work.version for work in worker.works if work.version is not None]
    if versions:
        parts.append(f"version {max(versions)}")
    held = [name for work in worker.works for name in work.held]
    if held:
        more = f" and {len(held) - 1} more" if len(held) > 1 else ""
        parts.append(f"part {held[0]}{more}")
    return " · ".join(parts)
