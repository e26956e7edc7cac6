"""What tools and environments are, as TRL 1.16 has them, and what is known of those that a run uses.

An environment is a class with `reset(**columns) -> str | None`; its other public methods are tools that the policy may
call. One with `step(text) -> StepResult` answers whatever the policy says. Either may have `get_reward()`, `close()`,
`state_id(observation)`, and `save_state()` with `load_state(data)`. Each method may be sync or async.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, TypeAlias

import msgspec

from troupe.messages.episodes import ChatMessage

OWN = ("reset", "get_reward", "step", "close", "state_id", "save_state", "load_state")
"""Public methods of an environment that are no tools. (A `step` that returns a text is one.)"""

Content: TypeAlias = str | list[dict[str, Any]]
"""Of a message: text, or blocks such as `{"type": "text", "text": …}`."""


class StepResult(msgspec.Struct, frozen=True):
    """What an environment's `step(text)` returns."""

    observation: str | None = None
    """What the policy reads next, as a user's message; None, nothing, where the episode ends."""
    reward: float | None = None
    """Of this turn; None where turns have no rewards."""
    done: bool = False
    """Whether the episode ends."""
    info: dict[str, Any] = {}
    """Plain data about the turn, to be kept and shown."""


class ToolError(Exception):
    """A tool raised, or took too long: its text is what the policy reads as `{'error': …}`."""


class EnvironmentFault(Exception):  # noqa: N818 - it says what happened
    """An environment failed, so that its episode is missing: it raised, took too long, died or answered what it must
    not. Its text says what happened."""


class ToolSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of a tool. Plain data."""

    name: str
    schema: dict[str, Any]
    """`{"type": "function", "function": {"name": …, "description": …, "parameters": …}}`, as chat templates take it."""
    is_async: bool = False
    """Whether it is an `async def`: those of one turn run together, after the others."""
    is_method: bool = False
    """Whether it is one of the environment's, as opposed to a function for all."""
    retries: bool = False
    """Whether it says of itself that it may be called again after a failure of the machinery (`retries = True`)."""


class EnvironmentSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of an environment. Plain data, which travels between processes. Where there are only tools, one
    with an empty name stands for them."""

    name: str
    """Of the table's row; for a single environment its label; empty where there are only tools."""
    label: str = ""
    """The class's name, under which rewards of `get_reward` are logged."""
    tools: tuple[ToolSpec, ...] = ()
    """All that the policy may call here, in the order in which it is told of them: functions, then methods."""
    has_reset: bool = False
    has_step: bool = False
    has_reward: bool = False
    """Whether there is a `get_reward`."""
    has_state_id: bool = False
    can_save: bool = False
    """Whether there are `save_state` and `load_state`."""
    has_close: bool = False
    retries: bool = False
    """Whether it says of itself that an answer may be asked for again (`retries = True`)."""
    reset_takes: tuple[str, ...] | None = None
    """The columns that `reset` takes; None: all."""
    reset_requires: tuple[str, ...] = ()
    """Those that it cannot do without."""

    @property
    def is_live(self) -> bool:
        """Whether there is an instance behind it, as opposed to functions alone."""
        return bool(self.name)

    @property
    def schemas(self) -> list[dict[str, Any]]:
        """Of the tools, as chat templates take them."""
        return [tool.schema for tool in self.tools]

    def tool(self, name: str) -> ToolSpec | None:
        """The tool of a name, None where there is none."""
        return next((tool for tool in self.tools if tool.name == name), None)


class Tool(NamedTuple):
    """A function that the policy may call."""

    spec: ToolSpec
    function: Callable[..., Any]


class World(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that a config or a call named, read once and checked."""

    environments: Mapping[str, EnvironmentSpec]
    """By name. Where there are only tools, one entry with an empty name."""
    factories: Mapping[str, Callable[[], Any]]
    """What makes an instance, by the same names; none for the empty name."""
    tools: tuple[Tool, ...] = ()
    """Functions that do not belong to an environment."""
    multi: bool = False
    """Whether a row's column `environment` says which one is meant."""
    probes: Mapping[str, Any] = {}
    """The instances that were made to look at, to be the first that are used."""

    def spec_of(self, columns: Mapping[str, Any]) -> EnvironmentSpec:
        """The environment of a row. KeyError where it names none of ours."""
        return self.environments[columns["environment"]] if self.multi else next(iter(self.environments.values()))

    def function(self, name: str) -> Callable[..., Any] | None:
        """The function that is a tool of that name; None where it is a method, or unknown."""
        return next((tool.function for tool in self.tools if tool.spec.name == name), None)


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One call of a tool that the policy has written."""

    name: str
    """Empty where it cannot be read."""
    arguments: dict[str, Any] = {}
    error: str = ""
    """What is wrong with how it is written, for the policy to read; empty where it can be made."""


class Said(msgspec.Struct, frozen=True, kw_only=True):
    """One turn of the policy, understood."""

    message: ChatMessage
    """Role `assistant`, `content`; `reasoning_content` where there are thoughts; `tool_calls`, each
    `{"type": "function", "function": {"name": …, "arguments": {…}}}`, where there are calls that can be made."""
    calls: tuple[Call, ...] = ()
    """In the order in which they were written, malformed ones included."""

    @property
    def text(self) -> str:
        """The content: what `step` is given."""
        content = self.message.get("content", "")
        return content if isinstance(content, str) else ""


class Handle(Protocol):
    """A live environment and the tools beside it, at arm's length: what the manager gives to who answers an episode.

    Each raises EnvironmentFault for what makes the episode missing.
    """

    async def reset(self, columns: Mapping[str, Any]) -> Content | None:
        """Begin an episode with these columns of its row; what is to be added to the prompt."""

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Content:
        """Call a tool; what it returned, as `tool_content` makes it beside the tool. ToolError where it raised or took
        too long."""

    async def step(self, text: str) -> StepResult:
        """Give the environment what the policy said; what it returned, as `checked_step` makes it."""

    async def state_id(self, observation: str) -> str:
        """The name of the state that an observation shows."""
