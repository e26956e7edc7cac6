"""MLX's memory in this process: limits on what it takes, and what Apple's GPU keeps resident (macOS 15 or newer)."""

import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from troupe.errors import ConfigError
from troupe.runtime.process_wide import ProcessWide

CUDA_SHARE = 0.9
"""Of a card's memory: the limit on CUDA where none is named."""
RESERVE = 0.05
"""Of a limit: left free, because MLX looks at what it holds only after it has taken more."""
GB = 1e9
_FIRST_MACOS = 15

_MEMORY, _CACHE = ProcessWide(mx.set_memory_limit), ProcessWide(mx.set_cache_limit)
_WIRED = ProcessWide(lambda size: mx.set_wired_limit(size))


def device_limit_gb() -> float | None:
    """What arrays may well take on this device by MLX's word, in 10⁹ bytes; None on a CPU, of which it says nothing."""
    if mx.default_device() == mx.Device(mx.cpu):
        return None
    info = mx.device_info()
    if recommended := info.get("max_recommended_working_set_size"):
        return round(int(recommended) / GB, 1)
    total = info.get("total_memory")
    return round(CUDA_SHARE * int(total) / GB, 1) if total else None


@contextmanager
def memory_limited(limit_gb: float | None) -> Iterator[None]:
    """Have MLX wait for the device, and let go of freed buffers, rather than go over the limit. None changes nothing.

    MLX begins work ahead of the device, and all that it has begun holds its memory until it is done; above the limit it
    waits. Freed buffers it keeps for the next array of their size, with the limit only below it.
    """
    if limit_gb is None:
        yield
        return
    with _MEMORY.at(round((1.0 - RESERVE) * limit_gb * GB)), _CACHE.at(round(limit_gb * GB)):
        yield


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
    if most and limit_gb * GB > int(most):
        raise ConfigError(
            f"wired_limit_gb is {limit_gb:g}, but the system lets {int(most) / GB:.1f} GB be wired; lower it, or "
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
    with _WIRED.at(round(limit_gb * GB)):
        yield
