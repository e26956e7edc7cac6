"""What machine this is, and what of it decides the bits."""

from __future__ import annotations

import platform
import shutil

import mlx.core as mx
import pytest

from troupe.errors import ConfigError
from troupe.run.resume.changes import MACHINE_KEYS, check_allowed, rule_of
from troupe.runtime import linux_cpu, machine
from troupe.runtime.machine import arithmetic

ON_CPU = mx.default_device() == mx.Device(mx.cpu)


def test_one_line_with_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "node", lambda: "node-7")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(machine, "device_name", lambda: "gpu (some)")
    monkeypatch.setattr(machine, "processors", lambda: 16)
    monkeypatch.setattr(machine, "memory_gb", lambda: 135.06)
    assert machine.describe_machine() == "node-7, Linux x86_64, gpu (some), 16 processors, 135.1 GB"
    monkeypatch.setattr(machine, "memory_gb", lambda: None)
    monkeypatch.setattr(platform, "node", lambda: "")
    assert machine.describe_machine() == "Linux x86_64, gpu (some), 16 processors"


def test_this_machine() -> None:
    found = arithmetic()
    assert {f"machine.{name}" for name in found} < set(MACHINE_KEYS)
    assert found["device"].startswith("cpu" if ON_CPU else "gpu")
    assert found == arithmetic()
    assert all(found.values())


@pytest.mark.skipif(not ON_CPU, reason="MLX computes on a GPU here")
def test_a_compiler_that_is_there_not_there_or_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLX_DISABLE_COMPILE", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/g++")
    assert arithmetic()["compiler"] == "g++"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert arithmetic()["compiler"] == "none"
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    assert arithmetic()["compiler"] == "off, by MLX_DISABLE_COMPILE"


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("loaded", "OpenBLAS 9 Zen"),
        ("not needed", "Accelerate"),
        ("missing", "the reference BLAS of the mlx wheel"),
        ("too late", "the reference BLAS of the mlx wheel"),
    ],
)
def test_whose_products(monkeypatch: pytest.MonkeyPatch, state: str, told: str) -> None:
    monkeypatch.setattr(linux_cpu, "load_openblas", lambda: state)
    monkeypatch.setattr(linux_cpu, "openblas_kernels", lambda: "OpenBLAS 9 Zen")
    assert machine._blas() == told


def test_a_card_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "NVIDIA H200", "architecture": "sm_90"})
    assert machine._device(on_cpu=False) == "gpu (NVIDIA H200, sm_90)"
    assert machine._device(on_cpu=True) == "cpu"
    monkeypatch.setattr(mx, "device_info", dict)
    assert machine._device(on_cpu=False) == "gpu"


def test_they_can_be_allowed() -> None:
    assert check_allowed(["machine", *MACHINE_KEYS]) == {"machine", *MACHINE_KEYS}
    assert {rule_of(key) for key in MACHINE_KEYS} == {"by name"}
    with pytest.raises(ConfigError, match=r"did you mean machine\.compiler\?"):
        check_allowed(["machine.compilers"])
