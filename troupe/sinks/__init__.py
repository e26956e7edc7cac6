"""Where metrics go. A sink gets every message that reaches the Metrics actor and keeps what it cares for.

Sinks know messages and nothing else of ours. Each is called in a thread of its own, one message at a time, and may be
slow, hang or fail: then it is switched off, or tried again later, and training goes on.
"""

from troupe.sinks.base import DurableSink, MetricsConfig, RunInfo, Sink, SinkName
from troupe.sinks.console import ConsoleSink, PlainSink
from troupe.sinks.jsonl import JsonlSink
from troupe.sinks.making import make_sinks
from troupe.sinks.packages import check_sinks
from troupe.sinks.prometheus import PrometheusSink, exposition
from troupe.sinks.sqlite import SqliteSink
from troupe.sinks.tensorboard import TensorBoardSink
from troupe.sinks.threads import Sinks, Write
from troupe.sinks.trackers import TrackioSink, WandbSink

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
