"""Memory that stays where Apple's GPU finds it: MLX's wired limit, which only Metal on macOS 15 or newer has."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from troupe.errors import ConfigError
from troupe.runtime.process_wide import ProcessWide

_FIRST_MACOS = 15
_GB = 1e9

_WIRED = ProcessWide(lambda size: mx.set_wired_limit(size))


def why_not_wired() -> str | None:
    """Why nothing can be wired here; None where it can."""
    if mx.default_device() == mx.Device(mx.cpu) or not mx.metal.is_available():
        return "only Apple's GPU has memory to wire"
    release = platform.mac_ver()[0] if sys.platform == "darwin" else ""
    major = release.partition(".")[0]
    if not major.isdigit() or int(major) < _FIRST_MACOS:
        return f"it needs macOS {_FIRST_MACOS} or newer, and this is {release or 'another system'}"
    return None


def check_wired_limit(limit_gb: float | None) -> list[str]:
    """What to tell of a limit in 10⁹ bytes: that it changes nothing, where the machine has no such thing, so that a run
    can move from a Mac to another machine and back.

    ConfigError for one above what the system lets be wired.
    """
    if limit_gb is None:
        return []
    if (why := why_not_wired()) is not None:
        return [f"wired_limit_gb is {limit_gb:g}, which changes nothing here: {why}"]
    most = mx.device_info().get("max_recommended_working_set_size")
    if most and limit_gb * _GB > int(most):
        raise ConfigError(
            f"wired_limit_gb is {limit_gb:g}, but the system lets {int(most) / _GB:.1f} GB be wired; lower it, or "
            "raise the system's limit: sudo sysctl iogpu.wired_limit_mb=MEGABYTES"
        )
    return []


@contextmanager
def memory_wired(limit_gb: float | None) -> Iterator[None]:
    """Have up to so many 10⁹ bytes of arrays kept resident, in the whole process. None, or where nothing can be wired,
    changes nothing."""
    if limit_gb is None or why_not_wired() is not None:
        yield
        return
    with _WIRED.at(round(limit_gb * _GB)):
        yield
