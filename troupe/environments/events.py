"""How episodes end, what rewards see of them afterwards, and what a run is told about environments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from troupe.environments.handles import Talk
from troupe.environments.settings import EnvironmentConfig
from troupe.messages import Incident
from troupe.messages.episodes import Answer
from troupe.messages.evaluations import told_of_row


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How an episode has ended."""

    reward: float | None = None
    """What `get_reward` says; None where there is none, or it says so."""
    attributes: dict[str, Any] = {}
    """The public attributes of the environment, as far as they are plain data."""
    failed: str = ""
    """Why the episode is missing; empty where it is not."""

    @property
    def answer(self) -> Answer:
        """As it is recorded, under the turn `ENDING`."""
        return Answer(said={}, done=True, reward=self.reward, info=self.attributes, failed=self.failed)

    @classmethod
    def of(cls, answer: Answer) -> Ending:
        """The other way round."""
        return cls(reward=answer.reward, attributes=answer.info, failed=answer.failed)


class View:
    """The public attributes of an environment that is not in this process, to be read."""

    def __init__(self, label: str, attributes: Mapping[str, Any]) -> None:
        self.__dict__.update(attributes)
        self.__dict__["_label"] = label

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(
            f"environment {self._label} has no attribute {name!r} that is plain data and public; where it is not in "
            "this process any more there are no others, and no methods"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"environment {self._label} is over; its attributes can only be read")

    def __repr__(self) -> str:
        return f"<{self._label}, to be read: {', '.join(each for each in self.__dict__ if each != '_label')}>"


class EnvironmentEvents:
    """Passes what happens to environments on to one listener."""

    def __init__(self, config: EnvironmentConfig) -> None:
        self._config = config
        self._listener: Callable[[Incident], None] | None = None
        self._told: set[tuple[str, str]] = set()
        self.sets: Sequence[str] = ()
        """Names of those that are evaluated."""

    def listen(self, listener: Callable[[Incident], None] | None) -> None:
        """Have a listener called with each incident at once; it must not raise."""
        self._listener = listener

    def tell(self, kind: str, message: str, talk: Talk | None = None, turn: int = 0) -> None:
        """Something has happened, to an episode in a turn."""
        gid: int | None = None
        if talk is not None:
            of = f"environment {talk.spec.label}" if talk.spec.is_live else "tools"
            when = "at its end" if turn < 0 else f"turn {turn}"
            episode = f"sample {talk.name.sample}, {when}: {message}"
            if talk.name.gid < 0:
                message = f"{told_of_row(talk.name.gid, self.sets)}: {of}, {episode}"
            else:
                gid, message = talk.name.gid, f"{of}, group {talk.name.gid}, {episode}"
        if self._listener is not None:
            self._listener(Incident(actor="environment", kind=kind, message=message, gid=gid))

    def once(self, kind: str, label: str, message: str) -> None:
        """Something that holds for all episodes from now on."""
        if (kind, label) not in self._told:
            self._told.add((kind, label))
            self.tell(kind, message)

    def machines_changed(self, why: str | None) -> None:
        """No machine that could run environments and tools is there, and why; or with None, one is."""
        if why is None:
            self.tell("environment_back", "environments and tools have a worker; their calls go on")
        else:
            self.tell("waiting_for_workers", f"environments and tools wait, and no step is begun: {why}")

    def changed(self, label: str, why: str | None, down_s: float) -> None:
        """An environment is down, and why; or with None, it is back after so many seconds."""
        if why is None:
            self.tell("environment_back", f"environment {label} answers again after {down_s:.1f} s; its calls go on")
            return
        failures, longest_s = self._config.breaker_failures, self._config.breaker_max_wait_s
        self.tell(
            "environment_down",
            f"environment {label} is down, {failures} answers in a row have failed: {why}; its calls wait, no step is "
            f"begun, and it is tried again at least every {longest_s:g} s",
        )
