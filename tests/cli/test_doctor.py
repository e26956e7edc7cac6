from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest

from troupe.cli import doctor
from troupe.cli.doctor import Report, describe, examine
from troupe.runtime import linux_cpu
from troupe.runtime.machine import device_name, memory_gb, processors

REPORT = Report(
    python="3.11.7 (/usr/bin/python)",
    platform="Linux",
    mlx="0.32.4",
    device="cpu",
    blas="OpenBLAS",
    threads=2,
    memory_gb=16.25,
    memory_limit_gb=None,
    matmul_gflops=1234.5,
    advice=(),
)


def test_the_report_as_lines() -> None:
    assert describe(REPORT).splitlines() == [
        "Python               3.11.7 (/usr/bin/python)",
        "platform             Linux",
        "mlx                  0.32.4",
        "device               cpu",
        "CPU matrix products  OpenBLAS",
        "processors           2",
        "memory               16.2 GB",
        "limit of a run       none",
        "measured             1,234 GFLOP/s, float32, on the default device",
        "nothing to mend",
    ]
    ill = msgspec.structs.replace(REPORT, memory_gb=None, memory_limit_gb=11.84, advice=("a", "b"))
    assert describe(ill).splitlines()[-5:] == [
        "memory               unknown",
        "limit of a run       11.8 GB (memory_limit_gb)",
        "measured             1,234 GFLOP/s, float32, on the default device",
        "to mend: a",
        "to mend: b",
    ]


def test_examines_this_machine() -> None:
    report = examine()
    assert report.python.endswith(f"({sys.executable})")
    assert report.threads == (len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count())
    assert report.matmul_gflops is not None
    assert report.matmul_gflops > 0
    assert report.device.split(" ")[0] == ("cpu" if mx.default_device() == mx.Device(mx.cpu) else "gpu")
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report


def test_the_speed_is_floating_point_operations_over_the_best_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # 2·768³ operations in 1, 0.5, 2, 1 and 1 seconds
    ticks = iter([0.0, 1.0, 1.0, 1.5, 2.0, 4.0, 4.0, 5.0, 5.0, 6.0])

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return next(ticks)

    monkeypatch.setattr(doctor, "time", Clock)
    assert doctor._measure_matmul() == pytest.approx(2 * 768**3 / 0.5 / 1e9)


def machine(
    monkeypatch: pytest.MonkeyPatch, *, device: mx.DeviceType, gflops: float, advice: list[str], blas: str
) -> None:
    monkeypatch.setattr(doctor, "_measure_matmul", lambda: gflops)
    monkeypatch.setattr(doctor, "device_name", lambda: "some device")
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
    monkeypatch.setattr(linux_cpu, "advice", lambda: advice)
    monkeypatch.setattr(linux_cpu, "load_openblas", lambda: blas)
    monkeypatch.setattr(sys, "platform", "linux")


def test_a_slow_cpu_without_a_known_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, device=mx.cpu, gflops=4.2, advice=[], blas="loaded")
    (line,) = examine().advice
    assert line.startswith("matrix products reach only 4 GFLOP/s")


def test_a_known_reason_is_told_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, device=mx.cpu, gflops=4.2, advice=["install it"], blas="missing")
    report = examine()
    assert report.advice == ("install it",)
    assert report.blas == "the reference BLAS of the mlx wheel"


@pytest.mark.parametrize(("cuda_home", "lines"), [(None, 1), ("/opt/cuda", 0)])
def test_a_gpu_on_linux_wants_the_cuda_toolkit(
    monkeypatch: pytest.MonkeyPatch, cuda_home: str | None, lines: int
) -> None:
    machine(monkeypatch, device=mx.gpu, gflops=4.2, advice=["not for a GPU"], blas="too late")
    monkeypatch.setattr(Path, "is_dir", lambda self: False)
    if cuda_home is None:
        monkeypatch.delenv("CUDA_HOME", raising=False)
    else:
        monkeypatch.setenv("CUDA_HOME", cuda_home)
    report = examine()
    assert len(report.advice) == lines
    assert all("CUDA" in line for line in report.advice)
    assert report.blas == "the reference BLAS of the mlx wheel, loaded before OpenBLAS"


@pytest.mark.parametrize(
    ("device", "name", "expected"),
    [(mx.gpu, "Apple M4 Max", "gpu (Apple M4 Max)"), (mx.gpu, None, "gpu"), (mx.cpu, None, "cpu")],
)
def test_names_the_device(
    monkeypatch: pytest.MonkeyPatch, device: mx.DeviceType, name: str | None, expected: str
) -> None:
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
    monkeypatch.setattr(mx, "device_info", lambda: {} if name is None else {"device_name": name})
    assert device_name() == expected


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> int:
        raise ValueError(f"unrecognized configuration name {name}")

    monkeypatch.setattr(os, "sysconf", refuse)
    assert memory_gb() is None
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    cores: Any = None
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    assert processors() == 1
