"""What MLX's CPU backend needs on Linux, and what to do without it.

OpenBLAS: the `mlx[cpu]` wheel carries the reference BLAS, about 4 GFLOP/s on two cores; OpenBLAS gives 120–190. The
dynamic linker resolves a symbol to the library loaded first, so loading OpenBLAS globally *before* `mlx.core` is
enough; afterwards it is too late. A C++ compiler: MLX compiles fused kernels with `g++` when it first needs them.
macOS (Accelerate, Metal) and NVIDIA cards need none of this. Imports nothing of ours that imports MLX.
"""

import ctypes
import mmap
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from troupe.errors import InputError
from troupe.runtime.process_wide import ProcessWide

LIBRARY_NAMES = ("libopenblas.so.0", "libopenblas.so")
COMPILER = "g++"
REMEDY = "install it with: sudo apt-get install -y libopenblas0-pthread g++"

_MALLOC = {-3: 2**25, -1: 2**31 - 1, -2: 2**26, -8: 1}
"""Numbers of <malloc.h>: M_MMAP_THRESHOLD at its largest, M_TRIM_THRESHOLD out of reach, M_TOP_PAD 64 MB, and one arena
(M_ARENA_MAX): those of other threads are unmapped whenever they are empty."""

_BUFFER_BYTES = 2**27
"""Address space that OpenBLAS takes for each thread that multiplies at the same time as others."""
_PLACES = ("TMPDIR", "TMP", "TEMP", "TEMPDIR")
"""Where MLX looks for a folder for temporary files, in this order; then `/tmp`."""

OpenBlasState = Literal["not needed", "loaded", "missing", "too late"]


@cache  # the first answer stays true: afterwards it is mapped, even where it came too late
def load_openblas() -> OpenBlasState:
    """Load OpenBLAS with global symbols where it helps. Safe to call at any time; never raises.

    Returns "too late" where `mlx.core` was imported before without it and computes on the CPU: the caller tells the
    user.
    """
    if sys.platform != "linux":
        return "not needed"
    too_late = _mlx_is_on_cpu() and not _is_mapped()
    if _is_limited() and not _may_have((os.cpu_count() or 1) * _BUFFER_BYTES):
        os.environ["OPENBLAS_NUM_THREADS"] = "1"  # each thread that it starts asks for its buffer until it gets it
    for name in LIBRARY_NAMES:
        try:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return "too late" if too_late else "loaded"
    return "missing"


def blas_threads() -> int | None:
    """How many threads OpenBLAS works with now; None where it is not there."""
    library = _openblas()
    return None if library is None else int(library.openblas_get_num_threads())


@contextmanager
def blas_limited(threads: int | None) -> Iterator[None]:
    """Have OpenBLAS, where it is there, work with this many threads in the whole process. None changes nothing."""
    if threads is None or _openblas() is None:
        yield
        return
    with _THREADS.at(threads):
        yield


def openblas_kernels() -> str | None:
    """Version of OpenBLAS and the processor that its kernels are made for, as it says; None where it does not say."""
    library = _openblas()
    try:
        told = [getattr(library, name) for name in ("openblas_get_config", "openblas_get_corename")]
    except AttributeError:
        return None
    for function in told:
        function.restype = ctypes.c_char_p
    config, core = ((function() or b"").decode(errors="replace") for function in told)
    return " ".join((*config.split()[:2], core)).strip() or None


def _swap_threads(threads: int) -> int:
    library = _openblas()
    assert library is not None
    before = int(library.openblas_get_num_threads())
    library.openblas_set_num_threads(threads)
    return before


_THREADS = ProcessWide(_swap_threads)


def keep_freed_memory() -> None:
    """Have glibc keep the memory of arrays that were freed for those that come next, instead of giving it back to the
    system, which would map and clear it anew: MLX allocates every result. Arrays above 32 MB come and go as before."""
    if sys.platform != "linux":
        return
    with suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        for parameter, value in _MALLOC.items():
            mallopt(parameter, value)


