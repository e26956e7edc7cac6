"""Where metrics go. A sink gets every message that reaches the Metrics actor and keeps what it cares for.

Sinks know messages and nothing else of ours. Each is called in a thread of its own, one message at a time, and may be
slow, hang or fail: then it is switched off, or tried again later, and training goes on.
"""

from troupe.sinks.base import DurableSink, MetricsConfig, RunInfo, Sink, SinkName
from troupe.sinks.console import ConsoleSink, PlainSink
from troupe.sinks.jsonl import JsonlSink
from troupe.sinks.sqlite import SqliteSink
from troupe.sinks.threads import Sinks, Write

__all__ = [
    "ConsoleSink",
    "DurableSink",
    "JsonlSink",
    "MetricsConfig",
    "PlainSink",
    "RunInfo",
    "Sink",
    "SinkName",
    "Sinks",
    "SqliteSink",
    "Write",
]
