from __future__ import annotations

import msgspec
import pytest

from troupe.sinks import MetricsConfig


def test_all_sinks_are_on_by_default() -> None:
    assert MetricsConfig().sinks == ("console", "jsonl", "trace")


def test_unknown_sinks_are_refused() -> None:
    assert msgspec.convert({"sinks": []}, MetricsConfig).sinks == ()
    with pytest.raises(msgspec.ValidationError, match="Invalid enum value 'fax'"):
        msgspec.convert({"sinks": ["fax"]}, MetricsConfig)
