"""How actors live: mailboxes, life cycle, device threads, the policy board, the timeline.

Knows nothing of GRPO or language models.
"""

from troupe.runtime.actor import Actor, Reporter
from troupe.runtime.board import Credits, PolicyBoard
from troupe.runtime.device import DeviceThread
from troupe.runtime.mailbox import Broadcast, Channel, ChannelStats, Mailbox, Overflow
from troupe.runtime.supervision import play, together
from troupe.runtime.trace import TraceWriter

__all__ = [
    "Actor",
    "Broadcast",
    "Channel",
    "ChannelStats",
    "Credits",
    "DeviceThread",
    "Mailbox",
    "Overflow",
    "PolicyBoard",
    "Reporter",
    "TraceWriter",
    "play",
    "together",
]
