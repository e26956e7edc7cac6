"""What is done with a live environment, and what may come of it: plain data, or one of four failures.

Results become msgpack beside the code that gave them, so that they are the same wherever that runs, and none is larger
than `MOST_BYTES`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Literal, TypeAlias

import anyio
import msgspec

from troupe.environments.convention import Content, EnvironmentFault, EnvironmentSpec, StepResult
from troupe.environments.results import checked_reset, checked_reward, checked_state, checked_step, tool_content
from troupe.errors import sayable
from troupe.rewards.convention import own_copy
from troupe.rewards.faults import described, may_pass

MOST_BYTES = 1_000_000
"""Of what a tool or an environment returns at once, as msgpack; of what it saves, and of all its attributes."""
NO_ANSWER = "no answer within "
ITS_END = "its process ended "
"""How the errors of calls begin that have not been made, as far as the environment is concerned: one that was given up,
or has ended its process. When an environment is brought back they are left out."""
_ERROR_CHARACTERS = 10_000

What: TypeAlias = Literal[
    "reset", "call", "step", "state_id", "get_reward", "save_state", "load_state", "attributes", "close"
]


class Deed(msgspec.Struct, frozen=True, kw_only=True):
    """Something to be done with an instance, or a function to be called. Plain data."""

    what: What
    name: str = ""
    """Of the tool."""
    arguments: dict[str, Any] = {}
    """Of the tool, or the columns of `reset`."""
    text: str = ""
    """That `step` is given, or the observation of `state_id`."""
    saved: bytes = b""
    """What `save_state` gave, as msgpack."""

    is_method: bool = True
    """Whether the tool is a method of the instance, as opposed to a function for all."""

    def called(self, subject: Any) -> Callable[[], Any]:
        """What is to be called, or awaited, for it; `subject` is the instance, or the function."""
        match self.what:
            case "reset":
                return partial(subject.reset, **own_copy(self.arguments))
            case "call":
                return partial(getattr(subject, self.name) if self.is_method else subject, **own_copy(self.arguments))
            case "step" | "state_id":
                return partial(getattr(subject, self.what), self.text)
            case "load_state":
                return partial(subject.load_state, msgspec.msgpack.decode(self.saved))
            case "attributes":
                return partial(attributes_of, subject)
            case _:
                return getattr(subject, self.what)  # type: ignore[no-any-return]


class Raised(Exception):  # noqa: N818 - it says what happened
    """The code raised, or returned what it must not."""

    def __init__(self, text: str, told: str, passing: bool = False) -> None:
        """`text`: of the error alone, `told`: with its class and place; `passing`: whether a service that is away makes
        such errors."""
        super().__init__(told)
        self.text, self.told, self.passing = text, told, passing

    @classmethod
    def by(cls, error: BaseException) -> Raised:
        """From what the code has raised."""
        if isinstance(error, EnvironmentFault):  # of what it has returned
            return cls(str(error), str(error))
        try:
            text = str(error)
        except Exception:  # its __str__ is code like any other
            text = type(error).__name__
        return cls(sayable(text[:_ERROR_CHARACTERS]), described(error), may_pass(error))


class Late(Exception):  # noqa: N818
    """There was no answer in time, and whatever was asked was left behind, or killed."""

    def __init__(self, limit_s: float) -> None:
        super().__init__(f"{NO_ANSWER}{limit_s:g} s")


class Died(Exception):  # noqa: N818
    """The process ended while it was asked."""

    def __init__(self, how: str, itself: bool) -> None:
        """`itself`: whether the code has ended it, as opposed to a signal from elsewhere."""
        super().__init__(how)
        self.itself = itself


class Gone(Exception):  # noqa: N818
    """The process had ended before it was asked, through no fault of who asks."""


class Away(Gone):
    """The machine that the process was on is away, which says nothing about the process, however often it comes."""


class Budget:
    """The seconds that one answer may take; what is asked at the same time counts once."""

    def __init__(self, seconds: float) -> None:
        self.seconds = self._left = seconds
        self._asking = 0
        self._since_s = 0.0

    @property
    def left_s(self) -> float:
        """What is left now."""
        spent = anyio.current_time() - self._since_s if self._asking else 0.0
        return max(0.0, self._left - spent)

    def __enter__(self) -> None:
        if not self._asking:
            self._since_s = anyio.current_time()
        self._asking += 1

    def __exit__(self, *_: object) -> None:
        self._asking -= 1
        if not self._asking:
            self._left -= anyio.current_time() - self._since_s


class Live(ABC):
    """A live environment, which one episode has for itself."""

    def __init__(self, spec: EnvironmentSpec) -> None:
        self.spec = spec
        self.is_lost = False
        """Whether nothing more can be asked of it."""

    @abstractmethod
    async def do(self, deed: Deed, budget: Budget) -> Any:
        """What comes of a deed. Raised, Late, Died or Gone where nothing does; after the last three it is lost."""

    @property
    def instance(self) -> Any:
        """The object itself, where it is in this process."""
        return None


class Runner(ABC):
    """Where environments live and tools run."""

    awaited: str | None = None
    """Why no machine is to be had that could run them; None: one is, or they run on this one."""

    @property
    def needs_process(self) -> str | None:
        """What code has asked for that works in a process of its own only, and where; None where it has not."""
        return None

    @abstractmethod
    async def start(self) -> None:
        """Get ready; InputError where that fails."""

    @abstractmethod
    async def stop(self) -> list[str]:
        """End everything; what of it did not go as it should."""

    @abstractmethod
    async def take(self, spec: EnvironmentSpec, *, new: bool = False) -> Live:
        """An instance that nobody has; `new`: one that nobody has had. Raises as `Live.do`."""

    @abstractmethod
    async def give_back(self, live: Live) -> None:
        """The episode is over: another one may have the instance, which is reset before."""

    @abstractmethod
    async def throw_away(self, live: Live) -> None:
        """Nobody is to have it any more: it is closed, as far as that can be done, and dropped."""

    @abstractmethod
    async def call(self, name: str, arguments: Mapping[str, Any], budget: Budget) -> Content:
        """Call a tool that is no environment's. Raises as `Live.do`."""


