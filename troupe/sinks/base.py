"""What a sink is, and the `[metrics]` section that chooses among them."""

from __future__ import annotations

from typing import Literal, Protocol

import msgspec

SinkName = Literal["console", "jsonl", "trace"]


class MetricsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[metrics]` section."""

    sinks: tuple[SinkName, ...] = ("console", "jsonl", "trace")
    """Where to: `console` shows progress, `jsonl` writes metrics.jsonl, `trace` writes trace.json."""


class RunInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a sink may tell about the run as a whole."""

    name: str
    folder: str
    total_steps: int
    first_step: int
    """Steps done before this start; 0 unless resumed."""


class Sink(Protocol):
    """One place for metrics. Calls come from one thread; `close` may come without `open`, and twice."""

    name: str

    def open(self) -> None:
        """Get ready; called once before the first message."""

    def write(self, message: object) -> None:
        """Take one Update, GroupClosed, Incident or Span, or leave it."""

    def close(self) -> None:
        """Flush and release."""
