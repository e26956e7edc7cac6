"""Trust: what of workers' answers is looked at more closely, and what becomes of who has lied."""

from collections.abc import Callable

from troupe.actors.generator.audits import Audits
from troupe.actors.generator.child import CHILD_FAULTS
from troupe.actors.generator.cluster_wire import Verdict
from troupe.actors.generator.estimates import Estimates
from troupe.actors.generator.parts import Part
from troupe.cluster.desk import Desk
from troupe.cluster.roster import Roster
from troupe.messages import RolloutGroup


class Trust:
    """Audits and estimates, with the desk that puts out who lied."""

    def __init__(
        self, desk: Desk, roster: Roster, *, audits: Audits | None = None, estimates: Estimates | None = None
    ) -> None:
        """`audits`: parts that are decoded twice; `estimates`: those of which log-probs are computed anew, where bits
        may differ."""
        self._desk, self._roster = desk, roster
        self.audits = audits or Audits(0.0)
        self.estimates = estimates

    def audited(self, name: str, part: Part, group: RolloutGroup) -> tuple[Verdict, bool]:
        """Keep a group of a part that is decoded twice → its verdict, and whether `settle` is to be called."""
        match self.audits.add(part.name, name, group):
            case "differs":
                self._desk.put_out(name, f"it answered group {group.prompt.gid} once more, and otherwise")
                return "differs", False
            case "whole":
                return "taken", True
        return "taken", False

    async def settle(self, part: str, others: Callable[[], bool]) -> tuple[str, list[RolloutGroup]]:
        """Wait for the second opinion on a part and put out who lied → who had it first, and its groups, where they
        hold. `others`: whether somebody else could give that opinion."""
        try:
            settled = await self.audits.settle(part, others)
        except (LookupError, *CHILD_FAULTS) as error:
            self.audits.forget(part)  # so that it is given out anew
            self._roster.tell("audit_failed", f"part {part} could not be compared, and is decoded anew: {error}")
            return "", []
        for liar, what in settled.liars.items():
            self._lied(
                liar, f"its part {part} has other {what} than the run's own generator makes with the same weights"
            )
        return settled.first, settled.groups

    async def estimate(self, name: str, group: RolloutGroup) -> None:
        """Put out a worker whose log-probs cannot be the policy's."""
        if self.estimates is not None and (mean := await self.estimates.of(name, group)) is not None:
            self._lied(name, f"its log-probs differ from the policy's by {mean:.2g} nats a token")

    def _lied(self, name: str, told: str) -> None:
        if self._desk.put_out(name, told):
            self._roster.tell("worker_lied", f"worker {name}: {told}")
