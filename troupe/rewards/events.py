"""What a run is told of its rewards: missing scores, and rewards that go down, come back, move or are exchanged."""

from __future__ import annotations

from collections.abc import Callable

from troupe.messages import Incident
from troupe.rewards.faults import Fault
from troupe.rewards.settings import RewardsConfig


def incident_of(name: str, fault: Fault, gid: int | None) -> Incident:
    """A reward's fault at a group."""
    return Incident(actor="scorer", kind=fault.kind, message=f"reward {name}: {fault.message}", gid=gid)


class RewardEvents:
    """Passes what happens to rewards on to one listener."""

    def __init__(self, config: RewardsConfig) -> None:
        self._config = config
        self._listener: Callable[[Incident], None] | None = None
        self._untold: list[Incident] = []
        """Of rewards that were moved while nobody listened."""

    def listen(self, listener: Callable[[Incident], None] | None) -> None:
        """Have a listener called with each incident at once; it must not raise."""
        self._listener = listener
        while listener is not None and self._untold:
            listener(self._untold.pop(0))

    def breaker_changed(self, name: str, why: str | None, down_s: float) -> None:
        """A reward is down, and why; or with None, it is back after so many seconds."""
        if why is None:
            self._tell("reward_back", f"reward {name} answers again after {down_s:.1f} s; its calls go on")
            return
        failures, longest_s = self._config.breaker_failures, self._config.breaker_max_wait_s
        self._tell(
            "reward_down",
            f"reward {name} is down, {failures} calls in a row have failed: {why}; its calls wait, no step is "
            f"begun, and it is tried again at least every {longest_s:g} s; to have another in its place: "
            f"troupe set OUT_DIR rewards.{name}=FILE.py:NAME",
        )

    def moved(self, name: str, why: str) -> None:
        """A function runs in processes from now on."""
        self._tell(
            "reward_moved",
            f"reward {name} now runs in processes of its own, {self._config.processes} at a time (rewards.processes): "
            f"{why}; what it kept in variables begins anew there; rewards.run has it there from the start",
            keep=True,
        )

    def exchanged(self, name: str, was_down: bool) -> None:
        """Another version scores from now on."""
        self._tell("reward_exchanged", f"reward {name} was exchanged")
        if was_down:
            self._tell("reward_back", f"reward {name} is no longer waited for")

    def _tell(self, kind: str, message: str, *, keep: bool = False) -> None:
        incident = Incident(actor="scorer", kind=kind, message=message)
        if self._listener is not None:
            self._listener(incident)
        elif keep:
            self._untold.append(incident)
