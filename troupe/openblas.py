"""Linux CPU speed: put OpenBLAS in front of the reference BLAS that the `mlx[cpu]` wheel carries.

On Linux the wheel's own BLAS reaches about 4 GFLOP/s on two cores, OpenBLAS 120–190. The dynamic linker resolves a
symbol to the library loaded first, so loading OpenBLAS globally *before* `mlx.core` is enough; afterwards it is too
late. macOS (Accelerate, Metal) and NVIDIA cards need none of this. Imports nothing else of ours, and no MLX.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Literal

LIBRARY_NAMES = ("libopenblas.so.0", "libopenblas.so")
REMEDY = "install it with: sudo apt-get install -y libopenblas0-pthread g++"

OpenBlasState = Literal["not needed", "loaded", "missing", "too late"]


def _mapped_openblas() -> bool:
    """Whether some OpenBLAS is already mapped into this process (LD_PRELOAD, or an earlier import)."""
    try:
        return "openblas" in Path("/proc/self/maps").read_text()
    except OSError:
        return False


def load() -> OpenBlasState:
    """Load OpenBLAS with global symbols where it helps. Safe to call at any time; never raises.

    Returns "too late" where `mlx.core` was imported before without it: the caller tells the user.
    """
    if sys.platform != "linux":
        return "not needed"
    too_late = "mlx.core" in sys.modules and not _mapped_openblas()
    for name in LIBRARY_NAMES:
        try:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return "too late" if too_late else "loaded"
    return "missing"
