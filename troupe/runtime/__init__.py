"""How actors live: mailboxes, life cycle, device threads, child processes, the policy board, the timeline.

Knows nothing of GRPO or language models.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from troupe.runtime.actor import Actor
from troupe.runtime.board import Credits, PolicyBoard
from troupe.runtime.guardian import SILENT
from troupe.runtime.guarding import Guard, under_way
from troupe.runtime.mailbox import Broadcast, Channel, ChannelStats, Mailbox, Overflow
from troupe.runtime.process import ChildEnded, ChildProcess, Connection, FrameError, Wire, serve, serve_plainly
from troupe.runtime.report import Reporter
from troupe.runtime.supervision import Restarts, Role, finishing, play, together
from troupe.runtime.timing import StepTimes
from troupe.runtime.trace import TraceWriter

if TYPE_CHECKING:
    from troupe.runtime.device import DeviceThread

__all__ = [
    "SILENT",
    "Actor",
    "Broadcast",
    "Channel",
    "ChannelStats",
    "ChildEnded",
    "ChildProcess",
    "Connection",
    "Credits",
    "DeviceThread",
    "FrameError",
    "Guard",
    "Mailbox",
    "Overflow",
    "PolicyBoard",
    "Reporter",
    "Restarts",
    "Role",
    "StepTimes",
    "TraceWriter",
    "Wire",
    "finishing",
    "play",
    "serve",
    "serve_plainly",
    "together",
    "under_way",
]


def __getattr__(name: str) -> Any:
    """Load what needs MLX when it is asked for: who speaks with child processes may do without."""
    if name != "DeviceThread":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from troupe.runtime.device import DeviceThread

    return DeviceThread
