"""The Environment actor and the conversations that it keeps: answers, endings, who asks twice."""

from __future__ import annotations

from typing import Any

import anyio
import msgspec
import pytest

from tests.support.acting import CONTEXT, WORLD, FakeWords, Follows, conversations_of, understand
from tests.support.fakes import Reports, make_prompt, make_rollout, taken
from troupe.actors.conversations import Conversations, Rules
from troupe.actors.environment import Environment
from troupe.environments.events import Ending
from troupe.environments.ledger import ENDING
from troupe.messages import Answer, Answered, Hold, Incident, Observation, RolloutGroup, TurnTaken
from troupe.runtime.mailbox import Mailbox

pytestmark = pytest.mark.anyio

PROMPT = make_prompt(2, 1)
FOLLOWS = Follows((1, 2))
ASKED = ({"role": "user", "content": "and?"},)


class Manager:
    """Answers what it is told to, and notes what it was asked."""

    def __init__(self, *answers: Answer, ending: Ending | None = None) -> None:
        self.answers, self.ending = list(answers), ending or Ending()
        self.asked: list[tuple[Any, ...]] = []
        self.down = {"game": "it raised"}
        self.listener: Any = None
        self.gone: list[int] = []
        self.ledger = self

    async def open(self, name: Any, prompt: Any, columns: Any) -> Answer:
        self.asked.append(("open", *name))
        return self.answers.pop(0)

    async def answer(self, name: Any, turn: int, token_ids: Any, said: Any) -> Answer:
        self.asked.append((turn, *name, token_ids))
        await anyio.lowlevel.checkpoint()
        return msgspec.structs.replace(self.answers.pop(0), said=said.message)

    async def close(self, name: Any, turns: int) -> Ending:
        self.asked.append(("close", *name, turns))
        return self.ending

    def listen(self, listener: Any) -> None:
        self.listener = listener

    def settled(self, gid: int) -> None:
        self.gone.append(gid)

    def forget(self, gid: int) -> None:
        pass


class FixedWords(FakeWords):
    def __init__(self, follows: Follows) -> None:
        self.follows = follows

    def following(self, *given: Any, **settings: Any) -> Follows:
        return self.follows


def turn(number: int, *ids: int, room: int = 20, reason: Any = "stop", asker: int = 4) -> TurnTaken:
    return TurnTaken(
        prompt=PROMPT,
        sample=0,
        turn=number,
        token_ids=ids,
        finish_reason=reason,
        start=10 * (number - 1) if number else 0,
        room=room,
        asker=asker,
    )


def over(manager: Any, follows: Follows = FOLLOWS, **rules: Any) -> Conversations:
    words: Any = {"game": FixedWords(follows)}
    return Conversations(manager, WORLD, words, understand=understand, rules=Rules(context=CONTEXT, **rules))


async def test_turns_are_answered_and_make_an_episode() -> None:
    manager = Manager(
        Answer(said={}), Answer(said={}, messages=ASKED, reward=1.0), Answer(said={}, done=True, reward=2.0)
    )
    talks = over(manager, gamma=0.5)
    opened, _ = await talks.answer(turn(0))
    assert (opened.done, opened.ids, opened.prompt_ids, opened.asker) == (False, (), None, 4)
    first, recorded = await talks.answer(turn(1, 7, 8))
    assert (first.done, first.ids) == (False, (1, 2))
    assert recorded is not None
    assert (recorded.turn, recorded.token_ids, recorded.answer.said["content"]) == (1, (7, 8), "7 8")
    second, _ = await talks.answer(turn(2, 9))
    assert second.done
    group, answered = await talks.end(RolloutGroup(prompt=PROMPT, rollouts=(make_rollout([7, 8, 1, 2, 9]),)))
    [episode] = group.episodes
    assert [(each.start, each.stop) for each in episode.turns] == [(0, 2), (10, 11)]
    assert episode.reward == 1.0 + 0.5 * 2.0
    assert [(each.turn, each.token_ids) for each in answered] == [(ENDING, (2,))]
    assert manager.asked[-1] == ("close", PROMPT.gid, 0, 2)


@pytest.mark.parametrize(("done", "reward"), [(False, 0.0), (True, None)])
async def test_what_was_cut_off_before_any_reward_is_worth_nothing(done: bool, reward: float | None) -> None:
    """But an environment that ends episodes without a reward has none to give."""
    talks = over(Manager(Answer(said={}), Answer(said={}, messages=ASKED, done=done)))
    await talks.answer(turn(0))
    await talks.answer(turn(1, 7, 8, reason="length"))
    group, _ = await talks.end(RolloutGroup(prompt=PROMPT, rollouts=(make_rollout([7, 8]),)))
    assert group.episodes[0].reward == reward


async def test_who_asks_again_gets_what_was_answered() -> None:
    manager = Manager(Answer(said={}), *(Answer(said={}, messages=ASKED) for _ in range(3)))
    talks = over(manager)
    await talks.answer(turn(0))
    both: list[Observation] = []

    async def ask(asker: int) -> None:
        both.append((await talks.answer(turn(1, 7, asker=asker)))[0])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(ask, 4)
        tasks.start_soon(ask, 5)
    assert [each.asker for each in both] == [4, 5]
    await talks.answer(turn(2, 8))
    assert len(manager.asked) == 3
    await talks.answer(turn(1, 6))  # in the free schedule it may go on in another way
    assert len(manager.asked) == 4
    with pytest.raises(RuntimeError, match="turn 3"):
        await talks.answer(turn(3, 9))


