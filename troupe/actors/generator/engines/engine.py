"""One engine as the crew knows it: what it has in hand, which weights it holds, how it fares."""

import math
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count

import anyio
import msgspec

from troupe.actors.generator.engines.dialects import Held
from troupe.actors.generator.engines.server import EngineServer
from troupe.messages import MemberState, MemberStatus, Observation, Rollout, Span
from troupe.runtime.reporter import Reporter

_RECENT_S = 30.0


class Engine:
    """One engine, as the crew knows it."""

    def __init__(self, server: EngineServer) -> None:
        self.server = server
        self.name = server.config.name
        self.state: MemberState = "starting"
        self.detail = ""
        self.held: Held | None = None
        """The newest weights that it has; None: it is not known to have any."""
        self.users: Counter[int] = Counter()
        """Prompts under way, by version."""
        self.changing = anyio.Lock()
        self.old: list[Held] = []
        """Weights before these, which something is still asked of."""
        self.lent: list[int] = []
        """Versions whose folders it has on loan."""
        self.checked_version: int | None = None
        """The newest with whose log-probs its own were compared since it came."""
        self.parts: set[str] = set()
        self.freed, self.left = anyio.Event(), anyio.Event()
        """A part is over; a prompt is."""
        self._lanes: set[int] = set()
        self.failures = 0
        """In a row, with no group in between."""
        self.was_ready = False
        self.heard_s: float | None = None
        self._made: deque[tuple[float, int]] = deque()

    async def observe(self, observation: Observation) -> None:
        """Nothing acts here."""

    @property
    def tokens_per_second(self) -> float:
        """Of the last half minute."""
        now_s = time.perf_counter()
        while self._made and self._made[0][0] < now_s - _RECENT_S:
            self._made.popleft()
        return sum(tokens for _, tokens in self._made) / _RECENT_S

    def ready(self) -> None:
        """It answers as it should, and has the newest weights."""
        self.state, self.detail, self.was_ready = "working", "", True
        self.heard_s = time.perf_counter()

    def made(self, rollouts: Sequence[Rollout]) -> None:
        """It has completed a prompt."""
        self.failures = 0
        self.heard_s = time.perf_counter()
        self._made.append((self.heard_s, sum(len(rollout.token_ids) for rollout in rollouts)))

    @contextmanager
    def span(self, report: Reporter, step: int, gid: int) -> Iterator[None]:
        """Time the body on the engine's track, in its first free lane."""
        lane = next(lane for lane in count() if lane not in self._lanes)
        self._lanes.add(lane)
        span = Span(
            actor=report.actor,
            name="generate",
            start_s=time.perf_counter(),
            end_s=math.inf,
            step=step,
            gid=gid,
            lane=lane,
            member=self.name,
        )
        report.forward(span)
        try:
            yield
        finally:
            self._lanes.discard(lane)
            report.forward(msgspec.structs.replace(span, end_s=time.perf_counter()))

    def done_with(self, name: str) -> None:
        """A part is over, or given back."""
        self.parts.discard(name)
        self.freed.set()
        self.freed = anyio.Event()

    def status(self) -> MemberStatus:
        """As shown."""
        return MemberStatus(
            name=self.name,
            kind="engine",
            state=("working" if self.parts else "idle") if self.state == "working" else self.state,
            leases=tuple(sorted(self.parts)),
            tokens_per_second=self.tokens_per_second,
            last_beat_s=None if self.heard_s is None else time.perf_counter() - self.heard_s,
            version=None if self.held is None else self.held.version,
            device=f"{self.server.config.kind} at {self.server.config.base_url}",
            detail=self.detail,
        )
