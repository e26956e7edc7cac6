"""Faults at every await of an actor: counted in one drive, injected one by one in the next ones."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import pytest

from troupe.actors.checkpointer import Checkpointer
from troupe.actors.generator.actor import Generator
from troupe.actors.metrics import Metrics
from troupe.actors.prompter import Prompter
from troupe.actors.scorer import Scorer
from troupe.rewards import RewardManager
from troupe.runtime.actor import Actor
from troupe.runtime.board import PolicyBoard
from troupe.runtime.device import DeviceThread, Items
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.reporter import Reporter

RESTARTABLE = (Prompter, Generator, Scorer, Checkpointer, Metrics)
SENDERS = {"prompts": "prompter", "rollouts": "generator", "scored": "scorer"}

Side = Literal["before", "after"]


class InjectedError(Exception):
    """The fault."""


class Faults:
    """Every await of an actor's loop is a point, once before what it waits for and once after it.

    A message that was sent has been delivered: there is no point after a send. `strike`: the points of `actor` that
    raise, counted from 0 in the order in which the drive comes to them; their places are noted in `places`. `at_stop`:
    whether it fails when it stops, every time.
    """

    def __init__(self, actor: str, strike: tuple[int, ...] = (), *, at_stop: bool = False) -> None:
        self.actor = actor
        self.at_stop = at_stop
        self.strike = strike
        self.places: list[str] = []

    def point(self, actor: str, place: str) -> None:
        """An actor is at a point."""
        if actor != self.actor:
            return
        self.places.append(place)
        if len(self.places) - 1 in self.strike:
            raise InjectedError(f"at {place}")

    @contextmanager
    def injected(self) -> Iterator[None]:
        """Watch, and strike, in the body."""
        with ExitStack() as stack:
            patch = stack.enter_context(pytest.MonkeyPatch.context())
            self._wrap(patch, Mailbox, "take", lambda box, *_: box.name)
            self._wrap(patch, Channel, "send", lambda channel, *_: SENDERS.get(channel.name), sides=("before",))
            self._wrap(patch, Reporter, "incident", lambda reporter, *_: reporter.actor, sides=("before",))
            self._wrap(patch, PolicyBoard, "get", lambda *_: "generator")
            self._wrap(patch, PolicyBoard, "newer_than", lambda *_: "generator")
            self._wrap(patch, RewardManager, "score_group", lambda *_: "scorer")
            self._wrap(patch, DeviceThread, "run", lambda device, *_: device._executor._name)
            self._wrap(patch, Items, "next", lambda items, *_: items._executor._name)
            for actor in RESTARTABLE:
                patch.setattr(actor, "stop", self._stop(actor.stop))
                for step in ("start", "handle", "finish"):
                    at_once = actor is Metrics and step == "handle"  # it awaits nothing: it fails before or never
                    sides: tuple[Side, ...] = ("before",) if at_once else ("before", "after")
                    self._wrap(patch, actor, step, lambda actor_, *_: actor_.name, sides)
            yield

    def _stop(self, inner: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        async def stop(actor_: Actor) -> None:
            await inner(actor_)
            if self.at_stop and actor_.name == self.actor:
                raise InjectedError("at stop")

        return stop

    def _wrap(
        self,
        patch: pytest.MonkeyPatch,
        owner: type,
        method: str,
        who: Callable[..., str | None],
        sides: tuple[Side, ...] = ("before", "after"),
    ) -> None:
        inner = getattr(owner, method)

        async def watched(*args: Any, **settings: Any) -> Any:
            actor, place = who(*args), f"{owner.__name__}.{method}"
            if actor is None:
                return await inner(*args, **settings)
            if "before" in sides:
                self.point(actor, f"before {place}")
            result = await inner(*args, **settings)
            if "after" in sides:
                self.point(actor, f"after {place}")
            return result

        patch.setattr(owner, method, watched)
