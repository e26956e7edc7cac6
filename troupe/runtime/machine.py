"""What program this is, and what machine, in words; what of it decides how numbers are rounded; whether MLX is there.

Quick to import: MLX is imported where something is asked that only it knows.
"""

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import version

from troupe.errors import in_clone, packages_of, pip
from troupe.runtime import linux_cpu

VERSION = "0.1.0"
"""Of Troupe."""
_OFF = "MLX_DISABLE_COMPILE"
_TF32 = "MLX_ENABLE_TF32"
_BACKENDS = "on Linux it needs a backend beside it;"


def device_name() -> str:
    """`gpu` or `cpu`, and its name where MLX knows it."""
    import mlx.core as mx

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


def arithmetic() -> dict[str, str]:
    """What decides which bits a run comes to: two starts that are pinned and differ in any of it come to other weights.

    Name, as `machine.NAME` of a resume, → what it is here, in words. What means nothing on this device is left out.

    `device`: what MLX computes on. `mlx`: its version. `system`: whose library of functions is used. `compiler`:
    whether MLX fuses kernels. `blas`: whose matrix products, and for which processor. `tf32`: whether a card may round
    the factors of products of float32.
    What the config decides (threads of OpenBLAS, streams of the learner) is not among it.
    """
    import mlx.core as mx

    on_cpu = mx.default_device() == mx.Device(mx.cpu)
    found = {"device": _device(on_cpu=on_cpu), "mlx": version("mlx"), "system": _system()}
    if on_cpu:
        found |= {"compiler": _compiler(), "blas": _blas()}
    else:
        found |= {"compiler": f"off, by {_OFF}" if _OFF in os.environ else "MLX's", "tf32": os.environ.get(_TF32, "1")}
    return found


def _device(*, on_cpu: bool) -> str:
    if on_cpu:  # of which processor it is, products know, and nothing else
        return "cpu"
    import mlx.core as mx

    told = mx.device_info()
    names = [str(told[key]) for key in ("device_name", "architecture") if told.get(key)]
    return f"gpu ({', '.join(names)})" if names else "gpu"


def _system() -> str:
    library = " ".join(platform.libc_ver()) if platform.system() == "Linux" else ""
    return ", ".join(part for part in (f"{platform.system()} {platform.machine()}", library.strip()) if part)


def _compiler() -> str:
    if _OFF in os.environ:
        return f"off, by {_OFF}"
    return "none" if shutil.which(linux_cpu.COMPILER) is None else linux_cpu.COMPILER


def _blas() -> str:
    match linux_cpu.load_openblas():
        case "loaded":
            return linux_cpu.openblas_kernels() or "OpenBLAS"
        case "not needed":
            return "Accelerate"
        case _:
            return "the reference BLAS of the mlx wheel"


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
