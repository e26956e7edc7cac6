"""Where metrics go. A sink gets every message that reaches the Metrics actor and keeps what it cares for.

Sinks know messages and nothing else of ours. They are called one message at a time, must not block for long, and may
fail: the Metrics actor then switches them off and training goes on.
"""

from troupe.sinks.base import MetricsConfig, RunInfo, Sink, SinkName
from troupe.sinks.console import ConsoleSink, PlainSink
from troupe.sinks.jsonl import JsonlSink

__all__ = ["ConsoleSink", "JsonlSink", "MetricsConfig", "PlainSink", "RunInfo", "Sink", "SinkName"]
