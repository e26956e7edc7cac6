"""The `[daemon]` section of a configuration."""

from typing import Annotated, Literal

import msgspec

LogLevel = Literal["debug", "info", "warning", "error"]


class DaemonConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How `troupe daemon` keeps a run alive and what it writes into its log. Nothing here changes what is computed."""

    restarts: Annotated[int, msgspec.Meta(ge=0)] = 5
    """Starts after a failure within `restart_window_s` without a step that is new; one more failure ends the daemon."""
    restart_window_s: Annotated[float, msgspec.Meta(gt=0)] = 600.0
    """Seconds in which failures are counted."""
    first_pause_s: Annotated[float, msgspec.Meta(ge=0)] = 1.0
    """Seconds before the first start after a failure; each further one waits twice as long, give or take a quarter."""
    longest_pause_s: Annotated[float, msgspec.Meta(ge=0)] = 60.0
    """Most seconds between two starts."""
    kill_after_s: Annotated[float, msgspec.Meta(ge=0)] = 300.0
    """Seconds without any sign of life (a step, an answer) after which a trainer is killed, and started again as after
    any failure, unless the same call hangs a second time; `troupe train` is ended. 0: never. Work that takes long, and
    waiting, are signs of life: it is its event loop that hangs."""
    page: bool | Annotated[int, msgspec.Meta(ge=1, le=65535)] = False
    """Whether a live page is served on 127.0.0.1: a port, or true for one that the system chooses."""
    log_level: LogLevel = "info"
    """What goes into `daemon.log`; debug adds every request for the status and every malformed message."""
    log_bytes: Annotated[int, msgspec.Meta(ge=10_000)] = 10_000_000
    """Size at which `daemon.log` becomes `daemon.log.1`."""
    log_files: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 5
    """Older logs that are kept."""
