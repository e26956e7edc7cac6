"""The vocabulary of the play: typed, frozen messages. Imports nothing else of ours."""

from troupe.messages.control import Checkpoint, Drain, Hold, LiveGroup, Pause, Phase, Resume, Status, Step
from troupe.messages.rollout import (
    ChatMessage,
    FinishReason,
    Prompt,
    PromptText,
    Rollout,
    RolloutGroup,
    ScoredGroup,
    Slot,
)
from troupe.messages.training import ClosedState, GroupClosed, Incident, Replace, Snapshot, Span, SpanKind, Update

__all__ = [
    "ChatMessage",
    "Checkpoint",
    "ClosedState",
    "Drain",
    "FinishReason",
    "GroupClosed",
    "Hold",
    "Incident",
    "LiveGroup",
    "Pause",
    "Phase",
    "Prompt",
    "PromptText",
    "Replace",
    "Resume",
    "Rollout",
    "RolloutGroup",
    "ScoredGroup",
    "Slot",
    "Snapshot",
    "Span",
    "SpanKind",
    "Status",
    "Step",
    "Update",
]
