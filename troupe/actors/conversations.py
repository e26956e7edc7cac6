"""Conversations: what was said in the episodes of a run, and what follows from each turn. The Environment actor uses
them, and evaluation without actors."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, TypeAlias

import anyio
import msgspec

from troupe.environments.convention import EnvironmentSpec, Said, World
from troupe.messages import (
    Answer,
    Answered,
    ChatMessage,
    Episode,
    FinishReason,
    Incident,
    Observation,
    Prompt,
    PromptText,
    RolloutGroup,
    Turn,
    TurnTaken,
)


class Following(Protocol):
    """What follows a turn, in ids."""

    @property
    def ids(self) -> tuple[int, ...]: ...
    @property
    def prompt_ids(self) -> tuple[int, ...] | None: ...


class Words(Protocol):
    """How the conversations of one environment are told in ids."""

    def opening(self, messages: PromptText) -> tuple[int, ...]:
        """Of a prompt."""

    def following(
        self,
        messages: Sequence[ChatMessage],
        said: ChatMessage,
        sampled_ids: Sequence[int],
        finish_reason: FinishReason,
        new: Sequence[ChatMessage],
    ) -> Following:
        """Of what came back to a turn."""


class Ending(Protocol):
    """What an environment says at the end of an episode."""

    @property
    def reward(self) -> float | None: ...
    @property
    def attributes(self) -> dict[str, Any]: ...
    @property
    def failed(self) -> str: ...


Understand: TypeAlias = Callable[[Sequence[int], Sequence[int], EnvironmentSpec], Said]
"""Sampled ids, and those that were read before them → what they say."""


class Name(NamedTuple):
    """Of an episode."""

    gid: int
    sample: int


class Answers(Protocol):
    """Who gives the answers of environments: the manager, or a stand-in."""

    async def open(self, name: Any, prompt: PromptText, columns: Mapping[str, Any]) -> Answer: ...
    async def answer(self, name: Any, turn: int, token_ids: Sequence[int], said: Said) -> Answer: ...
    async def close(self, name: Any, turns: Sequence[Answer]) -> Ending: ...
    def forget(self, gid: int) -> None: ...
    def listen(self, told: Callable[[Incident], None] | None) -> None: ...
    @property
    def down(self) -> Mapping[str, str]: ...


class _Told(NamedTuple):
    """A turn that was answered."""

    taken: TurnTaken
    answer: Answer
    observation: Observation
    messages: tuple[ChatMessage, ...]
    """That the policy reads now; those of a turn that did not fit are left out."""


class _Conversation:
    """Of one sample."""

    def __init__(self) -> None:
        self.told: list[_Told] = []
        self.at_work = anyio.Lock()

    def messages(self, prompt: PromptText) -> list[ChatMessage]:
        """All that was said so far."""
        opening, *turns = self.told
        said = list(opening.answer.messages) or (prompt if isinstance(prompt, list) else _as_messages(prompt))
        for told in turns:
            said = [*said, told.answer.said, *told.messages]
        return said


def _as_messages(prompt: str) -> list[ChatMessage]:
    return [{"role": "user", "content": prompt}]


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """When episodes end, and what their turns are worth."""

    max_turns: int | None = None
    gamma: float = 1.0
    context: int
    """Most tokens of a row, its prompt included."""


class Conversations:
    """Answers turns: understands what was sampled, has the environment answer, and renders what comes back.

    All that was said is kept until `forget`, and outlives the actor that asks: a turn that is told of once more, by a
    generator that has begun again, gets the same answer. An episode ends when the environment says so, when no tool is
    called where there is no `step`, with a turn that was cut or is the last of `max_turns`, or when what comes back
    leaves no room for a turn; it is then left out, as in TRL.
    """

    def __init__(
        self,
        answers: Answers,
        world: World,
        words: Mapping[str, Words],
        *,
        understand: Understand,
        rules: Rules,
    ) -> None:
        """`words`: of each environment."""
        self.answers = answers
        self._world = world
        self._words = words
        self._understand = understand
        self._rules = rules
        self._open: dict[int, dict[int, _Conversation]] = {}

    async def answer(
        self, taken: TurnTaken, span: Callable[[str], AbstractContextManager[Any]] = nullcontext
    ) -> tuple[Observation, Answered]:
        """What a sample reads after its turn, and what is to be recorded of that. `span` times what is waited for."""
        conversation = self._of(taken.prompt.gid, taken.sample)
        async with conversation.at_work:  # who asks once more waits for the first
            told = conversation.told
            if len(told) <= taken.turn or told[taken.turn].taken.token_ids != taken.token_ids:
                del told[taken.turn :]
                if len(told) < taken.turn:
                    raise RuntimeError(f"turn {taken.turn} of {self._name(taken)} came before turn {len(told)}")
                told.append(await self._turn(conversation, taken, span))
            found = told[taken.turn]
        answered = Answered(
            gid=taken.prompt.gid,
            slot=taken.prompt.slot,
            sample=taken.sample,
            turn=taken.turn,
            token_ids=taken.token_ids,
            answer=found.answer,
        )
        return msgspec.structs.replace(found.observation, asker=taken.asker), answered

    async def end(self, group: RolloutGroup) -> RolloutGroup:
        """A group whose samples have all ended, with what became of them."""
        episodes: list[Episode] = []

        async def add(sample: int) -> None:
            episodes[sample] = await self._episode(group.prompt, sample)

        empty = Episode(environment="", opening=Answer(said={}), turns=())
        episodes += [empty] * len(group.rollouts)
        async with anyio.create_task_group() as tasks:
            for sample in range(len(group.rollouts)):
                tasks.start_soon(add, sample)
        return msgspec.structs.replace(group, episodes=tuple(episodes))

    def forget(self, alive: Collection[int]) -> None:
        """Keep of groups those that are alive only."""
        for gid in [gid for gid in self._open if gid not in alive]:
            del self._open[gid]
            self.answers.forget(gid)

    def spec_of(self, prompt: Prompt) -> EnvironmentSpec:
        """The environment of a prompt."""
        return self._world.spec_of(prompt.columns)

    def _of(self, gid: int, sample: int) -> _Conversation:
        return self._open.setdefault(gid, {}).setdefault(sample, _Conversation())

    def _name(self, taken: TurnTaken) -> Name:
        return Name(taken.prompt.gid, taken.sample)

    async def _turn(
        self, conversation: _Conversation, taken: TurnTaken, span: Callable[[str], AbstractContextManager[Any]]
    ) -> _Told:
        spec = self.spec_of(taken.prompt)
        if not taken.turn:
            with span(f"reset {spec.label or 'episode'}"):
                answer = await self.answers.open(self._name(taken), taken.prompt.prompt, taken.prompt.columns)
            return self._opened(spec, taken, answer)
        before = conversation.told[-1].observation
        read = before.prompt_ids or before.ids or taken.prompt.prompt_ids
        said = self._understand(taken.token_ids, read, spec)
        last = taken.turn == self._rules.max_turns
        if last and (said.calls or not spec.has_step):
            answer = Answer(said=said.message, done=True)  # what it asks for has nobody to read it
        else:
            with span(_what(spec, said)):
                answer = await self.answers.answer(self._name(taken), taken.turn, taken.token_ids, said)
        if answer.done or answer.failed or last or taken.finish_reason != "stop" or not answer.messages:
            return _Told(taken, answer, self._done(taken), answer.messages)
        messages = conversation.messages(taken.prompt.prompt)
        follows = self._words[spec.name].following(
            messages, answer.said, taken.token_ids, taken.finish_reason, answer.messages
        )
        begins = follows.prompt_ids
        room = taken.room if begins is None else self._rules.context - len(begins)
        if len(follows.ids) >= room:
            return _Told(taken, answer, self._done(taken), ())
        return _Told(taken, answer, self._goes_on(taken, follows.ids, begins), answer.messages)

    def _opened(self, spec: EnvironmentSpec, taken: TurnTaken, answer: Answer) -> _Told:
        if answer.failed or answer.done:
            return _Told(taken, answer, self._done(taken), ())
        begins = None
        if answer.messages:
            begins = self._words[spec.name].opening(list(answer.messages))
            if len(begins) >= self._rules.context:
                why = f"the opening has {len(begins)} tokens with the prompt; at most {self._rules.context - 1} fit"
                answer = msgspec.structs.replace(answer, failed=why)
                return _Told(taken, answer, self._done(taken), ())
            if begins == taken.prompt.prompt_ids:
                begins = None
        return _Told(taken, answer, self._goes_on(taken, (), begins), ())

    def _done(self, taken: TurnTaken) -> Observation:
        return Observation(gid=taken.prompt.gid, sample=taken.sample, turn=taken.turn, done=True)

    def _goes_on(self, taken: TurnTaken, ids: tuple[int, ...], begins: tuple[int, ...] | None) -> Observation:
        return Observation(gid=taken.prompt.gid, sample=taken.sample, turn=taken.turn, ids=ids, prompt_ids=begins)

    async def _episode(self, prompt: Prompt, sample: int) -> Episode:
        opening, *turns = self._of(prompt.gid, sample).told
        answers = [told.answer for told in turns]
        ending = await self.answers.close(Name(prompt.gid, sample), [opening.answer, *answers])
        failed = next((answer.failed for answer in (opening.answer, *answers) if answer.failed), ending.failed)
        reward = self._summed(answers) if ending.reward is None else ending.reward
        return Episode(
            environment=self.spec_of(prompt).name,
            opening=opening.answer,
            turns=tuple(
                Turn(
                    start=told.taken.start,
                    stop=told.taken.start + len(told.taken.token_ids),
                    answer=msgspec.structs.replace(told.answer, messages=told.messages),
                )
                for told in turns
            ),
            reward=None if failed else reward,
            failed=failed,
            attributes=ending.attributes,
        )

    def _summed(self, answers: Sequence[Answer]) -> float | None:
        """What the turns are worth together; None where none has a reward."""
        rewards = [(t, answer.reward) for t, answer in enumerate(answers) if answer.reward is not None]
        return sum(self._rules.gamma**t * reward for t, reward in rewards) if rewards else None


def _what(spec: EnvironmentSpec, said: Said) -> str:
    """What is waited for."""
    called = dict.fromkeys(call.name for call in said.calls if call.name)
    return f"tool {', '.join(called)}" if called else f"step {spec.label}"
