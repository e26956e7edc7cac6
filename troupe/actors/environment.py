"""Environment: answers the turns of episodes, and says of each group what became of them."""

from collections.abc import Callable, Collection
from functools import partial
from typing import ClassVar

from troupe.actors.conversations import Conversations
from troupe.messages import Answered, Hold, Incident, Observation, RolloutGroup, TurnTaken
from troupe.runtime.actor import Actor
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter


class Environment(Actor):
    """Receives TurnTaken, and RolloutGroup when all its samples have ended; sends Observation, RolloutGroup with its
    episodes, Answered, and Hold while an environment is down.

    The mailbox is never held up: each turn is answered in a task of its own. How many are under way is the manager's
    limit. The conversations outlive the actor, so what was answered is not asked again; the environments are started
    and stopped by the supervisor.
    """

    name = "environment"
    acknowledges: ClassVar[bool] = True

    def __init__(
        self,
        inbox: Mailbox,
        groups: Channel[RolloutGroup],
        observations: Channel[Observation],
        answered: Channel[Answered],
        *,
        conversations: Conversations,
        alive: Callable[[], Collection[int]],
        hold: Channel[Hold] | None = None,
        report: Reporter | None = None,
    ) -> None:
        """`alive`: the groups that may still be asked about."""
        super().__init__(inbox, [groups, observations, answered, *([] if hold is None else [hold])], report)
        self._groups, self._observations, self._answered = groups, observations, answered
        self._conversations = conversations
        self._alive = alive
        self._hold = hold

    async def start(self) -> None:
        """Listen to the environments, and say which are down now: an actor before may have said otherwise."""
        self._conversations.manager.listen(self._note)
        self._send_hold()

    async def handle(self, message: TurnTaken | RolloutGroup) -> None:
        """Begin to answer."""
        if isinstance(message, TurnTaken):
            self.tasks.start_soon(self._answer, message)
        else:
            self.tasks.start_soon(self._end, message)

    async def stop(self) -> None:
        """Listen no more."""
        self._conversations.manager.listen(None)

    async def _answer(self, taken: TurnTaken) -> None:
        span = partial(self.report.span, step=taken.prompt.slot.step, gid=taken.prompt.gid)
        observation, answered = await self._conversations.answer(taken, span)
        if answered is not None:
            await self._answered.send(answered)
        await self._observations.send(observation)
        self.inbox.done(taken)

    async def _end(self, group: RolloutGroup) -> None:
        ended = group
        if not group.episodes:  # else it was sampled before the run was resumed
            with self.report.span("end episodes", step=group.prompt.slot.step, gid=group.prompt.gid):
                ended, answered = await self._conversations.end(group)
            for each in answered:
                await self._answered.send(each)
        await self._groups.send(ended)
        self.inbox.done(group)
        self._conversations.forget(self._alive())

    def _note(self, incident: Incident) -> None:
        self.report.incident_nowait(incident)
        self._send_hold()

    def _send_hold(self) -> None:
        if self._hold is not None and not self._hold.closed:
            down = self._conversations.manager.down
            reasons = tuple(f"environment {name} is down: {why}" for name, why in down.items())
            self._hold.send_nowait(Hold(sender=self.name, reasons=reasons))
