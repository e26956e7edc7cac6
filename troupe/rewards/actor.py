"""RewardActor: a reward with a life of its own, scoring one sample at a time."""

from abc import ABC, abstractmethod
from typing import Any

import msgspec

from troupe.messages import ChatMessage, PromptText


class RewardSample(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One completion to be scored."""

    prompt: PromptText
    """As the dataset has it, with what an environment added."""
    completion: str | list[ChatMessage]
    """The text, or a list of messages where the prompt is a conversation: one of the assistant, or of an episode all
    that followed upon the prompt."""
    completion_ids: tuple[int, ...]
    """(T,) token ids; empty where the caller has none."""
    columns: dict[str, Any]
    """The other columns of the dataset row."""
    gid: int | None
    """Number of the group; None outside a run."""
    index: int
    """Place of the sample in its group, from 0."""
    environment: Any = None
    """Where it acted in one, its environment, or what is known of it (`EnvironmentView`)."""


class RewardActor(ABC):
    """Base class of stateful, asynchronous rewards.

    `start` and `stop` run once each, around all calls of `score`, each call in a task of its own: none may hold a task
    group or cancel scope open for another. `score` runs up to `concurrency` times at once, in the event loop: it must
    await and never block. What ignores its cancellation at the end of its time is left behind.
    """

    name: str = ""
    """Under which the scores are reported; empty: the class's name."""
    concurrency: int | None = None
    """Samples scored at once, ≥ 1; None: the `[rewards]` section's."""
    weight: float | None = None
    """Of its score in the reward, where no weights are given; None: 1."""
    timeout_s: float | None = None
    """Seconds that one attempt at one sample may take, > 0; None: the section's."""
    retries: int | None = None
    """Further attempts after the first fails, ≥ 0; None: the section's."""

    async def start(self) -> None:
        """Open what scoring needs, such as a connection. An exception ends the run before it begins."""

    @abstractmethod
    async def score(self, sample: RewardSample) -> float | None:
        """The sample's score; None where this reward has nothing to say about it."""

    async def stop(self) -> None:
        """Close it again. Called after a fault too, but only where `start` was called."""
