"""How actors live: mailboxes, life cycle, device threads, child processes, the policy board, the timeline.

Knows nothing of GRPO or language models.
"""

from troupe.runtime.actor import Actor
from troupe.runtime.board import Credits, PolicyBoard
from troupe.runtime.device import DeviceThread
from troupe.runtime.mailbox import Broadcast, Channel, ChannelStats, Mailbox, Overflow
from troupe.runtime.process import ChildEnded, ChildProcess, Connection, FrameError, serve
from troupe.runtime.report import Reporter
from troupe.runtime.supervision import Restarts, Role, play, together
from troupe.runtime.timing import StepTimes
from troupe.runtime.trace import TraceWriter

__all__ = [
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
    "Mailbox",
    "Overflow",
    "PolicyBoard",
    "Reporter",
    "Restarts",
    "Role",
    "StepTimes",
    "TraceWriter",
    "play",
    "serve",
    "together",
]
