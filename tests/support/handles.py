"""A handle without arm's length: an environment and functions called in place."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from troupe.environments.convention import Content, EnvironmentFault, EnvironmentSpec, StepResult, ToolError
from troupe.environments.describing import describe, describe_tool
from troupe.environments.results import checked_reset, checked_state, checked_step, tool_content


class PlainHandle:
    """Calls what it is given, and remembers what was asked."""

    def __init__(self, environment: Any = None, functions: Sequence[Callable[..., Any]] = ()) -> None:
        self._environment = environment
        self._functions = {function.__name__: function for function in functions}
        tools = [describe_tool(function) for function in functions]
        self.spec = (
            EnvironmentSpec(name="", tools=tuple(tools))
            if environment is None
            else describe(environment, functions=tools)
        )
        self.asked: list[tuple[str, Any]] = []

    async def reset(self, columns: Mapping[str, Any]) -> Content | None:
        return checked_reset(await self._ask("reset", dict(columns)), self.spec.label)

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Content:
        try:
            return tool_content(await self._ask(name, dict(arguments)))
        except Exception as error:
            raise ToolError(str(error)) from error

    async def step(self, text: str) -> StepResult:
        try:
            return checked_step(await self._ask("step", text), self.spec.label)
        except EnvironmentFault:
            raise
        except Exception as error:
            raise EnvironmentFault(str(error)) from error

    async def state_id(self, observation: str) -> str:
        return checked_state(await self._ask("state_id", observation), self.spec.label)

    async def _ask(self, name: str, given: Any) -> Any:
        self.asked.append((name, given))
        called = self._functions.get(name) or getattr(self._environment, name)
        result = called(**given) if isinstance(given, dict) else called(given)
        return await result if inspect.isawaitable(result) else result
