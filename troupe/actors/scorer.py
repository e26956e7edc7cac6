"""Scorer: gives every completion its scores. All groups in hand are scored at the same time."""

from collections.abc import Callable
from typing import ClassVar

from troupe.messages import Hold, Incident, RolloutGroup, ScoredGroup
from troupe.rewards import RewardManager, TrainerState
from troupe.runtime.actor import Actor
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter


class Scorer(Actor):
    """Receives RolloutGroup; sends ScoredGroup in the order in which scores are complete, and Hold while a reward is
    down.

    The mailbox is never held up: a group is scored in a task of its own while the next ones arrive. How many calls of
    a reward run at once is the reward's own limit; how many groups can be here is bounded by the credits. A group is
    done with when it is sent on; after a fault it is scored anew. The rewards are started and stopped by the
    supervisor, which scores held-out rows with them too.
    """

    name = "scorer"
    acknowledges: ClassVar[bool] = True

    def __init__(
        self,
        inbox: Mailbox,
        scored: Channel[ScoredGroup],
        *,
        rewards: RewardManager,
        hold: Channel[Hold] | None = None,
        trainer_state: Callable[[int], TrainerState] | None = None,
        recorded: dict[int, ScoredGroup] | None = None,
        settled: Callable[[int], None] | None = None,
        report: Reporter | None = None,
    ) -> None:
        """`trainer_state`: step → what reward functions are told of it. `recorded`: gid → groups that had their scores
        when the checkpoint was written that the run goes on from; each is used once, and outlives the actor.
        `settled`: is told of the gid when nobody looks at a group's environments any more."""
        super().__init__(inbox, [scored] if hold is None else [scored, hold], report)
        self._scored = scored
        self._hold = hold
        self._rewards = rewards
        self._trainer_state = trainer_state
        self._recorded = {} if recorded is None else recorded
        self._settled = settled

    async def start(self) -> None:
        """Listen to the rewards, and say which are down now: a Scorer before may have said otherwise."""
        self._rewards.listen(self._note)
        self._send_hold()

    async def handle(self, message: RolloutGroup) -> None:
        """Begin to score a group."""
        self.tasks.start_soon(self._score, message)

    async def stop(self) -> None:
        """Listen no more."""
        self._rewards.listen(None)

    @property
    def progress(self) -> str:
        """How many groups are being scored."""
        groups = len(self.inbox.in_hand)
        return f"{groups:,} group{'s' if groups > 1 else ''}" if groups else ""

    async def _score(self, group: RolloutGroup) -> None:
        recorded = self._recorded.get(group.prompt.gid)
        if recorded is not None and _completions(recorded.group) == _completions(group):
            await self._scored.send(recorded)
            self._done_with(group)
            return
        state = None if self._trainer_state is None else self._trainer_state(group.prompt.slot.step)
        result = await self._rewards.score_group(group, state, self.report)
        for incident in result.incidents:
            await self.report.incident(incident)
        await self._scored.send(
            ScoredGroup(
                group=group,
                scores=result.scores,
                logged=result.metrics,
                extra=result.extra,
                faulted=result.faulted,
            )
        )
        self._done_with(group)
        self._rewards.settled(group)

    def _done_with(self, group: RolloutGroup) -> None:
        self.inbox.done(group)
        self._recorded.pop(group.prompt.gid, None)
        if self._settled is not None:
            self._settled(group.prompt.gid)

    def _note(self, incident: Incident) -> None:
        self.report.incident_nowait(incident)
        self._send_hold()

    def _send_hold(self) -> None:
        if self._hold is not None and not self._hold.closed:
            reasons = tuple(f"reward {name} is down: {why}" for name, why in self._rewards.down.items())
            self._hold.send_nowait(Hold(reasons=reasons))


def _completions(group: RolloutGroup) -> list[tuple[int, ...]]:
    return [rollout.token_ids for rollout in group.rollouts]
