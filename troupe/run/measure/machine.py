"""This machine in words, and all that is measured of it in one."""

import platform
import subprocess
import sys
import time
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import mlx.core as mx

from troupe.policy import is_on_cpu
from troupe.run.fits import APPLE_SHARE, largest_fitting, predict_fits
from troupe.run.measure.course import Course, Tell
from troupe.run.measure.figures import LONGEST_S, Measurement
from troupe.run.measure.work import Size, size_for
from troupe.runtime.machine import VERSION, arithmetic, memory_gb, processors
from troupe.runtime.memory import GB, device_limit_gb, why_not_wired


async def measure_machine(tell: Tell, *, size: Size | None = None, longest_s: float = LONGEST_S) -> Measurement:
    """Measure this machine. `tell` is given a line on each measurement as it begins; `size`: None chooses by the
    memory. Takes about `longest_s` at the most."""
    begun_s = time.monotonic()
    made = datetime.now(UTC).isoformat(timespec="seconds")
    limit_gb, memory = device_limit_gb(), memory_gb()
    size = size or size_for(limit_gb)
    figures = await Course(size, longest_s=longest_s, tell=tell).run()
    return Measurement(
        troupe=VERSION,
        made=made,
        seconds=round(time.monotonic() - begun_s, 1),
        chip=chip(),
        backend=backend(),
        system=f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.platform(),
        mlx=version("mlx"),
        processors=processors(),
        memory_gb=memory,
        limit_gb=limit_gb,
        wired=wired(),
        largest=largest_fitting(predict_fits(), limit_gb or APPLE_SHARE * (memory or 0.0)),
        figures=figures,
        environment=arithmetic(),
    )


def backend() -> Literal["cpu", "cuda", "metal"]:
    """Whose kernels MLX computes with."""
    if is_on_cpu():
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def chip() -> str:
    """The name of the device that MLX computes on: of a card, of Apple's chip, or of the processor."""
    if not is_on_cpu() and (name := mx.device_info().get("device_name")):
        return str(name)
    if sys.platform == "darwin":
        asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
        with suppress(OSError):
            told = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
            if told:
                return told
    with suppress(OSError, UnicodeDecodeError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def wired() -> str:
    """What of memory can be kept resident, as Metal tells (macOS 15 or newer); elsewhere, why nothing."""
    if (why := why_not_wired()) is not None:
        return f"nothing: {why}"
    most = mx.device_info().get("max_recommended_working_set_size")
    return f"up to {int(most) / GB:.1f} GB (wired_limit_gb)" if most else "as much as the system lets"
