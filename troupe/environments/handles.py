"""Who answers an episode: the live environment that it has, how it comes by one, and what it may ask of it.

An episode whose live environment is gone, with its process or because it was given up, is brought back when it next
needs one: by what it has saved, and by doing once more what came after that.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import anyio

from troupe.environments.convention import Content, EnvironmentSpec, Said, StepResult, ToolError
from troupe.environments.gate import Missing
from troupe.environments.ledger import EpisodeName
from troupe.environments.live import ITS_END, NO_ANSWER, Away, Budget, Deed, Died, Gone, Late, Live, Raised, Runner
from troupe.environments.settings import EnvironmentConfig
from troupe.messages.episodes import Answer, ToolCall
from troupe.messages.groups import PromptText

T = TypeVar("T")

_MOST_RETURNS = 5
"""Times that one answer may find its environment gone and have it brought back, and tries at each to do so while new
processes end; those that were lost with a machine do not count."""


class Talk:
    """An episode under way."""

    def __init__(
        self, name: EpisodeName, spec: EnvironmentSpec, prompt: PromptText, columns: Mapping[str, Any]
    ) -> None:
        self.name, self.spec, self.prompt, self.columns = name, spec, prompt, columns
        self.live: Live | None = None
        self.seen = -1
        """The newest turn that `live` knows of; −1: not even the opening."""
        self.said: dict[int, Said] = {}
        """By turn, from 1."""
        self.attributes: dict[str, Any] | None = None
        """Of its environment, when it has ended."""
        self.differs = False
        """Whether it was told already that it was brought back differently."""


class Asking(Protocol):
    """How turns are asked on a handle (`turns.py`)."""

    async def open(self, talk: Talk, handle: Any) -> Answer:
        """The opening."""

    async def answer(self, talk: Talk, handle: Any, said: Said) -> Answer:
        """A turn."""


class Tells(Protocol):
    """Who is told what has happened to an episode."""

    def __call__(self, kind: str, message: str, talk: Talk, turn: int) -> None:
        """An incident."""


class Handle:
    """What an episode may ask in one turn."""

    def __init__(
        self,
        talk: Talk,
        turn: int,
        answers: Sequence[Answer],
        runner: Runner,
        config: EnvironmentConfig,
        *,
        asking: Asking,
        tell: Tells,
        pause: Callable[[int], Awaitable[None]] = anyio.sleep,
    ) -> None:
        """`answers`: to the turns before this one. `pause(n)` waits before the n-th further attempt."""
        self._talk, self._turn, self._answers = talk, turn, answers
        self._runner, self._config, self._asking, self._tell, self._pause = runner, config, asking, tell, pause
        self._budget = Budget(config.turn_timeout_s)
        self._done: list[Deed] = []
        """In this turn, by the environment."""
        self._bringing = anyio.Lock()
        self.touched = False
        """Whether the environment was asked anything."""

    async def reset(self, columns: Mapping[str, Any]) -> Content | None:
        """Begin an episode."""
        return await self._ask(resetting(self._talk.spec, columns))  # type: ignore[no-any-return]

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Content:
        """Call a tool: the environment's, or one for all."""
        tool = self._talk.spec.tool(name)
        assert tool is not None, name
        attempts = self._config.retries + 1 if tool.retries else 1
        for attempt in range(attempts):
            if attempt:
                await self._pause(attempt)
            is_last = attempt + 1 == attempts
            try:
                if tool.is_method:
                    return await self._do(Deed(what="call", name=name, arguments=dict(arguments)))  # type: ignore[no-any-return]
                return await self._runner.call(name, arguments, self._budget)
            except Raised as error:
                if is_last or not error.passing:
                    raise ToolError(error.text) from None
            except (Late, Died, Gone) as error:
                if is_last:
                    raise self._given_up(name, error) from None
                self._budget = self._new_budget
        raise AssertionError

    async def step(self, text: str) -> StepResult:
        """Give the environment what the policy said."""
        return await self._ask(Deed(what="step", text=text))  # type: ignore[no-any-return]

    async def state_id(self, observation: str) -> str:
        """The name of a state."""
        return await self._ask(Deed(what="state_id", text=observation))  # type: ignore[no-any-return]

    async def save(self) -> bytes:
        """What the environment saves of itself. Raised, Late, Died or Gone where it does not."""
        live = self._talk.live
        if live is None or live.is_lost:
            return b""
        return await live.do(Deed(what="save_state"), self._new_budget)  # type: ignore[no-any-return]

    async def end(self) -> tuple[float | None, dict[str, Any]]:
        """What `get_reward` says, None where there is none, and the attributes."""
        reward = await self._ask(Deed(what="get_reward")) if self._talk.spec.has_reward else None
        return reward, await self._ask(Deed(what="attributes"))

    @property
    def _new_budget(self) -> Budget:
        return Budget(self._config.turn_timeout_s)

    async def _ask(self, deed: Deed) -> Any:
        """Have the environment do something that makes the episode missing where it fails."""
        attempts = self._config.retries + 1 if self._talk.spec.retries else 1
        for attempt in range(attempts):
            if attempt:
                await self._pause(attempt)
                self._budget = self._new_budget
            try:
                return await self._do(deed)
            except Raised as error:
                if attempt + 1 == attempts or not error.passing:
                    raise missing(deed, error) from None
            except (Late, Died, Gone) as error:
                if attempt + 1 == attempts:
                    raise missing(deed, error) from None
        raise AssertionError

    async def _do(self, deed: Deed) -> Any:
        returns = 0
        while returns < _MOST_RETURNS:
            live = await self._live()
            try:
                result = await live.do(deed, self._budget)
            except Gone as error:  # with what another episode did; it was not begun
                returns += not isinstance(error, Away)
                continue
            except Raised:
                if deed.what == "call":
                    self._done.append(deed)
                raise
            if deed.what in ("reset", "call", "step"):
                self._done.append(deed)
            return result
        raise Gone(f"its process was gone {_MOST_RETURNS} times")

    async def _live(self) -> Live:
        self.touched = True
        async with self._bringing:
            talk = self._talk
            if talk.live is not None and talk.live.is_lost:
                await self._runner.throw_away(talk.live)
                talk.live = None
            tries = 0
            while talk.live is None:
                try:
                    talk.live = await self._brought_back()
                except Away:
                    continue
                except Missing as error:
                    tries += 1
                    if tries == _MOST_RETURNS or not error.passing or error.kind != "environment_died":
                        raise
                    await self._pause(tries)
            return talk.live

    async def _brought_back(self) -> Live:
        answers, is_new = self._answers, not self._answers and not self._done
        if is_new:
            return await begun(self._runner, self._talk.spec)
        saved = max((turn for turn, answer in enumerate(answers) if answer.saved), default=-1)
        live = await begun(self._runner, self._talk.spec, new=saved >= 0)
        try:
            if saved >= 0:
                await live.do(Deed(what="load_state", saved=answers[saved].saved), self._new_budget)
            for turn in range(saved + 1, len(answers)):
                await self._repeat(live, turn, answers[turn])
            for deed in self._done:
                await self._redo(live, deed)
        except BaseException as error:
            await self._runner.throw_away(live)
            if isinstance(error, Raised | Late | Died | Gone) and not isinstance(error, Away):
                why = f"its environment could not be brought back: {told(error)}"
                if isinstance(error, Raised | Late):
                    raise Missing(why) from None
                raise Missing(why, "environment_died", passing=not getattr(error, "itself", False)) from None
            raise
        return live

    async def _redo(self, live: Live, deed: Deed) -> None:
        self._check_repeats()
        try:
            await live.do(deed, self._new_budget)
        except Raised:
            if deed.what != "call":
                raise

    async def _repeat(self, live: Live, turn: int, answer: Answer) -> None:
        """Ask a turn once more that was answered."""
        talk, handle = self._talk, Repeated(live, answer, self._config, self._check_repeats)
        if not turn:
            again = await self._asking.open(talk, handle)
        elif (said := talk.said.get(turn)) is not None:
            again = await self._asking.answer(talk, handle, said)
        else:
            raise Missing(f"its environment cannot be brought back: what was said in turn {turn} was not told again")
        if not talk.differs and (again.messages, again.done, again.reward) != (
            answer.messages,
            answer.done,
            answer.reward,
        ):
            talk.differs = True
            self._tell(
                "environment_differs",
                "was brought back by what had been asked of it, and answered otherwise; the first answer holds",
                talk,
                turn,
            )

    def _check_repeats(self) -> None:
        if self._config.on_lost == "missing":
            raise Missing("its environment is gone, and environment.on_lost has nothing repeated")

    def _given_up(self, name: str, error: Late | Died | Gone) -> Exception:
        """What a call comes to that was not made to its end."""
        if (isinstance(error, Died) and not error.itself) or isinstance(error, Gone):
            return Missing(f"the process of the tool {name} ended: {error}", "environment_died", passing=True)
        kind, text = "tool_timeout", str(error)
        if isinstance(error, Died):
            kind, text = "tool_died", f"{ITS_END}while it was called"
        self._tell(kind, f"tool {name}: {error}", self._talk, self._turn)
        return ToolError(text)


