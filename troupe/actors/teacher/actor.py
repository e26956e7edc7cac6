"""Teacher: says of every sampled token how likely it finds it."""

from collections.abc import Callable, Mapping

from troupe.actors.teacher.forward import is_taught, with_log_probs
from troupe.messages import RolloutGroup, ScoredGroup
from troupe.runtime.actor import Actor
from troupe.runtime.device import DeviceThread
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter


class Teacher(Actor):
    """Receives RolloutGroup; sends it with the teacher's log-probs, in order of arrival.

    One group at a time goes through the network, on a device thread of its own, while the next ones are generated and
    those before are scored. What it says is a part of the group from then on, stored with it and never asked again.
    """

    name = "teacher"

    def __init__(
        self,
        inbox: Mailbox,
        groups: Channel[RolloutGroup],
        *,
        device: DeviceThread,
        teach: Callable[[RolloutGroup], RolloutGroup],
        recorded: Mapping[int, ScoredGroup] | None = None,
        report: Reporter | None = None,
    ) -> None:
        """`teach`: adds the log-probs, on the device. `recorded`: gid → groups that had them when the checkpoint was
        written that the run goes on from."""
        super().__init__(inbox, [groups], report)
        self._groups = groups
        self._device = device
        self._teach = teach
        self._recorded = {} if recorded is None else recorded

    async def handle(self, message: RolloutGroup) -> None:
        """Pass a group on, with what is recorded of it or what is computed now."""
        taught = message if is_taught(message) else self._known(message)
        if taught is None:
            prompt = message.prompt
            with self.report.span("teach", step=prompt.slot.step, gid=prompt.gid):
                taught = await self._device.run(self._teach, message, plain=True)
        await self._groups.send(taught)

    @property
    def progress(self) -> str:
        """How many groups are here."""
        groups = len(self.inbox.in_hand) + len(self.inbox)
        return f"{groups:,} group{'s' if groups > 1 else ''}" if groups else ""

    def _known(self, group: RolloutGroup) -> RolloutGroup | None:
        """The group with what was said of the same completions before; None where nothing was."""
        scored = self._recorded.get(group.prompt.gid)
        if scored is None or not is_taught(scored.group):
            return None
        before = scored.group.rollouts
        if [rollout.token_ids for rollout in before] != [rollout.token_ids for rollout in group.rollouts]:
            return None
        return with_log_probs(group, [rollout.teacher_log_probs for rollout in before])
