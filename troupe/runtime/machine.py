"""What program this is, and what machine, in words: system, device, processors, memory."""

from __future__ import annotations

import os
import platform

VERSION = "0.1.0"
"""Of Troupe."""


def device_name() -> str:
    """`gpu` or `cpu`, and its name where MLX knows it."""
    import mlx.core as mx  # here: the rest is known without it

    device = mx.default_device()
    kind = "cpu" if device == mx.Device(mx.cpu) else "gpu"
    name = mx.device_info().get("device_name", "")
    return f"{kind} ({name})" if name else kind


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_gb() -> float | None:
    """Memory of the machine in 10⁹ bytes; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError):
        return None


def describe_machine() -> str:
    """One line, such as `node-7, Linux x86_64, gpu (NVIDIA H100), 16 processors, 135.1 GB`."""
    memory = memory_gb()
    parts = [
        platform.node(),
        f"{platform.system()} {platform.machine()}",
        device_name(),
        f"{processors()} processors",
        *([] if memory is None else [f"{memory:.1f} GB"]),
    ]
    return ", ".join(part for part in parts if part)
