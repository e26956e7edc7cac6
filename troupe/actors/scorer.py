"""Scorer: gives every completion its scores. All groups in hand are scored at the same time."""

from __future__ import annotations

from troupe.messages import RolloutGroup, ScoredGroup
from troupe.rewards import RewardManager
from troupe.runtime import Actor, Channel, Mailbox, Reporter


class Scorer(Actor):
    """Receives RolloutGroup; sends ScoredGroup in the order in which scores are complete.

    The mailbox is never held up: a group is scored in a task of its own while the next ones arrive. How many calls of
    a reward run at once is the reward's own limit; how many groups can be here is bounded by the credits. The rewards
    are started and stopped by the supervisor, which scores held-out rows with them too.
    """

    name = "scorer"

    def __init__(
        self,
        inbox: Mailbox,
        scored: Channel[ScoredGroup],
        *,
        rewards: RewardManager,
        report: Reporter | None = None,
    ) -> None:
        super().__init__(inbox, [scored], report)
        self._scored = scored
        self._rewards = rewards

    async def handle(self, message: RolloutGroup) -> None:
        """Begin to score a group."""
        self.tasks.start_soon(self._score, message)

    async def _score(self, group: RolloutGroup) -> None:
        with self.report.span("score", step=group.prompt.slot.step, gid=group.prompt.gid):
            result = await self._rewards.score_group(group)
        for incident in result.incidents:
            await self.report.incident(incident)
        await self._scored.send(ScoredGroup(group=group, scores=result.scores, logged=result.metrics))
