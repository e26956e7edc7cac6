"""What became of a sample that acts, turn by turn.

An *episode* is one sample that talks to an environment or calls tools: turns of the policy, with what came back in
between. Turns count from 1; turn 0 is the opening, in which nothing is sampled: the environment is begun, and may add
to the prompt.
"""

from typing import Any, TypeAlias

import msgspec

ChatMessage: TypeAlias = dict[str, Any]
"""One chat turn, `{"role": …, "content": …}`, as chat templates take it."""


class ToolCall(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One call of a tool, and what came of it."""

    name: str
    arguments: dict[str, Any]
    result: str
    """What the policy reads of it."""
    error: str = ""
    """Why it failed; empty where it did not."""
    seconds: float = 0.0
    """That it took."""


class Answer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an environment has answered to one turn: an input of the run, as a score is. It is asked for once, and
    recorded."""

    said: ChatMessage
    """The turn as it was understood: role `assistant`, content, thoughts and tool calls. Empty at the opening."""
    messages: tuple[ChatMessage, ...] = ()
    """What comes back: of tools, of role `tool`; of an environment, of role `user`. At the opening: the whole
    conversation so far where the environment added to it, else nothing."""
    calls: tuple[ToolCall, ...] = ()
    done: bool = False
    """Whether the episode ends here."""
    reward: float | None = None
    """Of this turn, where the environment gives one."""
    state: str | None = None
    """What names the state that the turn led to, for advantages by turn (`state_id`)."""
    info: dict[str, Any] = {}
    """Plain data that the environment tells of the turn."""
    failed: str = ""
    """Why the environment could not answer; its episode then has no reward."""
    seconds: float = 0.0
    """From asking to the answer."""
    saved: bytes = b""
    """What the environment gave of itself to go on from after a kill, where it can."""


class Turn(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One turn of an episode."""

    start: int
    """The policy sampled `token_ids[start:stop]` of its rollout."""
    stop: int
    answer: Answer


class Episode(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What became of one sample in its environment."""

    environment: str
    """Its name; empty where there are only tools."""
    opening: Answer
    """The answer to turn 0."""
    turns: tuple[Turn, ...]
    reward: float | None = None
    """By `get_reward`, or else the rewards of the turns summed with `gamma`; None where the environment has none."""
    failed: str = ""
    """Why it is no whole episode, so that it has no reward of any kind; empty where it is."""
    attributes: dict[str, Any] = {}
    """The environment's public attributes at the end, as far as they are plain data."""