class Repeated:
    """A handle on which a turn is asked once more: the environment is asked again, tools for all are not."""

    def __init__(self, live: Live, answer: Answer, config: EnvironmentConfig, check: Callable[[], None]) -> None:
        self._live, self._answer, self._check = live, answer, check
        self._budget = Budget(config.turn_timeout_s)
        self._calls = list(answer.calls)

    async def reset(self, columns: Mapping[str, Any]) -> Content | None:
        """Begin once more."""
        return await self._do(resetting(self._live.spec, columns))  # type: ignore[no-any-return]

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Content:
        """Call a method once more; of a function, and of a call that was not made, what came of it then."""
        made = self._made(name, arguments)
        tool = self._live.spec.tool(name)
        if made is not None and (tool is None or not tool.is_method or made.error.startswith((NO_ANSWER, ITS_END))):
            if made.error:
                raise ToolError(made.error)
            return made.result
        try:
            return await self._do(Deed(what="call", name=name, arguments=dict(arguments)))  # type: ignore[no-any-return]
        except Raised as error:
            raise ToolError(error.text) from None

    async def step(self, text: str) -> StepResult:
        """Step once more."""
        return await self._do(Deed(what="step", text=text))  # type: ignore[no-any-return]

    async def state_id(self, observation: str) -> str:
        """What it was."""
        return self._answer.state or ""

    async def _do(self, deed: Deed) -> Any:
        self._check()
        return await self._live.do(deed, self._budget)

    def _made(self, name: str, arguments: Mapping[str, Any]) -> ToolCall | None:
        for place, call in enumerate(self._calls):
            if call.name == name and call.arguments == dict(arguments):
                return self._calls.pop(place)
        return None


