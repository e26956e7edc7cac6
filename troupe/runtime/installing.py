"""Whether MLX can be imported, and how somebody installs what it lacks."""

from __future__ import annotations

import subprocess
import sys

from troupe.errors import in_clone, packages_of, pip

_BACKENDS = "on Linux it needs a backend beside it;"


def backend_remedy() -> str:
    """What to do where MLX cannot be imported; a clause for a message."""
    if sys.platform != "linux":
        return (
            "MLX needs macOS 14 or newer and a native Python of Apple's chips (python3 -c 'import platform; "
            f"print(platform.machine())' says arm64); install it anew: {pip(['--force-reinstall', 'mlx'])}"
        )
    if in_clone():
        return f"{_BACKENDS} in the clone: ./setup.sh, or for an NVIDIA card: BACKEND=cuda ./setup.sh"
    cpu, cuda = (packages_of(extra) or [f"mlx[{name}]"] for extra, name in (("cpu", "cpu"), ("cuda", "cuda13")))
    return f"{_BACKENDS} install it: {pip(cpu)}, or for an NVIDIA card: {pip(cuda)}"


def unusable_backend() -> str | None:
    """What to tell where MLX cannot be imported, found out in a process of its own; None where it can."""
    tried = subprocess.run(
        [sys.executable, "-c", "import mlx.core"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if not tried.returncode:
        return None
    last = (tried.stderr.strip().splitlines() or [f"it ended with {tried.returncode}"])[-1]
    return f"MLX cannot be imported ({last}); {backend_remedy()}"


def missing_backend(error: ImportError) -> str | None:
    """What to tell where this import failed because MLX is not there, or not whole; None where it is about others."""
    is_mlx = (error.name or "").partition(".")[0] == "mlx" or "mlx" in str(error).lower()
    return f"MLX cannot be imported ({error}); {backend_remedy()}" if is_mlx else None
