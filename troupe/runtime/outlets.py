"""Output that never makes whoever writes wait: a reader who has gone to sleep (`troupe train | sleep 1000`, Ctrl-S in a
terminal) must not hold up a run.

`unhurried()` exchanges `sys.stdout` and `sys.stderr` for streams of which a thread each takes what was written to the
real ones. Of what nobody reads the oldest is left out, and counted. While a display is drawn, what others write goes
above it line by line. Quick to import.
"""

import io
import os
import queue
import select
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TextIO

MOST_BYTES = 1 << 20
"""That may wait for a reader."""
PATIENCE_S = 5.0
"""At the end, with a reader who takes nothing."""
_NO_PATIENCE_S = 0.5
_MOST_PIECES = 1000
_PIECE = 4096
"""Bytes in one write: a pipe that has room for any takes so many at once."""
_LONGEST_LINE = 16 * 1024

Above = Callable[[str], None]


class Outlet:
    """What waits to be written to one descriptor, and the thread that writes it."""

    def __init__(self, descriptor: int, most_bytes: int = MOST_BYTES) -> None:
        self.descriptor = descriptor
        self.left_out = 0
        """Pieces that nobody has read in time."""
        self._most_bytes = most_bytes
        self._change = threading.Condition()
        self._waiting: deque[bytes] = deque()
        self._bytes = self._written = 0
        self._untold = 0  # left out since it was last told
        self._busy = self._closing = self._gone = False
        self._above: Above | None = None
        self._open: dict[int, bytes] = {}  # lines that a thread has begun, while they go above a display
        self._is_fork = False
        self._thread = threading.Thread(target=self._run, name=f"troupe-output-{descriptor}", daemon=True)
        self._thread.start()
        _OUTLETS.add(self)

    def put(self, data: bytes) -> None:
        """Have it written. Never waits, but in a process that was forked off: that one has no thread for it."""
        if self._is_fork:
            self._write_straight(data)
            return
        with self._change:
            if self._gone or not data:
                return
            self._waiting.append(data)
            self._bytes += len(data)
            while self._bytes > self._most_bytes and len(self._waiting) > 1:
                self._bytes -= len(self._waiting.popleft())
                self.left_out += 1
                self._untold += 1
            self._change.notify_all()

    def put_above(self, data: bytes) -> None:
        """Have it written by itself, or above the display that is there."""
        with self._change:
            if self._above is None:
                self.put(data)
                return
            thread = threading.get_ident()
            *lines, rest = (self._open.pop(thread, b"") + data).split(b"\n")
            if len(rest) > _LONGEST_LINE:  # a bar of progress, say, that is drawn over itself and never ends
                lines.append(rest)
            elif rest:
                self._open[thread] = rest
            for line in lines:
                self._above(line.decode(errors="replace"))

    def divert(self, above: Above | None) -> None:
        """Give every line that comes by `put_above` to `above`, which must not wait; None: no longer."""
        with self._change:
            begun, self._open = (self._open if above is None else {}), {}
            self._above = above
            for rest in begun.values():
                self.put(rest)

    def leave_display(self) -> None:
        """Show the cursor, which a display that is drawn had hidden, and will not be ended."""
        with self._change:
            if self._above is not None:
                self.put(b"\x1b[?25h")

    def forget_in_child(self) -> None:
        """In a process that was forked off: what waits is its parent's, and its threads and locks are not here."""
        self._is_fork, self._above = True, None
        self._change = threading.Condition()
        self._waiting, self._open, self._busy = deque(), {}, False

    def close(self, patience_s: float = PATIENCE_S) -> bool:
        """Wait until all is written, or nothing of it for `patience_s`; the thread ends when it can. Whether it was."""
        with self._change:
            self._closing = True
            self._change.notify_all()
            written = -1
            while (self._waiting or self._busy) and written != self._written:
                written = self._written
                self._change.wait_for(partial(self._has_moved, written), patience_s)
            done = not (self._waiting or self._busy)
            self._gone = True
            self._waiting.clear()
            self._change.notify_all()
        return done

    def _has_moved(self, written: int) -> bool:
        return self._written != written or not (self._waiting or self._busy)

    def _run(self) -> None:
        while (piece := self._next()) is not None:
            try:
                while piece:
                    piece = piece[self._write(piece[:_PIECE]) :]
                    with self._change:
                        self._written += 1
                        self._change.notify_all()
            except OSError:  # a reader who has gone (`troupe … | head`, a terminal that was closed)
                with self._change:
                    self._gone = True
                    self._waiting.clear()
            with self._change:
                self._busy = False
                self._change.notify_all()

    def _write_straight(self, data: bytes) -> None:
        with suppress(OSError):
            while data:
                data = data[self._write(data[:_PIECE]) :]

    def _write(self, piece: bytes) -> int:
        try:
            return os.write(self.descriptor, piece)
        except BlockingIOError:  # whoever shares the terminal may have said that it never waits
            select.select([], [self.descriptor], [])
            return 0

    def _next(self) -> bytes | None:
        with self._change:
            self._change.wait_for(lambda: self._waiting or self._closing or self._gone)
            if not self._waiting:
                return None
            self._busy = True
            if self._untold:
                told, self._untold = self._untold, 0
                return f"\n[{told} pieces of output were left out: nobody has read them in time]\n".encode()
            piece = self._waiting.popleft()
            self._bytes -= len(piece)
            return piece


