from __future__ import annotations

import platform
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from tests.support.fakes import tiny_config
from troupe import train
from troupe.errors import ConfigError
from troupe.run.config import load_config
from troupe.run.prepare import prepare
from troupe.runtime.memory import check_wired_limit, memory_wired


def on_a_mac(monkeypatch: pytest.MonkeyPatch, release: str, limits: list[int]) -> None:
    def swap(size: int) -> int:
        limits.append(size)
        return limits[-2] if len(limits) > 1 else 0

    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 48_000_000_000})
    monkeypatch.setattr(mx, "set_wired_limit", swap)
    monkeypatch.setattr(platform, "mac_ver", lambda: (release, ("", "", ""), "arm64"))
    monkeypatch.setattr(sys, "platform", "darwin")


def test_the_limit_holds_as_long_as_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []
    on_a_mac(monkeypatch, "15.1", limits)
    assert check_wired_limit(48.0) == []
    with memory_wired(36.5):
        assert limits == [36_500_000_000]
    assert limits == [36_500_000_000, 0]
    with memory_wired(None):
        assert len(limits) == 2


def test_more_than_the_system_allows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_mac(monkeypatch, "26.0", [])
    with pytest.raises(ConfigError, match=r"wired_limit_gb is 64, but the system lets 48\.0 GB be wired; lower it, or"):
        check_wired_limit(64.0)


def test_an_older_system_has_no_such_thing(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []
    on_a_mac(monkeypatch, "14.7", limits)
    [told] = check_wired_limit(8.0)
    assert told == "wired_limit_gb is 8, which changes nothing here: it needs macOS 15 or newer, and this is 14.7"
    with memory_wired(8.0):
        assert limits == []


@pytest.mark.skipif(mx.metal.is_available(), reason="this machine has memory to wire")
def test_elsewhere_it_is_told_that_it_changes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_model, tmp_path, wired_limit_gb=8, learner__max_steps=1)
    told = "wired_limit_gb is 8, which changes nothing here: only Apple's GPU has memory to wire"
    assert told in prepare(config).notices
    assert train(config).complete


@pytest.mark.parametrize("value", ["0", "-1", "0.0"])
def test_what_is_no_limit(value: str) -> None:
    with pytest.raises(ConfigError, match=r"wired_limit_gb is .*, but must be above 0; leave it out for none"):
        load_config(None, [f"wired_limit_gb={value}"])
