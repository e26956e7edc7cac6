"""`daemon.log`: what the daemon did and why, in the run folder, with a limit on its size; the same lines on stderr."""

from __future__ import annotations

import logging
import logging.handlers
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from troupe.daemon.place import LOG
from troupe.daemon.settings import DaemonConfig

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
LOGGER = logging.getLogger("troupe.daemon")
_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"


class _Quiet(logging.handlers.RotatingFileHandler):
    """A log that cannot be written (a full disk) must not disturb the run."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """The line is lost; the next one is tried again."""


class _QuietStream(logging.StreamHandler):  # type: ignore[type-arg]
    """As above, for a terminal that is closed."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """The line is lost."""


@contextmanager
def logging_into(folder: Path, config: DaemonConfig) -> Iterator[None]:
    """Have `LOGGER` write into the folder's log and to stderr, and to nobody else."""
    handlers: list[logging.Handler] = [_QuietStream(sys.stderr)]
    with suppress(OSError):
        # a name or a text that is no UTF-8 is no reason to lose its line
        handlers.append(_Quiet(folder / LOG, encoding="utf-8", errors="backslashreplace", delay=True))
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT))
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
            if isinstance(handler, _Quiet):
                handler.close()


def set_limits(config: DaemonConfig) -> None:
    """Have the log that is being written grow as far, and leave as many older ones, as the config says."""
    for handler in LOGGER.handlers:
        if isinstance(handler, _Quiet):
            handler.maxBytes, handler.backupCount = config.log_bytes, config.log_files
