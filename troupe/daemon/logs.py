"""`daemon.log`: what the daemon did and why, in the run folder, with a limit on its size; the same lines on stderr."""

import logging
import logging.handlers
import os
import queue
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from troupe.daemon.trainer.frames import Happened
from troupe.records.layout import LOG
from troupe.run.daemon_settings import DaemonConfig
from troupe.runtime.terminal import harmless

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
LOGGER = logging.getLogger("troupe.daemon")
_WAITING = 1000
"""Lines that may wait for whoever reads stderr."""
_PATIENCE_S = 1.0
_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"


class _Harmless(logging.Formatter):
    """Incidents and the last lines of a trainer hold texts of others."""

    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))


class _Quiet(logging.handlers.RotatingFileHandler):
    """A log that cannot be written (a full disk) must not disturb the run."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """The line is lost; the next one is tried again."""


class _Aside(logging.Handler):
    """To a stream, by a thread of its own: one that nobody reads any more, or a terminal that is stopped, must hold up
    nobody. Lines that are too many by then are lost."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._lines: queue.Queue[bytes | None] = queue.Queue(_WAITING)
        self._descriptor = stream.fileno()  # what Python buffers could still be held by the thread when we exit
        self._thread = threading.Thread(target=self._write, name="troupe-stderr", daemon=True)
        self._thread.start()

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(queue.Full):
            self._lines.put_nowait(f"{self.format(record)}\n".encode(errors="backslashreplace"))

    def close(self) -> None:
        """Have the lines written, if somebody reads them now."""
        with suppress(queue.Full):
            self._lines.put(None, timeout=_PATIENCE_S)
            self._thread.join(_PATIENCE_S)
        super().close()

    def _write(self) -> None:
        while (line := self._lines.get()) is not None:
            with suppress(OSError):  # a terminal that is closed
                while line:
                    line = line[os.write(self._descriptor, line) :]


class _QuietStream(logging.StreamHandler):  # type: ignore[type-arg]
    """To a stream that is no file."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """The line is lost."""


def _to(stream: TextIO) -> logging.Handler:
    try:
        return _Aside(stream)
    except (OSError, ValueError, AttributeError):  # a stand-in, or closed
        return _QuietStream(stream)


@contextmanager
def logging_into(folder: Path, config: DaemonConfig) -> Iterator[None]:
    """Have `LOGGER` write into the folder's log and to stderr, and to nobody else."""
    handlers: list[logging.Handler] = [_to(sys.stderr)]
    with suppress(OSError):
        # a name or a text that is no UTF-8 is no reason to lose its line
        handlers.append(_Quiet(folder / LOG, encoding="utf-8", errors="backslashreplace", delay=True))
    for handler in handlers:
        handler.setFormatter(_Harmless(_FORMAT))
        LOGGER.addHandler(handler)
    set_limits(config)
    before = LOGGER.level, LOGGER.propagate
    LOGGER.propagate = False
    LOGGER.setLevel(LEVELS[config.log_level])
    try:
        yield
    finally:
        LOGGER.setLevel(before[0])
        LOGGER.propagate = before[1]
        for handler in handlers:
            LOGGER.removeHandler(handler)
            if not isinstance(handler, _QuietStream):
                with suppress(OSError):  # a disk that is full
                    handler.close()


def log_incidents(happened: Happened) -> None:
    """Write down what went wrong in a run."""
    if happened.left_out:
        LOGGER.warning(f"{happened.left_out} further incidents, which came before these")
    for incident, times in zip(happened.incidents, happened.times or (1,) * len(happened.incidents), strict=True):
        again = f" ({times} times)" if times > 1 else ""
        LOGGER.warning(f"incident in {incident.actor}: {incident.message}{again}")


def set_limits(config: DaemonConfig) -> None:
    """Have the log that is being written grow as far, and leave as many older ones, as the config says."""
    for handler in LOGGER.handlers:
        if isinstance(handler, _Quiet):
            handler.maxBytes, handler.backupCount = config.log_bytes, config.log_files