@pytest.mark.parametrize(
    ("room", "reason", "answer", "follows"),
    [
        pytest.param(2, "stop", Answer(said={}, messages=ASKED), Follows((1, 2)), id="no room"),
        pytest.param(
            20, "stop", Answer(said={}, messages=ASKED), Follows((), (0,) * CONTEXT), id="no room in a new row"
        ),
        pytest.param(20, "length", Answer(said={}, messages=ASKED), Follows((1,)), id="cut"),
        pytest.param(20, "stop", Answer(said={}, failed="it fell over"), Follows((1,)), id="failed"),
        pytest.param(20, "stop", Answer(said={}), Follows((1,)), id="nothing came back"),
    ],
)
async def test_what_ends_an_episode(room: int, reason: Any, answer: Answer, follows: Follows) -> None:
    talks = over(Manager(Answer(said={}), answer), follows)
    await talks.answer(turn(0))
    observation, _ = await talks.answer(turn(1, 7, room=room, reason=reason))
    assert observation.done
    group, _ = await talks.end(RolloutGroup(prompt=PROMPT, rollouts=(make_rollout([7]),)))
    [episode] = group.episodes
    assert episode.failed == answer.failed
    if follows.ids == (1, 2) or follows.prompt_ids:
        assert episode.turns[0].answer.messages == (), "what does not fit is dropped"


async def test_the_last_turn_is_played_where_there_is_a_step_and_asks_no_tool() -> None:
    manager = Manager(Answer(said={}), Answer(said={}, messages=ASKED, reward=0.5), ending=Ending(reward=3.0))
    talks = over(manager, max_turns=1)
    await talks.answer(turn(0))
    observation, recorded = await talks.answer(turn(1, 7))
    assert observation.done
    assert recorded is not None
    assert recorded.answer.reward == 0.5
    group, _ = await talks.end(RolloutGroup(prompt=PROMPT, rollouts=(make_rollout([7]),)))
    assert group.episodes[0].reward == 3.0, "get_reward counts where there is one"


class Rig:
    """The actor and its neighbours."""

    def __init__(self, manager: Any, talks: Conversations) -> None:
        self.inbox, self.scorer, self.generator = Mailbox("environment"), Mailbox("scorer"), Mailbox("generator")
        self.metrics, self.prompter, self.reports = Mailbox("metrics"), Mailbox("prompter"), Reports()
        self.turns = self.inbox.channel("turns", TurnTaken, bound=9)
        self.sampled = self.inbox.channel("sampled", RolloutGroup, bound=9)
        self.alive: set[int] = {PROMPT.gid}
        self.actor = Environment(
            self.inbox,
            self.scorer.channel("rollouts", RolloutGroup, bound=9),
            self.generator.channel("observations", Observation, bound=9),
            self.metrics.channel("answered", Answered, bound=9),
            conversations=talks,
            alive=lambda: self.alive,
            hold=self.prompter.channel("hold", Hold, bound=1, overflow="newest"),
            report=self.reports.reporter("environment"),
        )


async def test_the_actor_answers_records_and_ends_groups() -> None:
    manager: Any = Manager(Answer(said={}), Answer(said={}, done=True))
    rig = Rig(manager, over(manager))
    for each in (turn(0), turn(1, 7)):
        rig.turns.send_nowait(each)
    rig.turns.close()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rig.actor.run)
        while not manager.listener or len(rig.generator) < 2:
            await anyio.lowlevel.checkpoint()
        manager.listener(Incident(actor="environment", kind="environment_down", message="it is down"))
        rig.alive.clear()
        rig.sampled.send_nowait(RolloutGroup(prompt=PROMPT, rollouts=(make_rollout([7]),)))
        rig.sampled.close()
    assert [each.done for each in await taken(rig.generator)] == [False, True]
    assert [each.turn for each in await taken(rig.metrics)] == [0, 1, ENDING]
    [group] = await taken(rig.scorer)
    assert len(group.episodes) == 1
    [hold] = await taken(rig.prompter)
    assert hold == Hold(sender="environment", reasons=("environment game is down: it raised",))
    assert manager.gone == [PROMPT.gid]
    assert [each.kind for each in await rig.reports.incidents()] == ["environment_down"]
    assert manager.listener is None


async def test_a_group_that_was_sampled_before_a_resume_is_handed_on() -> None:
    manager: Any = Manager()
    rig = Rig(manager, conversations_of(manager))
    before, _ = await over_one_group()
    rig.sampled.send_nowait(before)
    rig.sampled.close()
    rig.turns.close()
    await rig.actor.run()
    assert await taken(rig.scorer) == [before]
    assert not manager.asked


async def over_one_group() -> tuple[RolloutGroup, list[Answered]]:
    talks = over(Manager(Answer(said={}), Answer(said={}, done=True)))
    await talks.answer(turn(0))
    await talks.answer(turn(1, 7))
    return await talks.end(RolloutGroup(prompt=PROMPT, rollouts=(make_rollout([7]),)))
