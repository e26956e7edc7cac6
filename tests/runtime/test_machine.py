"""What machine this is."""

from __future__ import annotations

import platform

import pytest

from troupe.runtime import machine


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
