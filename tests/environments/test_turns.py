"""What comes back for a turn: in TRL's order and words, and for environments that answer whatever is said."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from tests.support.handles import PlainHandle
from troupe.environments import StepResult
from troupe.environments.calls import parse_turn
from troupe.environments.convention import Call, EnvironmentFault, Said
from troupe.environments.turns import answer_turn, open_episode
from troupe.messages import Answer

pytestmark = pytest.mark.anyio

PROMPT: list[dict[str, Any]] = [{"role": "system", "content": "Play."}, {"role": "user", "content": "Begin. "}]


def double(number: int) -> int:
    """Doubles.

    Args:
        number: Any
    """
    return 2 * number


def fail(why: str) -> str:
    """Fails.

    Args:
        why: What to say
    """
    raise ValueError(why)


def spoil(items: list[int]) -> int:
    """Empties a list.

    Args:
        items: Numbers
    """
    items.clear()
    return 0


async def slow(number: int, wait: float = 0.0) -> list[int]:
    """Waits.

    Args:
        number: Any
        wait: Seconds
    """
    await anyio.sleep(wait)
    return [number]


class Game:
    """Asks for a number, and has a tool."""

    def __init__(self) -> None:
        self.columns: dict[str, Any] = {}

    def reset(self, secret: int, prompt: Any) -> str:
        self.columns = {"secret": secret, "prompt": prompt}
        return "Guess!"

    def step(self, text: str) -> StepResult:
        if text == str(self.columns["secret"]):
            return StepResult(None, 1.0, True)
        return StepResult("no", 0.0, info={"said": text, "thing": {1}})

    def hint(self) -> str:
        """Tells it."""
        return str(self.columns["secret"])

    async def state_id(self, observation: str) -> str:
        return f"state {observation}"


def said(*calls: Call, text: str = "") -> Said:
    return Said(message={"role": "assistant", "content": text}, calls=calls)


def told(answer: Answer) -> list[tuple[str, str]]:
    return [(message["name"], message["content"]) for message in answer.messages]


async def test_calls_in_order_then_the_async_ones_which_run_together() -> None:
    handle = PlainHandle(functions=[double, fail, slow])
    calls = [
        Call(name="slow", arguments={"number": 1, "wait": 0.3}),
        Call(name="slow", arguments={"numbr": 1}),
        Call(name="double", arguments={"number": 2}),
        Call(name="slow", arguments={"number": 3, "wait": 0.3}),
        Call(name="", error="not JSON"),
        Call(name="none", arguments={}),
        Call(name="fail", arguments={"why": "it's"}),
    ]
    answer = await answer_turn(handle.spec, handle, said(*calls))
    assert told(answer) == [
        ("slow", "{'error': \"slow() got an unexpected keyword argument 'numbr'\"}"),
        ("double", "4"),
        ("unknown", "{'error': 'not JSON'}"),
        ("none", "{'error': 'Tool none not found.'}"),
        ("fail", "{'error': \"it's\"}"),
        ("slow", "[1]"),
        ("slow", "[3]"),
    ]
    assert [message["role"] for message in answer.messages] == ["tool"] * 7
    assert [bool(call.error) for call in answer.calls] == [True, False, True, True, True, False, False]
    assert [call.result for call in answer.calls] == [content for _, content in told(answer)]
    assert not answer.done
    assert 0.3 <= answer.seconds < 0.55


async def test_a_tool_cannot_change_what_was_said() -> None:
    handle = PlainHandle(functions=[spoil])
    call = Call(name="spoil", arguments={"items": [1]})
    assert (await answer_turn(handle.spec, handle, said(call))).calls[0].arguments == {"items": [1]}


async def test_without_calls_and_without_step_the_episode_has_ended() -> None:
    handle = PlainHandle(functions=[double])
    answer = await answer_turn(handle.spec, handle, said(text="Done."))
    assert (answer.done, answer.messages, answer.said["content"]) == (True, (), "Done.")
    assert (await open_episode(handle.spec, handle, PROMPT, {})).messages == ()
    assert handle.asked == []


async def test_reset_has_the_columns_that_it_takes_and_adds_to_the_last_message() -> None:
    handle = PlainHandle(Game())
    answer = await open_episode(handle.spec, handle, PROMPT, {"secret": 7, "other": 1})
    assert answer.messages == (PROMPT[0], {"role": "user", "content": "Begin. Guess!"})
    assert PROMPT[1]["content"] == "Begin. "
    assert handle.asked[0] == ("reset", {"secret": 7, "prompt": PROMPT})
    assert (answer.state, answer.done) == ("state Guess!", False)


async def test_blocks_of_text_are_put_together_with_text() -> None:
    class Blocks:
        def reset(self, **columns: Any) -> Any:
            return [{"type": "text", "text": "b"}]

    handle = PlainHandle(Blocks())
    (message,) = (await open_episode(handle.spec, handle, "a", {})).messages
    assert message["content"] == [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


async def test_step_is_given_what_calls_no_tool() -> None:
    handle = PlainHandle(Game())
    await open_episode(handle.spec, handle, PROMPT, {"secret": 7})
    tool = await answer_turn(handle.spec, handle, said(Call(name="hint"), text="Let me see."))
    assert (told(tool), tool.reward, tool.state) == ([("hint", "7")], None, "state 7")
    missed = await answer_turn(handle.spec, handle, parse_turn("<think>6?</think> 6", "hermes", handle.spec.tools))
    assert missed.messages == ({"role": "user", "content": "no"},)
    assert (missed.reward, missed.done, missed.info) == (0.0, False, {"said": "6", "thing": [1]})
    won = await answer_turn(handle.spec, handle, said(text="7"))
    assert (won.messages, won.reward, won.done, won.state) == ((), 1.0, True, "state ")


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("no", "step of Odd returned 'no' \\(str\\); return troupe.environments.StepResult"),
        (StepResult("a", float("nan")), "the reward nan"),
        (StepResult("a", "1"), "the reward '1'"),  # type: ignore[arg-type]
        (StepResult(3), "the observation 3"),  # type: ignore[arg-type]
        (("a", 1.0, False, None), "the info None"),
    ],
)
async def test_what_step_must_not_return_makes_the_episode_missing(result: Any, message: str) -> None:
    class Odd:
        def reset(self, **columns: Any) -> None: ...

        def step(self, text: str) -> Any:
            return result

    handle = PlainHandle(Odd())
    with pytest.raises(EnvironmentFault, match=message):
        await answer_turn(handle.spec, handle, said())


@pytest.mark.parametrize("result", [("a", 1, False, {}), ("a", 1, False, False, {})])
async def test_gymnasiums_tuples_are_taken(result: Any) -> None:
    class Gym:
        def reset(self, **columns: Any) -> None: ...

        def step(self, text: str) -> Any:
            return result

    handle = PlainHandle(Gym())
    answer = await answer_turn(handle.spec, handle, said())
    assert (answer.messages, answer.reward, answer.done) == (({"role": "user", "content": "a"},), 1.0, False)


async def test_a_fault_of_an_async_tool_comes_when_all_have_ended() -> None:
    class Broken(PlainHandle):
        async def call(self, name: str, arguments: Any) -> Any:
            if arguments["number"] == 1:
                raise EnvironmentFault("its process died")
            return await super().call(name, arguments)

    handle = Broken(functions=[slow])
    calls = [Call(name="slow", arguments={"number": n, "wait": 0.05}) for n in (1, 2)]
    with pytest.raises(EnvironmentFault, match="died"):
        await answer_turn(handle.spec, handle, said(*calls))
    assert handle.asked == [("slow", {"number": 2, "wait": 0.05})]