def run_without_compiler() -> None:
    """Where MLX would need a compiler that is not there, let it run its kernels one by one: slower, but it runs."""
    if sys.platform == "linux" and shutil.which(COMPILER) is None:
        try:
            import mlx.core as mx  # not at the top: OpenBLAS has to come first
        except ImportError:  # whoever needs it says so; others do without
            return
        if mx.default_device() == mx.Device(mx.cpu):
            mx.disable_compile()


def check_temporary_files() -> None:
    """InputError where MLX will compile a kernel and cannot write the files for it, which is found amid the run."""
    if sys.platform != "linux" or shutil.which(COMPILER) is None:
        return
    name = next((name for name in _PLACES if name in os.environ), None)
    named = "/tmp" if name is None else os.environ[name]
    folder = Path(named)
    what = f"{named} (the folder for temporary files)" if name is None else f"{name} is {named!r}"
    remedy = f"MLX compiles kernels there; make it a folder that you may write to, or set {name or 'TMPDIR'} to one"
    if not named or not folder.is_dir():
        raise InputError(f"{what}: there is no such folder; {remedy}")
    for place in (folder, folder / "mlx", folder / "mlx" / version("mlx"), folder / "mlx" / version("mlx") / "cpu"):
        try:
            if place.exists():
                tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            raise InputError(f"{what}: {place} cannot be written: {error.strerror or error}; {remedy}") from None


def take_buffers(threads: int) -> None:
    """Where this process may not take as much memory as it likes, have OpenBLAS take its buffers for so many threads
    now: when it needs one and gets none, it asks again for ever. InputError where they cannot be had."""
    library = _openblas()
    if library is None or not _is_limited() or not hasattr(library, "blas_memory_alloc"):
        return
    if not _may_have(threads * _BUFFER_BYTES):
        raise InputError(
            f"out of memory: OpenBLAS needs {threads * _BUFFER_BYTES / 1e9:.2g} GB of address space for {threads} "
            "threads, and this process may not have them; raise the limit (ulimit -v), or set schedule.blas_threads "
            "and schedule.learner_streams to 1"
        )
    library.blas_memory_alloc.restype = ctypes.c_void_p
    library.blas_memory_free.argtypes = [ctypes.c_void_p]
    for buffer in [library.blas_memory_alloc(0) for _ in range(threads)]:
        library.blas_memory_free(buffer)


def _may_have(size: int) -> bool:
    """Whether this process gets so many bytes of address space now."""
    try:
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except (OSError, OverflowError):
        return False
    return True


def _is_limited() -> bool:
    """Whether address space that nobody uses yet may be refused."""
    limits = (resource.getrlimit(which)[0] for which in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    if any(limit != resource.RLIM_INFINITY for limit in limits):
        return True
    try:
        return Path("/proc/sys/vm/overcommit_memory").read_text(encoding="ascii").strip() == "2"
    except OSError:
        return False


def advice() -> list[str]:
    """What a user of the CPU backend on Linux should install, one line each; empty where nothing is amiss."""
    if sys.platform != "linux":
        return []
    lines = []
    if load_openblas() == "too late":
        lines.append(
            "mlx was imported before troupe, so matrix products are about 30 times slower; import troupe first"
        )
    if load_openblas() == "missing":
        lines.append(f"OpenBLAS is not installed, so matrix products run about 30 times slower; {REMEDY}")
    if shutil.which(COMPILER) is None:
        lines.append(f"{COMPILER} is not installed, and MLX fuses its CPU kernels with it; {REMEDY}")
    return lines


def _openblas() -> ctypes.CDLL | None:
    if load_openblas() not in ("loaded", "too late"):
        return None
    for name in LIBRARY_NAMES:
        with suppress(OSError):
            library = ctypes.CDLL(name)
            return library if hasattr(library, "openblas_set_num_threads") else None
    return None


def _mlx_is_on_cpu() -> bool:
    mx = sys.modules.get("mlx.core")
    return mx is not None and bool(mx.default_device() == mx.Device(mx.cpu))


def _is_mapped() -> bool:
    """Whether some OpenBLAS is in this process already (LD_PRELOAD, or an earlier import)."""
    try:
        return "openblas" in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
