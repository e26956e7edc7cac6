"""Conversations: what was said in the episodes of a run, and what follows from each turn. The Environment actor uses
them, and evaluation without actors."""

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import anyio
import msgspec

from troupe.environments.convention import EnvironmentSpec, Said, World
from troupe.environments.events import Ending
from troupe.environments.ledger import ENDING, EpisodeName
from troupe.environments.manager import EnvironmentManager
from troupe.messages import (
    Answer,
    Answered,
    ChatMessage,
    Episode,
    Observation,
    Prompt,
    PromptText,
    RolloutGroup,
    Turn,
    TurnTaken,
)
from troupe.runtime.roles import together


class Following(Protocol):
    """What follows a turn, in ids."""

    @property
    def ids(self) -> tuple[int, ...]: ...
    @property
    def prompt_ids(self) -> tuple[int, ...] | None: ...


class Words(Protocol):
    """How the conversations of one environment are told in ids."""

    def opening(self, messages: Sequence[ChatMessage]) -> tuple[int, ...]:
        """Of a prompt."""

    def following(
        self,
        messages: Sequence[ChatMessage],
        said: ChatMessage,
        sampled_ids: Sequence[int],
        new: Sequence[ChatMessage],
        *,
        given: int | None = None,
    ) -> Following:
        """Of what came back to a turn; `given` of the messages are the prompt."""


Understand: TypeAlias = Callable[[Sequence[int], Sequence[int], EnvironmentSpec], Said]
"""Sampled ids, and those that were read before them → what they say."""


class _Told(NamedTuple):
    """A turn that was answered."""

    taken: TurnTaken
    answer: Answer
    observation: Observation
    messages: tuple[ChatMessage, ...] = ()
    """That the policy reads now; those of a turn that did not fit are left out."""
    was_asked: bool = True
    """Whether somebody had to answer."""


class _Conversation:
    """Of one sample."""

    def __init__(self) -> None:
        self.told: list[_Told] = []
        self.at_work = anyio.Lock()

    def opening(self, prompt: PromptText) -> list[ChatMessage]:
        """What was said before the first turn."""
        return list(self.told[0].answer.messages) or as_messages(prompt)

    def turns(self) -> list[ChatMessage]:
        """All that was said since."""
        return [message for told in self.told[1:] for message in (told.answer.said, *told.messages)]