_OUTLETS: weakref.WeakSet[Outlet] = weakref.WeakSet()


def _forget_in_child() -> None:
    for outlet in tuple(_OUTLETS):
        outlet.forget_in_child()


os.register_at_fork(after_in_child=_forget_in_child)


class _Raw(io.RawIOBase):
    """An outlet as a file; `own`: the display's, which nothing goes above of."""

    def __init__(self, outlet: Outlet, *, own: bool = False) -> None:
        self.outlet = outlet
        self._put = outlet.put if own else outlet.put_above

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        piece = bytes(data)
        self._put(piece)
        return len(piece)

    def fileno(self) -> int:
        return self.outlet.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.outlet.descriptor)


def _stream(outlet: Outlet, like: TextIO, *, own: bool = False) -> TextIO:
    raw: Any = _Raw(outlet, own=own)  # unbuffered, as with `python -u`
    return io.TextIOWrapper(raw, like.encoding, like.errors or "replace", newline="\n", write_through=True)


def outlet_of(stream: TextIO | None) -> Outlet | None:
    """The outlet behind a stream, if there is one."""
    raw = getattr(stream, "buffer", None)
    return raw.outlet if isinstance(raw, _Raw) else None


def of_a_display(stream: TextIO) -> TextIO:
    """A stream to the same place, for what draws there itself."""
    outlet = outlet_of(stream)
    return stream if outlet is None else _stream(outlet, stream, own=True)


@contextmanager
def unhurried(patience_s: float = PATIENCE_S) -> Iterator[None]:
    """In the body nobody waits for a reader of `sys.stdout` and `sys.stderr`. A stream that is no file is left as it
    is. At the end what is left is written, if somebody reads it."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    outlets: list[Outlet] = []
    for name, stream in before.items():
        with suppress(OSError, ValueError, AttributeError):  # a stand-in, closed, or none
            stream.flush()
            outlet = Outlet(stream.fileno())
            outlets.append(outlet)
            setattr(sys, name, _stream(outlet, stream))
    try:
        yield
    finally:
        _finish(outlets, patience_s)
        for name, stream in before.items():
            setattr(sys, name, stream)


def finish(patience_s: float = PATIENCE_S) -> None:
    """Have everything written, if somebody reads it, before the process ends at once."""
    outlets = [outlet for outlet in map(outlet_of, (sys.stdout, sys.stderr)) if outlet is not None]
    for outlet in outlets:
        outlet.leave_display()
    _finish(outlets, patience_s)


def _finish(outlets: Sequence[Outlet], patience_s: float) -> None:
    for outlet in outlets:
        outlet.divert(None)
        if not outlet.close(patience_s):
            patience_s = min(patience_s, _NO_PATIENCE_S)  # mostly nobody reads the other one either


class Aside:
    """Passes on to `sys.stderr` what others print, for an event loop that must not wait: where nobody has made that
    stream `unhurried`, a thread writes. Of what is too much the newest is left out."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[str] = queue.Queue(_MOST_PIECES)
        self._thread: threading.Thread | None = None

    def write(self, text: str) -> None:
        """Have it written. Never waits."""
        if outlet_of(sys.stderr) is not None:
            sys.stderr.write(text)
            return
        with suppress(queue.Full):
            self._waiting.put_nowait(text)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="troupe-aside", daemon=True)
            self._thread.start()

    @property
    def is_behind(self) -> bool:
        """Whether something is not written yet."""
        return self._waiting.unfinished_tasks > 0

    def settle(self, patience_s: float) -> None:
        """Wait until everything is written, or so long."""
        with self._waiting.all_tasks_done:
            self._waiting.all_tasks_done.wait_for(lambda: not self._waiting.unfinished_tasks, patience_s)

    def _run(self) -> None:
        while True:
            text = self._waiting.get()
            with suppress(OSError, ValueError, AttributeError):  # nobody may be there to read it
                sys.stderr.write(text)
                sys.stderr.flush()
            self._waiting.task_done()
