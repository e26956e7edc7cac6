"""What an environment or a function offers, read of it once and checked."""

import inspect
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, Union, get_args, get_origin

from troupe.environments.convention import OWN, EnvironmentSpec, ToolSpec
from troupe.environments.schemas import json_schema, place_of
from troupe.errors import WorldError
from troupe.rewards.convention import shown

_JSON = (str, int, float, bool, list, dict, type(None))


def describe_tool(function: Any) -> ToolSpec:
    """Of a function, sync or async, that does not belong to an environment.

    Raises:
        WorldError: with file and line, where it is no function, or lacks hints or docstring.
    """
    if not (inspect.isfunction(function) or inspect.ismethod(function)) or "<" in function.__name__:
        raise WorldError(
            f"{place_of(function)}tool {shown(function)} is no function with a name; write def NAME(argument: type) "
            "with a docstring"
        )
    if function.__name__.startswith("_"):
        raise WorldError(f"{place_of(function)}tool {function.__name__} begins with _; give it another name")
    return ToolSpec(
        name=function.__name__,
        schema=json_schema(function),
        is_async=inspect.iscoroutinefunction(function),
        retries=getattr(function, "retries", False) is True,
    )


def describe(environment: Any, name: str = "", functions: Sequence[ToolSpec] = ()) -> EnvironmentSpec:
    """Of an instance or a class.

    `name` is that of the table's row, the class's where empty; `functions` are tools beside the environment's own.
    Methods are tools in the order of their names, as in TRL.

    Raises:
        WorldError: with file and line, where it breaks the contract.
    """
    kind = environment if inspect.isclass(environment) else type(environment)
    label = kind.__name__
    methods: dict[str, Callable[..., Any]] = dict(inspect.getmembers(kind, predicate=inspect.isfunction))
    _check_own(kind, methods)
    has_step = "step" in methods and not _is_tool(methods["step"], _is_static(kind, "step"))
    own = OWN if has_step else [each for each in OWN if each != "step"]
    names = [each for each in methods if not each.startswith("_") and each not in own]
    tools = (*functions, *(_describe_method(kind, methods[each], each) for each in names))
    check_names(tools, label)
    takes, requires = _columns(methods["reset"])
    return EnvironmentSpec(
        name=name or label,
        label=label,
        tools=tools,
        has_reset=True,
        has_step=has_step,
        has_reward="get_reward" in methods,
        has_state_id="state_id" in methods,
        can_save="save_state" in methods,
        has_close="close" in methods,
        retries=getattr(environment, "retries", False) is True,
        reset_takes=takes,
        reset_requires=requires,
    )


def _is_static(kind: type, name: str) -> bool:
    return isinstance(inspect.getattr_static(kind, name), staticmethod)


def check_names(tools: Sequence[ToolSpec], label: str = "") -> None:
    """WorldError where two tools have one name."""
    names = [tool.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            where = f" of {label}" if label else ""
            raise WorldError(f"two tools{where} are called {name!r}; rename one, since the policy calls them by name")


def _check_own(kind: type, methods: dict[str, Callable[..., Any]]) -> None:
    """WorldError for what an environment lacks, or has in a form that cannot be used."""
    place = place_of_class(kind)
    for name in OWN:
        found = getattr(kind, name, None)
        if name not in methods and (callable(found) or (name == "reset" and found is not None)):
            raise WorldError(f"{place}{name} of {kind.__name__} is {shown(found)}; it must be a method")
    if "reset" not in methods:
        raise WorldError(
            f"{place}environment {kind.__name__} has no reset; write def reset(self, **columns), which begins an "
            "episode and returns a text to be added to the prompt, or None"
        )
    for one, other in (("save_state", "load_state"), ("load_state", "save_state")):
        if one in methods and other not in methods:
            raise WorldError(f"{place}environment {kind.__name__} has {one} but no {other}; write both, or neither")
    for name in ("get_reward", "save_state", "close"):
        if name in methods and _required(methods[name]):
            raise WorldError(f"{place_of(methods[name])}{name} of {kind.__name__} is called without arguments")


def place_of_class(kind: type) -> str:
    """`FILE:LINE: ` of a class; empty where it cannot be told."""
    try:
        return f"{inspect.getsourcefile(kind)}:{inspect.getsourcelines(kind)[1]}: "
    except (OSError, TypeError):
        return ""


def _describe_method(kind: type, method: Callable[..., Any], name: str) -> ToolSpec:
    label = f"{kind.__name__}.{name}"
    try:
        schema = json_schema(method, label, is_unbound=not _is_static(kind, name))
    except WorldError as error:
        raise WorldError(f"{error}; if {name} is no tool, call it _{name}") from None
    schema["function"]["name"] = name
    return ToolSpec(
        name=name,
        schema=schema,
        is_async=inspect.iscoroutinefunction(method),
        is_method=True,
        retries=getattr(method, "retries", False) is True,
    )


def _parameters(method: Callable[..., Any], is_static: bool = False) -> list[inspect.Parameter]:
    return list(inspect.signature(method).parameters.values())[0 if is_static else 1 :]


def _required(method: Callable[..., Any]) -> list[str]:
    """Names of the arguments that must be given, past the instance."""
    return [
        each.name
        for each in _parameters(method)
        if each.default is each.empty and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    ]


def _columns(reset: Callable[..., Any]) -> tuple[tuple[str, ...] | None, tuple[str, ...]]:
    """The columns that `reset` takes (None: all), and those that it requires."""
    parameters = _parameters(reset)
    if bad := [each for each in parameters if each.kind is each.POSITIONAL_ONLY and each.default is each.empty]:
        raise WorldError(
            f"{place_of(reset)}reset takes {bad[0].name!r} by position only, but it is called by keyword; remove the /"
        )
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        return None, tuple(_required(reset))
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(each.name for each in parameters if each.kind in named), tuple(_required(reset))


def _is_tool(step: Callable[..., Any], is_static: bool) -> bool:
    """Whether a method `step` is a tool like any other: it cannot be called with one text alone, or its hint says that
    it returns a text or another JSON type."""
    parameters = _parameters(step, is_static)
    required = [each for each in parameters if each.default is each.empty and each.kind is not each.VAR_KEYWORD]
    if not parameters or len(required) > 1:
        return True
    try:
        hint = typing.get_type_hints(step).get("return", Any)
    except Exception:  # a hint in quotes is code
        return False
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    return all((get_origin(each) or each) in _JSON for each in kinds)