def resetting(spec: EnvironmentSpec, columns: Mapping[str, Any]) -> Deed:
    """`reset` with the columns that it takes."""
    takes = spec.reset_takes
    return Deed(
        what="reset",
        arguments={name: value for name, value in columns.items() if takes is None or name in takes},
    )


async def begun(runner: Runner, spec: EnvironmentSpec, *, new: bool = False) -> Live:
    """A live environment; Missing where none can be made, Away where the machine went meanwhile."""
    try:
        return await runner.take(spec, new=new)
    except Away:
        raise
    except Raised as error:
        raise Missing(f"could not be made: {error.told}", passing=error.passing) from None
    except Late as error:
        raise Missing(f"could not be made: {error}", "environment_timeout", passing=True) from None
    except (Died, Gone) as error:
        passing = not getattr(error, "itself", False)
        raise Missing(f"could not be made: {error}", "environment_died", passing=passing) from None


def missing(deed: Deed, error: Raised | Late | Died | Gone) -> Missing:
    """Why an episode is missing of which a deed failed."""
    match error:
        case Raised():
            return Missing(f"{deed.what} failed: {error.told}", passing=error.passing)
        case Late():
            return Missing(f"{deed.what}: {error}", "environment_timeout", passing=True)
        case _:
            return Missing(f"{deed.what}: {error}", "environment_died", passing=not getattr(error, "itself", False))


def told(error: Exception) -> str:
    """What to tell of a failure."""
    return error.told if isinstance(error, Raised) else str(error)
