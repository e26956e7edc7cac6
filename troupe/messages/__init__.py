"""The vocabulary of the play: typed, frozen messages. Imports nothing else of ours."""

from troupe.messages.control import Checkpoint, Drain
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
from troupe.messages.training import ClosedState, GroupClosed, Incident, Replace, Snapshot, Span, Update

__all__ = [
    "ChatMessage",
    "Checkpoint",
    "ClosedState",
    "Drain",
    "FinishReason",
    "GroupClosed",
    "Incident",
    "Prompt",
    "PromptText",
    "Replace",
    "Rollout",
    "RolloutGroup",
    "ScoredGroup",
    "Slot",
    "Snapshot",
    "Span",
    "Update",
]
