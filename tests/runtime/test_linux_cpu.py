from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import mlx.core as mx
import pytest

from troupe.errors import InputError
from troupe.runtime import linux_cpu


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    """Each test asks anew; afterwards the answer is the process's own again."""
    linux_cpu.load_openblas.cache_clear()
    yield
    linux_cpu.load_openblas.cache_clear()


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], list[tuple[str, int]]]:
    """A Linux whose libraries the test lays down, and what was loaded of them."""
    there: set[str] = set()
    loaded: list[tuple[str, int]] = []

    def load(name: str, mode: int) -> None:
        if name not in there:
            raise OSError(f"{name}: cannot open shared object file")
        loaded.append((name, mode))

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", load)
    return there, loaded


def refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise FileNotFoundError("nothing may be loaded")


def without_mlx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mlx.core")


Libraries = tuple[set[str], list[tuple[str, int]]]


def test_loads_the_first_that_is_there_with_global_symbols(
    monkeypatch: pytest.MonkeyPatch, libraries: Libraries
) -> None:
    there, loaded = libraries
    without_mlx(monkeypatch)
    there.add("libopenblas.so")
    assert linux_cpu.load_openblas() == "loaded"
    assert loaded == [("libopenblas.so", ctypes.RTLD_GLOBAL)]


def test_missing(monkeypatch: pytest.MonkeyPatch, libraries: Libraries) -> None:
    without_mlx(monkeypatch)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert linux_cpu.load_openblas() == "missing"
    blas, compiler = linux_cpu.advice()
    assert blas.startswith("OpenBLAS is not installed")
    assert compiler.startswith("g++ is not installed")
    assert "apt-get install -y libopenblas0-pthread g++" in blas


def test_too_late_stays_too_late(monkeypatch: pytest.MonkeyPatch, libraries: Libraries) -> None:
    libraries[0].add("libopenblas.so.0")
    monkeypatch.setattr(linux_cpu, "_is_mapped", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++")
    assert linux_cpu.load_openblas() == "too late"
    monkeypatch.setattr(linux_cpu, "_is_mapped", lambda: True)  # now it is, but MLX has its symbols already
    assert linux_cpu.load_openblas() == "too late"
    (line,) = linux_cpu.advice()
    assert line.endswith("import troupe first")


@pytest.mark.parametrize(("mapped", "on_gpu"), [(True, False), (False, True)], ids=["preloaded", "gpu"])
def test_mlx_first_is_no_matter_where_it_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, libraries: Libraries, mapped: bool, on_gpu: bool
) -> None:
    libraries[0].add("libopenblas.so.0")
    monkeypatch.setattr(linux_cpu, "_is_mapped", lambda: mapped)
    if on_gpu:
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    assert linux_cpu.load_openblas() == "loaded"


def test_a_mac_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert linux_cpu.load_openblas() == "not needed"
    assert linux_cpu.advice() == []
    monkeypatch.setattr(mx, "disable_compile", refuse)
    linux_cpu.run_without_compiler()


@pytest.mark.parametrize(
    ("compiler", "device", "disabled"),
    [(None, mx.cpu, [True]), ("/usr/bin/g++", mx.cpu, []), (None, mx.gpu, [])],
    ids=["cpu alone", "with compiler", "gpu"],
)
def test_kernels_are_not_fused_where_nothing_can_compile_them(
    monkeypatch: pytest.MonkeyPatch, compiler: str | None, device: mx.DeviceType, disabled: list[bool]
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda name: compiler)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
    monkeypatch.setattr(mx, "disable_compile", lambda: calls.append(True))
    linux_cpu.run_without_compiler()
    assert calls == disabled


def test_a_system_without_proc_has_nothing_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", refuse)
    assert not linux_cpu._is_mapped()


def openblas_is_installed() -> bool:
    if sys.platform != "linux":
        return False
    for name in linux_cpu.LIBRARY_NAMES:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


ORDER = pytest.mark.skipif(not openblas_is_installed(), reason="OpenBLAS is not installed")


@ORDER
def test_threads_are_limited_and_given_back() -> None:
    before = linux_cpu.blas_threads()
    assert before is not None
    with linux_cpu.blas_limited(before + 1):
        assert linux_cpu.blas_threads() == before + 1
        with linux_cpu.blas_limited(1):
            assert linux_cpu.blas_threads() == 1
        with linux_cpu.blas_limited(None):
            assert linux_cpu.blas_threads() == before + 1
    assert linux_cpu.blas_threads() == before


