from __future__ import annotations

import msgspec
import pytest

from troupe.records.sinks.base import MetricsConfig


def test_all_sinks_are_on_by_default() -> None:
    assert MetricsConfig().sinks == ("console", "jsonl", "trace", "sqlite")


def test_unknown_sinks_are_refused() -> None:
    assert msgspec.convert({"sinks": []}, MetricsConfig).sinks == ()
    with pytest.raises(msgspec.ValidationError, match="Invalid enum value 'fax'"):
        msgspec.convert({"sinks": ["fax"]}, MetricsConfig)


def test_a_sink_twice_is_refused_for_both_would_write_into_one_file() -> None:
    with pytest.raises(msgspec.ValidationError, match="has jsonl more than once; name each sink once"):
        msgspec.convert({"sinks": ["jsonl", "trace", "jsonl"]}, MetricsConfig)
