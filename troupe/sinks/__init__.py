"""Where metrics go. A sink gets every message that reaches the Metrics actor and keeps what it cares for.

Sinks know messages and nothing else of ours. Each is called in a thread of its own, one message at a time, and may be
slow, hang or fail: then it is switched off, or tried again later, and training goes on.
"""

import importlib
from typing import TYPE_CHECKING, Any

from troupe.sinks.base import DurableSink, MetricsConfig, RunInfo, Sink, SinkName
from troupe.sinks.packages import check_sinks
from troupe.sinks.threads import Sinks, Write

if TYPE_CHECKING:
    from troupe.sinks.console import ConsoleSink, PlainSink
    from troupe.sinks.jsonl import JsonlSink
    from troupe.sinks.making import make_sinks
    from troupe.sinks.prometheus import PrometheusSink
    from troupe.sinks.prometheus_text import exposition
    from troupe.sinks.sqlite import SqliteSink
    from troupe.sinks.tensorboard import TensorBoardSink
    from troupe.sinks.trackers import TrackioSink, WandbSink

_HOMES = {
    "ConsoleSink": "console",
    "JsonlSink": "jsonl",
    "PlainSink": "console",
    "PrometheusSink": "prometheus",
    "SqliteSink": "sqlite",
    "TensorBoardSink": "tensorboard",
    "TrackioSink": "trackers",
    "WandbSink": "trackers",
    "exposition": "prometheus_text",
    "make_sinks": "making",
}

__all__ = [
    "ConsoleSink",
    "DurableSink",
    "JsonlSink",
    "MetricsConfig",
    "PlainSink",
    "PrometheusSink",
    "RunInfo",
    "Sink",
    "SinkName",
    "Sinks",
    "SqliteSink",
    "TensorBoardSink",
    "TrackioSink",
    "WandbSink",
    "Write",
    "check_sinks",
    "exposition",
    "make_sinks",
]


def __getattr__(name: str) -> Any:
    """Load a sink when it is asked for: who reads a config, or serves a page, may do without."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"troupe.sinks.{_HOMES[name]}"), name)
