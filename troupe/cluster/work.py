"""Work: what a kind of work is at a worker, for as long as the run knows the worker's session."""

from collections.abc import Collection, Sequence
from typing import Protocol

from troupe.cluster.link import Link
from troupe.cluster.wire import Offer, RunState


class Work(Protocol):
    """One kind of work. A worker offers it with `hello`, then has it served until the session or the run ends."""

    @property
    def offer(self) -> Offer: ...

    @property
    def held(self) -> Collection[str]:
        """Names of what it has in hand, as every beat tells."""

    @property
    def pulled(self) -> int:
        """Number of the newest pull of this session that it has the answer of."""

    @property
    def tokens_per_second(self) -> float | None:
        """None where it generates nothing."""

    @property
    def version(self) -> int | None:
        """Of the policy, that it holds."""

    @property
    def doing(self) -> str:
        """In few words, for people; empty where that is nothing."""

    @property
    def summary(self) -> str:
        """What it has done so far, for people, such as `24 groups`; empty where that is nothing."""

    def details(self) -> bytes:
        """What the run is told of it with `hello`."""

    async def serve(self, link: Link, details: bytes) -> None:
        """Work until cancelled; `details`: what the run has answered. May be called again, in another session.

        What the link raises ends the session; InputError and RunError end the worker.
        """

    def pulse(self, state: RunState, details: bytes, drop: Sequence[str]) -> None:
        """A beat was answered: how the run stands, and what of what it has need not be done any more."""