def test_without_openblas_there_are_no_threads_to_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert linux_cpu.blas_threads() is None
    with linux_cpu.blas_limited(3):
        assert linux_cpu.blas_threads() is None


def test_an_openblas_that_cannot_be_opened_again_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux_cpu, "load_openblas", lambda: "loaded")
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert linux_cpu.blas_threads() is None


@ORDER
def test_importing_mlx_first_warns() -> None:
    program = "import mlx.core as mx; mx.set_default_device(mx.cpu); import troupe"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert "RuntimeWarning: mlx was imported before troupe" in done.stderr
    assert "import troupe first" in done.stderr


@ORDER
def test_importing_troupe_first_loads_openblas_silently() -> None:
    program = "from troupe.runtime import linux_cpu; print(linux_cpu.load_openblas(), linux_cpu._is_mapped())"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "loaded True\n", "")


# Temporary files


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    for name in ("TMPDIR", "TMP", "TEMP", "TEMPDIR"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("name", ["TMPDIR", "TMP", "TEMP", "TEMPDIR"])
def test_a_folder_for_temporary_files_that_is_not_there(
    tmp_path: Path, compiler: None, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(name, str(tmp_path / "no"))
    with pytest.raises(InputError, match=f"{name} is '{tmp_path / 'no'}': there is no such folder.*set {name} to one"):
        linux_cpu.check_temporary_files()
    monkeypatch.setenv(name, "")
    with pytest.raises(InputError, match=f"{name} is "):
        linux_cpu.check_temporary_files()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    linux_cpu.check_temporary_files()  # nothing is compiled


def test_mlx_s_own_folder_in_it_is_somebody_else_s(
    tmp_path: Path, compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    linux_cpu.check_temporary_files()
    (tmp_path / "mlx").mkdir()
    linux_cpu.check_temporary_files()
    assert [path.name for path in tmp_path.rglob("*")] == ["mlx"]

    def opened(**where: Any) -> Any:
        if where["dir"] == tmp_path / "mlx":
            raise PermissionError(13, "Permission denied")
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr("tempfile.TemporaryFile", opened)
    with pytest.raises(InputError, match=f"{tmp_path / 'mlx'} cannot be written: Permission denied"):
        linux_cpu.check_temporary_files()


# Buffers of OpenBLAS


def test_its_buffers_are_taken_where_memory_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    given_back: list[int] = []

    def alloc(kind: int) -> int:
        held.append(kind)
        return len(held)

    def free(buffer: int) -> None:
        given_back.append(buffer)

    library = SimpleNamespace(blas_memory_alloc=alloc, blas_memory_free=free)
    monkeypatch.setattr(linux_cpu, "_openblas", lambda: library)
    monkeypatch.setattr(linux_cpu, "_is_limited", lambda: False)
    linux_cpu.take_buffers(3)
    assert not held
    monkeypatch.setattr(linux_cpu, "_is_limited", lambda: True)
    linux_cpu.take_buffers(3)
    assert (len(held), given_back) == (3, [1, 2, 3])
    with pytest.raises(InputError, match=r"out of memory: OpenBLAS needs .* for 8388608 threads.*\(ulimit -v\)"):
        linux_cpu.take_buffers(2**23)
    assert len(held) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux")
def test_a_run_that_may_not_have_the_memory_ends_and_says_so(tmp_path: Path) -> None:
    """It asked OpenBLAS for a product, which asked for its buffer again and again."""
    if linux_cpu._openblas() is None:
        pytest.skip("there is no OpenBLAS here")
    program = (
        "import resource, sys, troupe\n"
        "from troupe.runtime import linux_cpu\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, used + 2**26))\n"
        "linux_cpu.take_buffers(1)\n"
    )
    told = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # else one that it starts may be asking at that moment
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert told.returncode == 1
    assert "InputError: out of memory: OpenBLAS needs 0.13 GB of address space for 1 threads" in told.stderr


def test_openblas_says_which_kernels_it_has() -> None:
    told = linux_cpu.openblas_kernels()
    if linux_cpu.load_openblas() != "loaded":
        pytest.skip("there is no OpenBLAS here")
    assert told is not None
    assert told.startswith("OpenBLAS ")
    program = "from troupe.runtime import linux_cpu; print(linux_cpu.openblas_kernels())"
    environment = {**os.environ, "OPENBLAS_CORETYPE": "Prescott"}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() in (told, f"{told.rpartition(' ')[0]} Prescott")
