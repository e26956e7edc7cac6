"""What of a machine and its environment decides how numbers are rounded, and so which bits a run comes to.

Two starts of a pinned run that differ in any of it come to other weights. What the config decides (threads of OpenBLAS,
streams of the learner) is not among it.
"""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import version

import mlx.core as mx

from troupe.runtime import linux_cpu

_OFF = "MLX_DISABLE_COMPILE"
_TF32 = "MLX_ENABLE_TF32"


def arithmetic() -> dict[str, str]:
    """Name, as `machine.NAME` of a resume, → what it is here, in words. What means nothing on this device is left out.

    `device`: what MLX computes on. `mlx`: its version. `system`: whose library of functions is used. `compiler`:
    whether MLX fuses kernels. `blas`: whose matrix products, and for which processor. `tf32`: whether a card may round
    the factors of products of float32.
    """
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
