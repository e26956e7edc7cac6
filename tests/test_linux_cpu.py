from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from troupe import linux_cpu


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
    def refuse(*args: Any) -> None:
        raise AssertionError("nothing may be loaded")

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
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise FileNotFoundError

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
    def refuse(*args: Any) -> None:
        raise OSError

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
    program = "import troupe; from troupe import linux_cpu; print(linux_cpu.load_openblas(), linux_cpu._is_mapped())"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "loaded True\n", "")
