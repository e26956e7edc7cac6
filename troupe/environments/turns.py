"""One turn of an episode after the other: what comes back for what the policy has said.

Calls of tools are made as TRL makes them: those that are not async one after the other, then the async ones together;
and what they gave is told in that order. Where there is no call, an environment with `step` is given the text; without
one the episode has ended.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import anyio
import msgspec

from troupe.environments.convention import (
    Call,
    Content,
    EnvironmentFault,
    EnvironmentSpec,
    Handle,
    Said,
    ToolError,
    ToolSpec,
)
from troupe.environments.results import text_of
from troupe.messages.episodes import Answer, ChatMessage, ToolCall
from troupe.messages.groups import PromptText
from troupe.rewards.convention import own_copy


async def open_episode(spec: EnvironmentSpec, handle: Handle, prompt: PromptText, columns: Mapping[str, Any]) -> Answer:
    """Turn 0: the environment is reset with the row's columns, `prompt` among them; what it returns is put behind the
    last message of the prompt, or behind a plain prompt, as in TRL.

    Raises:
        EnvironmentFault: the episode is missing.
    """
    if not spec.is_live:
        return Answer(said={})
    began = anyio.current_time()
    given = {"prompt": prompt, **columns}
    if spec.reset_takes is not None:
        given = {name: value for name, value in given.items() if name in spec.reset_takes}
    observation = await handle.reset(given)
    state = await handle.state_id(text_of(observation)) if spec.has_state_id else None
    return Answer(
        said={},
        messages=() if observation is None else tuple(with_observation(prompt, observation)),
        state=state,
        seconds=anyio.current_time() - began,
    )


def with_observation(prompt: PromptText, observation: Content) -> list[ChatMessage]:
    """The conversation with an observation behind the content of its last message; a plain prompt as a user's."""
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    content = messages[-1]["content"]
    if isinstance(content, str) and isinstance(observation, str):
        whole: Content = content + observation
    else:
        whole = [*_as_blocks(content), *_as_blocks(observation)]
    return [*messages[:-1], {**messages[-1], "content": whole}]


def _as_blocks(content: Content) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


async def answer_turn(spec: EnvironmentSpec, handle: Handle, said: Said) -> Answer:
    """What comes back for a turn: of tools where it calls any, else of the environment's `step`, else nothing.

    Raises:
        EnvironmentFault: the episode is missing.
    """
    began = anyio.current_time()
    if said.calls:
        answer = await _call_tools(spec, handle, said)
    elif spec.has_step:
        answer = await _take_step(spec, handle, said)
    else:
        answer = Answer(said=said.message, done=True)
    return msgspec.structs.replace(answer, seconds=anyio.current_time() - began)


async def _take_step(spec: EnvironmentSpec, handle: Handle, said: Said) -> Answer:
    result = await handle.step(said.text)
    observation = result.observation or ""
    return Answer(
        said=said.message,
        messages=({"role": "user", "content": observation},) if observation or not result.done else (),
        done=result.done,
        reward=result.reward,
        state=await handle.state_id(observation) if spec.has_state_id else None,
        info=result.info,
    )


class _Made(NamedTuple):
    """A call that was made, or could not be."""

    call: Call
    content: Content
    error: str
    seconds: float


async def _call_tools(spec: EnvironmentSpec, handle: Handle, said: Said) -> Answer:
    at_once: list[_Made] = []
    together: list[Call] = []
    for call in said.calls:
        tool = spec.tool(call.name)
        if call.error or tool is None:
            at_once.append(_failed(call, call.error or f"Tool {call.name} not found."))
        elif tool.is_async and _can_begin(tool, call):
            together.append(call)
        else:
            at_once.append(await _made(handle, call))
    made = [*at_once, *await _all_made(handle, together)]
    messages = tuple({"role": "tool", "name": each.call.name or "unknown", "content": each.content} for each in made)
    told = "\n".join(text_of(each.content) for each in made)
    return Answer(
        said=said.message,
        messages=messages,
        calls=tuple(_recorded(each) for each in made),
        state=await handle.state_id(told) if spec.has_state_id else None,
    )


def _can_begin(tool: ToolSpec, call: Call) -> bool:
    """Whether the arguments are those of the tool; an async one whose are not fails where it is called."""
    parameters = tool.schema["function"]["parameters"]
    given = call.arguments.keys()
    return given >= set(parameters.get("required", ())) and given <= parameters["properties"].keys()


async def _all_made(handle: Handle, calls: list[Call]) -> list[_Made]:
    """Those of async tools, together. A fault of one is raised when all have ended."""
    made: dict[int, _Made] = {}
    faults: list[EnvironmentFault] = []

    async def make(index: int, call: Call) -> None:
        try:
            made[index] = await _made(handle, call)
        except EnvironmentFault as fault:
            faults.append(fault)

    async with anyio.create_task_group() as group:
        for index, call in enumerate(calls):
            group.start_soon(make, index, call)
    if faults:
        raise faults[0]
    return [made[index] for index in range(len(calls))]


async def _made(handle: Handle, call: Call) -> _Made:
    began = anyio.current_time()
    try:
        content = await handle.call(call.name, own_copy(call.arguments))
    except ToolError as error:
        return _failed(call, str(error), anyio.current_time() - began)
    return _Made(call, content, "", anyio.current_time() - began)


def _failed(call: Call, error: str, seconds: float = 0.0) -> _Made:
    return _Made(call, str({"error": error}), error or "the tool failed", seconds)


def _recorded(made: _Made) -> ToolCall:
    return ToolCall(
        name=made.call.name,
        arguments=made.call.arguments,
        result=text_of(made.content),
        error=made.error,
        seconds=made.seconds,
    )