def as_messages(prompt: PromptText) -> list[ChatMessage]:
    """A prompt as a conversation."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


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
        manager: EnvironmentManager,
        world: World,
        words: Mapping[str, Words],
        *,
        understand: Understand,
        rules: Rules,
    ) -> None:
        """`words`: of each environment."""
        self.manager = manager
        self._world = world
        self._words = words
        self._understand = understand
        self._rules = rules
        self._open: dict[int, dict[int, _Conversation]] = {}

    async def answer(
        self, taken: TurnTaken, span: Callable[[str], AbstractContextManager[Any]] = nullcontext
    ) -> tuple[Observation, Answered | None]:
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
        observation = msgspec.structs.replace(found.observation, asker=taken.asker)
        if not found.was_asked:
            return observation, None
        return observation, Answered(
            gid=taken.prompt.gid,
            slot=taken.prompt.slot,
            sample=taken.sample,
            turn=taken.turn,
            token_ids=taken.token_ids,
            answer=found.answer,
        )

    async def end(self, group: RolloutGroup) -> tuple[RolloutGroup, list[Answered]]:
        """A group whose samples have all ended, with what became of them; and what is to be recorded of that."""
        prompt, size = group.prompt, len(group.rollouts)
        turns = [sum(told.was_asked for told in self._of(prompt.gid, sample).told) - 1 for sample in range(size)]
        endings: dict[int, Ending] = {}

        async def close(sample: int) -> None:
            endings[sample] = await self.manager.close(EpisodeName(prompt.gid, sample), turns[sample])

        await together([partial(close, sample) for sample in range(size)])
        episodes = tuple(self._episode(prompt, sample, endings[sample]) for sample in range(size))
        answered = [
            Answered(
                gid=prompt.gid,
                slot=prompt.slot,
                sample=sample,
                turn=ENDING,
                token_ids=(turns[sample],),
                answer=endings[sample].answer,
            )
            for sample in range(size)
        ]
        return msgspec.structs.replace(group, episodes=episodes), answered

    def forget(self, alive: Collection[int]) -> None:
        """Keep of groups those that are alive only."""
        for gid in [gid for gid in self._open if gid not in alive]:
            del self._open[gid]
            self.manager.settled(gid)
            self.manager.ledger.forget(gid)

    def spec_of(self, prompt: Prompt) -> EnvironmentSpec:
        """The environment of a prompt."""
        return self._world.spec_of(prompt.columns)

    def _of(self, gid: int, sample: int) -> _Conversation:
        return self._open.setdefault(gid, {}).setdefault(sample, _Conversation())

    def _name(self, taken: TurnTaken) -> EpisodeName:
        return EpisodeName(taken.prompt.gid, taken.sample)

    async def _turn(
        self, conversation: _Conversation, taken: TurnTaken, span: Callable[[str], AbstractContextManager[Any]]
    ) -> _Told:
        spec = self.spec_of(taken.prompt)
        if not taken.turn:
            with span(f"reset {spec.label or 'episode'}"):
                answer = await self.manager.open(self._name(taken), taken.prompt.prompt, taken.prompt.columns)
            return self._opened(spec, taken, answer)
        before = conversation.told[-1].observation
        read = before.prompt_ids or before.ids or taken.prompt.prompt_ids
        said = self._understand(taken.token_ids, read, spec)
        last = taken.turn == self._rules.max_turns
        if last and (said.calls or not spec.has_step):
            answer = Answer(said=said.message, done=True)  # nobody would read what it asks for
            return _Told(taken, answer, self._done(taken), was_asked=False)
        with span(_what(spec, said)):
            answer = await self.manager.answer(self._name(taken), taken.turn, taken.token_ids, said)
        if answer.done or answer.failed or last or taken.finish_reason != "stop" or not answer.messages:
            return _Told(taken, answer, self._done(taken), answer.messages)
        prompt = conversation.opening(taken.prompt.prompt)
        follows = self._words[spec.name].following(
            [*prompt, *conversation.turns()], answer.said, taken.token_ids, answer.messages, given=len(prompt)
        )
        begins = follows.prompt_ids
        room = taken.room if begins is None else self._rules.context - len(begins)
        if len(follows.ids) >= room:
            return _Told(taken, answer, self._done(taken))
        return _Told(taken, answer, self._goes_on(taken, follows.ids, begins), answer.messages)

    def _opened(self, spec: EnvironmentSpec, taken: TurnTaken, answer: Answer) -> _Told:
        if answer.failed or answer.done:
            return _Told(taken, answer, self._done(taken))
        begins = None
        if answer.messages:
            begins = self._words[spec.name].opening(list(answer.messages))
            if len(begins) >= self._rules.context:
                why = f"the opening has {len(begins)} tokens with the prompt; at most {self._rules.context - 1} fit"
                answer = msgspec.structs.replace(answer, failed=why)
                return _Told(taken, answer, self._done(taken))
            if begins == taken.prompt.prompt_ids:
                begins = None
        return _Told(taken, answer, self._goes_on(taken, (), begins))

    def _done(self, taken: TurnTaken) -> Observation:
        return Observation(gid=taken.prompt.gid, sample=taken.sample, turn=taken.turn, done=True)

    def _goes_on(self, taken: TurnTaken, ids: tuple[int, ...], begins: tuple[int, ...] | None) -> Observation:
        return Observation(gid=taken.prompt.gid, sample=taken.sample, turn=taken.turn, ids=ids, prompt_ids=begins)

    def _episode(self, prompt: Prompt, sample: int, ending: Ending) -> Episode:
        opening, *turns = self._of(prompt.gid, sample).told
        answers = [told.answer for told in turns]
        failed = next((answer.failed for answer in (opening.answer, *answers) if answer.failed), ending.failed)
        reward = self._summed(answers) if ending.reward is None else ending.reward
        if reward is None and self.spec_of(prompt).has_step and answers and not answers[-1].done:
            reward = 0.0  # cut off before the environment had said what it is worth
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