def read(deed: Deed, label: str, result: Any) -> bytes:
    """What came of a deed as msgpack. EnvironmentFault, ValueError or TypeError where it is not what it must be."""
    match deed.what:
        case "reset":
            plain: Any = checked_reset(result, label)
        case "call":
            plain = tool_content(result)
        case "step":
            plain = checked_step(result, label)
        case "state_id":
            plain = checked_state(result, label)
        case "get_reward":
            plain = checked_reward(result, f"get_reward of {label}")
        case "save_state" | "attributes":
            plain = result
        case _:
            plain = None
    data = msgspec.msgpack.encode(plain)
    if len(data) > MOST_BYTES:
        raise ValueError(f"the result has {len(data):,} bytes; the limit is {MOST_BYTES:,}")
    return data


_GIVEN = {
    "reset": Content | None,
    "call": Content,
    "step": StepResult,
    "state_id": str,
    "get_reward": float | None,
    "attributes": dict[str, Any],
}
_DECODERS = {what: msgspec.msgpack.Decoder(kind).decode for what, kind in _GIVEN.items()}


def given(deed: Deed, data: bytes) -> Any:
    """The other way round; what `save_state` gave stays msgpack. MsgspecError for what it cannot be."""
    decode = _DECODERS.get(deed.what)
    return data if decode is None else decode(data)


def attributes_of(instance: Any) -> dict[str, Any]:
    """The public attributes of an instance that are plain data, as long as there is room for them."""
    found: dict[str, Any] = {}
    room = MOST_BYTES - 100
    for name, value in getattr(instance, "__dict__", {}).items():
        if name.startswith("_") or callable(value):
            continue
        try:
            if not is_plain(value):
                continue
            data = msgspec.msgpack.encode({name: value})
        except (RecursionError, OverflowError, ValueError):  # a list that holds itself, a number of more than 64 bits
            continue
        if len(data) <= room:
            room -= len(data)
            found[name] = msgspec.msgpack.decode(data)[name]
    return found


def is_plain(value: Any) -> bool:
    """Whether it is of the types that JSON has, tuples and bytes besides, all the way down."""
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(type(key) is str for key in value) and all(map(is_plain, value.values()))
    return value is None or type(value) in (bool, int, float, str, bytes)


def is_async(call: Callable[[], Any]) -> bool:
    """Whether it gives an awaitable."""
    return inspect.iscoroutinefunction(call)


async def awaited(result: Awaitable[Any]) -> Any:
    """Any awaitable as a coroutine."""
    return await result
