"""`openenv:URL?action=FIELD&observation=FIELD`: environments that an OpenEnv server at that address has; or
`openenv:MODULE:CLASS`, an OpenEnv `Environment` that lives here, without a server.

`action` is the field of an action that what the policy says goes into; where it is not given and an action has one
field that it needs and that is a text, it is that, else the policy has to write the action as a JSON object.
`observation` is the field that the policy reads: where it is not given the only text in it, else all of it as JSON.
A row's columns are given to `reset`, as far as it takes them.
"""

import inspect
import json
import typing
import urllib.request
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

import msgspec

from troupe.environments.adapters.options import check_version, load_code, package, read_options
from troupe.environments.convention import StepResult
from troupe.errors import WorldError
from troupe.rewards.extras import plain
from troupe.rewards.faults import described

PREFIX = "openenv"
_WAIT_S = 10.0  # for a server to say what its actions are
_REFUSED = "VALIDATION_ERROR"  # how a server says that an action is none


class Told(NamedTuple):
    """What an environment answers, on the wire or here."""

    observation: Mapping[str, Any]
    reward: Any
    done: bool


class Line(Protocol):
    """One episode's way to its environment."""

    async def reset(self, columns: Mapping[str, Any]) -> Told: ...
    async def step(self, action: dict[str, Any]) -> Told: ...
    async def state(self) -> Any: ...
    async def close(self) -> None: ...


class NoActionError(ValueError):
    """What the policy said is no action of this environment."""


class Remote:
    """A session of a server."""

    def __init__(self, url: str) -> None:
        self._client = package("openenv.core.generic_client").GenericEnvClient(base_url=url)

    async def reset(self, columns: Mapping[str, Any]) -> Told:
        return _told(await self._client.reset(**plain(dict(columns))))

    async def step(self, action: dict[str, Any]) -> Told:
        try:
            return _told(await self._client.step(action))
        except RuntimeError as error:
            if _REFUSED in str(error):
                raise NoActionError("The environment takes no such action.") from None
            raise

    async def state(self) -> Any:
        return await self._client.state()

    async def close(self) -> None:
        await self._client.disconnect()


def _told(result: Any) -> Told:
    return Told(result.observation, result.reward, bool(result.done))


class Local:
    """An environment that lives here."""

    def __init__(self, kind: Callable[[], Any], action: Any) -> None:
        self._environment = kind()
        self._action = action

    async def reset(self, columns: Mapping[str, Any]) -> Told:
        parameters = inspect.signature(self._environment.reset).parameters
        takes_all = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        return self._read(
            self._environment.reset(**{key: each for key, each in columns.items() if takes_all or key in parameters})
        )

    async def step(self, action: dict[str, Any]) -> Told:
        try:
            made = self._action.model_validate(action)
        except ValueError as error:
            raise NoActionError(f"That is no action: {error}") from None
        return self._read(self._environment.step(made))

    async def state(self) -> Any:
        return self._environment.state.model_dump()

    async def close(self) -> None:
        if close := getattr(self._environment, "close", None):
            close()

    def _read(self, observation: Any) -> Told:
        told = package("openenv.core.env_server.serialization").serialize_observation(observation)
        return Told(told["observation"], told["reward"], bool(told["done"]))


class Fields(NamedTuple):
    """Where texts go and come from."""

    action: str | None
    """None: the policy writes the whole action as JSON."""
    observation: str | None


class OpenEnv:
    """One environment of OpenEnv."""

    def __init__(self, connect: Callable[[], Line], fields: Fields) -> None:
        self._connect = connect
        self._fields = fields
        self._line: Line | None = None

    async def reset(self, **columns: Any) -> str:
        """Begin an episode; what is seen first."""
        if self._line is None:
            self._line = self._connect()
        columns.pop("prompt", None)
        told = await self._line.reset(columns)
        return self._shown(told.observation)

    async def step(self, text: str) -> StepResult:
        """Take what was said as an action, or as what stands in its field. At the end, `info` has the state."""
        assert self._line is not None
        try:
            action = {self._fields.action: text} if self._fields.action else _object(text)
            told = await self._line.step(action)
        except NoActionError as error:
            return StepResult(str(error), 0.0)
        info = {"state": plain(await self._line.state())} if told.done else {}
        return StepResult(self._shown(told.observation), told.reward, told.done, info)

    async def close(self) -> None:
        """End the session."""
        if self._line is not None:
            await self._line.close()
            self._line = None

    def _shown(self, observation: Mapping[str, Any]) -> str:
        if self._fields.observation is not None:
            return str(observation[self._fields.observation])
        texts = [value for value in observation.values() if isinstance(value, str)]
        return texts[0] if len(texts) == 1 else json.dumps(plain(dict(observation)), ensure_ascii=False)


def _object(text: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError) as error:
        raise NoActionError(f"An action is a JSON object: {error}") from None


def factory(rest: str) -> Callable[[], OpenEnv]:
    """What makes an environment of an address, or of a class of Python.

    Raises:
        WorldError: nobody answers there, or an option names no field.
        ImportError: openenv-core is missing.
    """
    package("openenv.core")  # says at once where it is missing
    check_version("openenv-core", (0, 3))
    connect: Callable[[], Line]
    place, options = read_options(rest, PREFIX)
    if "://" in place:
        schemas = _schemas_at(place)
        label, connect = "OpenEnv", partial(Remote, place)
    else:
        kind = load_code(place, "environment")
        action, schemas = _of_class(kind, place)
        label, connect = kind.__name__, partial(Local, kind, action)
    fields = _fields(rest, options, schemas)
    return type(label, (OpenEnv,), {"__init__": lambda self: OpenEnv.__init__(self, connect, fields)})


def _schemas_at(url: str) -> dict[str, Any]:
    """What a server says that actions and observations are."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/schema", timeout=_WAIT_S) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except (OSError, ValueError) as error:
        raise WorldError(
            f'environment "{PREFIX}:{url}": no OpenEnv server answers there: {described(error)}; start it first'
        ) from error


def _of_class(kind: Any, place: str) -> tuple[Any, dict[str, Any]]:
    """The class of actions that `step` is annotated with, and the schemas."""
    try:
        hints = typing.get_type_hints(kind.step)
        action = hints[next(name for name in inspect.signature(kind.step).parameters if name != "self")]
        schemas = {"action": action.model_json_schema()}
        if hasattr(hints.get("return"), "model_json_schema"):
            schemas["observation"] = hints["return"].model_json_schema()
    except (AttributeError, KeyError, NameError, StopIteration, TypeError) as error:
        raise WorldError(
            f'environment "{PREFIX}:{place}": its step does not say what actions it takes; write '
            "def step(self, action: ActionClass, …), with a class derived from OpenEnv's Action"
        ) from error
    return action, schemas


def _fields(rest: str, options: dict[str, Any], schemas: Mapping[str, Any]) -> Fields:
    for name, field in options.items():
        if name not in Fields._fields:
            raise WorldError(f'environment "{PREFIX}:{rest}": unknown option {name}; there are action and observation')
        known = schemas.get(name, {}).get("properties", {})
        if known and field not in known:
            raise WorldError(
                f'environment "{PREFIX}:{rest}": an {name} has no field {field!r}; there are {", ".join(known)}'
            )
    properties = schemas["action"].get("properties", {})
    needed = schemas["action"].get("required", [])
    only = needed[0] if len(needed) == 1 and properties[needed[0]].get("type") == "string" else None
    return Fields(options.get("action", only), options.get("observation"))
