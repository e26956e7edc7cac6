from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest

from troupe.cli.doctor import Machine, advise, describe, examine, measure_matmul
from troupe.cli.main import main
from troupe.policy import PRESETS
from troupe.run.fits import Fits, predict_fits
from troupe.runtime import linux_cpu
from troupe.runtime.machine import device_name, memory_gb, processors

MACHINE = Machine(
    python="3.11.7 (/usr/bin/python)",
    platform="Linux",
    mlx="0.32.4",
    device="cpu",
    blas="OpenBLAS",
    threads=2,
    memory_gb=16.25,
    memory_limit_gb=None,
    matmul_gflops=1234.5,
    measurement="none",
    advice=(),
)


def test_the_report_as_lines() -> None:
    assert describe(MACHINE).splitlines() == [
        "Python               3.11.7 (/usr/bin/python)",
        "platform             Linux",
        "mlx                  0.32.4",
        "device               cpu",
        "CPU matrix products  OpenBLAS",
        "processors           2",
        "memory               16.2 GB",
        "limit of a run       none",
        "measured             1,234 GFLOP/s, float32, on the default device",
        "file of figures      none",
        "nothing to mend",
    ]
    ill = msgspec.structs.replace(MACHINE, memory_gb=None, memory_limit_gb=11.84, advice=("a", "b"))
    assert describe(ill).splitlines()[-6:] == [
        "memory               unknown",
        "limit of a run       11.8 GB (memory_limit_gb)",
        "measured             1,234 GFLOP/s, float32, on the default device",
        "file of figures      none",
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
    assert msgspec.json.decode(msgspec.json.encode(report), type=Machine) == report


def test_the_speed_is_floating_point_operations_over_the_best_time() -> None:
    # 2·768³ operations in 1, 0.5, 2, 1 and 1 seconds
    ticks = iter([0.0, 1.0, 1.0, 1.5, 2.0, 4.0, 4.0, 5.0, 5.0, 6.0])
    assert measure_matmul(lambda: next(ticks)) == pytest.approx(2 * 768**3 / 0.5 / 1e9)


def test_a_slow_cpu_is_told_of_and_a_known_reason_alone() -> None:
    (line,) = advise(4.2, on_cpu=True, known=list)
    assert line.startswith("matrix products reach only 4 GFLOP/s")
    assert advise(4.2, on_cpu=True, known=lambda: ["install it"]) == ["install it"]
    assert advise(20.0, on_cpu=True, known=list) == []


@pytest.mark.parametrize(("cuda_home", "lines"), [(None, 1), ("/opt/cuda", 0)])
def test_a_gpu_on_linux_wants_the_cuda_toolkit(
    monkeypatch: pytest.MonkeyPatch, cuda_home: str | None, lines: int
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(Path, "is_dir", lambda self: False)
    if cuda_home is None:
        monkeypatch.delenv("CUDA_HOME", raising=False)
    else:
        monkeypatch.setenv("CUDA_HOME", cuda_home)
    advice = advise(4.2, on_cpu=False, known=lambda: ["not for a GPU"])
    assert len(advice) == lines
    assert all("CUDA" in line for line in advice)


@pytest.mark.parametrize(
    ("blas", "words"),
    [
        ("missing", "the reference BLAS of the mlx wheel"),
        ("too late", "the reference BLAS of the mlx wheel, loaded before OpenBLAS"),
    ],
)
def test_the_library_of_matrix_products_is_named(monkeypatch: pytest.MonkeyPatch, blas: str, words: str) -> None:
    monkeypatch.setattr(linux_cpu, "load_openblas", lambda: blas)
    assert examine().blas == words


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


def test_tells_which_model_fits_instead(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    right = predict_fits()
    monkeypatch.setattr("troupe.run.fits.predict_fits", lambda: right)
    main.main(["doctor", "--fits"], standalone_mode=False)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("predicted by formula for ")
    assert [name for line in lines if (name := line.split(" ")[0]) in PRESETS] == list(PRESETS)
    main.main(["doctor", "--fits", "--json"], standalone_mode=False)
    fits = msgspec.json.decode(capsys.readouterr().out, type=Fits)
    assert fits == right
