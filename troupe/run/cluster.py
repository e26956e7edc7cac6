"""Hub: the run's side of a cluster: its message server, its desk, the weights that workers read, and who generates.

Opened before the actors are made, so that a first worker's join file lies there before anything waits; it works beside
them, and ends with the run.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import TypeAlias

import anyio
import anyio.to_thread
import msgspec

from troupe.actors.generator.audits import Audits
from troupe.actors.generator.checks import ResultLimits
from troupe.actors.generator.cluster import ClusterMembers
from troupe.actors.generator.cluster_wire import Terms
from troupe.actors.generator.estimates import Estimates
from troupe.actors.generator.judge import RunJudge
from troupe.actors.generator.kin import Kinship, probe_part, probe_prompts
from troupe.actors.generator.parts import Part
from troupe.actors.generator.trust import Trust
from troupe.actors.generator.weights_files import WeightsFiles
from troupe.actors.generator.wire import Setup
from troupe.cluster.bus import Bus
from troupe.cluster.desk import Desk
from troupe.cluster.facts import facts_here
from troupe.cluster.roster import Roster
from troupe.cluster.versions import WeightsPublisher
from troupe.cluster.wire import RunState
from troupe.messages import Incident, RolloutGroup
from troupe.policy import Policy, Weights
from troupe.policy.gradient.backward import completion_statistics
from troupe.run.config import RunConfig
from troupe.runtime.board import PolicyBoard
from troupe.runtime.device import DeviceThread
from troupe.runtime.frames import encode
from troupe.runtime.reporter import Reporter

JOIN = "join"
"""In the run folder: what workers join with, for its owner alone."""
FIRST_JOIN_FILE = Path(JOIN) / "worker.toml"
SETUP = "setup"
"""Name of the blob of what a worker's generator is made of."""
_GOODBYE_S = 6.0
"""For workers to hear that the run has ended."""
_MOST_ROWS = 64
"""Of one episode, as far as its tokens are counted."""
_PROBE_PROMPTS, _PROBE_TOKENS = 2, 16


class Network(msgspec.Struct, frozen=True):
    """A message server that is there, and the hub's end of it."""

    run: str
    """The run's id, in subjects."""
    bus: Bus
    addresses: tuple[str, ...]


Hear: TypeAlias = Callable[[str], None]
OpenNetwork: TypeAlias = Callable[[Path, str, Hear, Hear], AbstractAsyncContextManager[Network]]
"""(the run's `join`, HOST:PORT, who is told in the event loop of what befalls the server, and of a worker whose key is
good no more) → it, while it is there."""


@asynccontextmanager
async def open_network(join: Path, serve: str, tell: Hear, revoked: Hear) -> AsyncIterator[Network]:
    """A nats-server of the run's own, as a child of this process. InputError where that cannot be."""
    from troupe.cluster.connection import connect  # packages that a run without workers does not need
    from troupe.cluster.server import serving

    loop = asyncio.get_running_loop()

    def in_loop(hear: Hear) -> Hear:
        def told(text: str) -> None:
            loop.call_soon_threadsafe(hear, text)

        return told

    served = serving(join, serve, tell=in_loop(tell), revoked=in_loop(revoked))
    server = await anyio.to_thread.run_sync(served.__enter__)
    try:
        async with connect(server.ticket) as bus:
            yield Network(server.run, bus, tuple(server.addresses))
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(served.__exit__, None, None, None)


class Hub:
    """What workers speak to. Made within `opened`; `attach` gives it the run's parts, and `run` is its work."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.network: Network
        self.members: ClusterMembers
        """Who generates elsewhere."""
        self.desk: Desk
        self.roster: Roster
        self._config, self._folder = config, folder
        self._report: Reporter | None = None
        self._untold: list[str] = []
        self._judge: RunJudge
        self._publisher: WeightsPublisher
        self._board: PolicyBoard[Weights]
        self._state: Callable[[], RunState] = lambda: "running"

    def tell(self, line: str) -> None:
        """What befalls the message server."""
        if self._report is None:
            self._untold.append(line)
        else:
            self._report.incident_nowait(Incident(actor=self._report.actor, kind="message_server", message=line))

    def revoked(self, name: str) -> None:
        """A worker's key is good no more: what it has goes to others at once."""
        if self._report is not None:
            for worker in self.roster.everybody_here():
                if worker.name == name:
                    self.roster.refuse(worker, "its key was revoked")

    def attach(
        self,
        *,
        report: Reporter,
        setup: Setup,
        policy: Policy,
        board: PolicyBoard[Weights],
        files: WeightsFiles,
        device: DeviceThread,
    ) -> None:
        """Make what workers speak to. `setup`: of a generator's process here, which the judge has. `device`: the thread
        that reads weights and writes files."""
        self._report, self._board = report, board
        for line in self._untold:
            self.tell(line)
        cluster, pinned = self._config.cluster, self._config.schedule.mode == "pinned"
        self.desk = Desk(self.network.run, report)
        self.roster = Roster(self.desk, report, lease_s=cluster.lease_s, run_state=lambda: self._state())
        self._publisher = WeightsPublisher(
            self.network.bus, self.network.run, device, full_every=cluster.full_every, tell=self.tell
        )
        self.desk.register("newest", self._publisher.tell_newest)
        self._publisher.shelve(SETUP, lambda: [encode(_for_workers(setup))])
        self._judge = RunJudge(msgspec.structs.replace(setup, name="judge"), board=board, files=files, device=device)
        self.members = ClusterMembers(
            self.desk,
            self.roster,
            limits=_limits(self._config, policy, setup),
            decode_text=policy.tokenizer.decode_sampled,
            terms=Terms(setup=SETUP),
            versions=lambda: self._publisher.there,
            kinship=self._kinship(setup, policy) if pinned else None,
            trust=Trust(
                self.desk,
                self.roster,
                audits=Audits(cluster.audit, seed=self._config.seed, judge=self._judge) if pinned else None,
                estimates=None if pinned or setup.acts is not None else self._estimates(policy, device),
            ),
            put_whole=self._put_whole,
            until_there=self._publisher.until_there,
            needs="" if cluster.local_parts else f"waiting for a worker: troupe worker --join {self._first_join_file}",
        )
        self.roster.add(self.members)

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know, one line each."""
        where, schedule = ", ".join(self.network.addresses), self._config.schedule
        told = [f"workers find this run at {where}: troupe worker --join {self._first_join_file}"]
        if schedule.mode == "pinned" and (schedule.parts or 1) == 1:
            told.append(
                "a step of this run is one part (schedule.parts is 1), which one member decodes while others wait; a "
                "run that begins with more parts is shared"
            )
        return tuple(told)

    @property
    def _first_join_file(self) -> Path:
        return self._folder / FIRST_JOIN_FILE

    def follow(self, state: Callable[[], RunState]) -> None:
        """Tell workers how the run stands."""
        self._state = state

    async def run(self) -> None:
        """Answer workers and publish weights, until cancelled."""
        pinned = self._config.schedule.mode == "pinned"
        async with self.desk.open(self.network.bus), anyio.create_task_group() as tasks:
            tasks.start_soon(self.roster.watch)
            tasks.start_soon(self._judge.run)
            await self._publisher.follow(self._board, every=pinned)

    async def say_over(self) -> None:
        """Have workers hear that the run has ended, for as long as that takes them and no longer than a few seconds."""
        with anyio.move_on_after(_GOODBYE_S):
            await self.roster.say_over()

    async def _put_whole(self, version: int) -> None:
        weights = self._board.kept.get(version)
        if weights is not None:
            await self._publisher.full(version, weights)

    def _estimates(self, policy: Policy, device: DeviceThread) -> Estimates:
        config, temperature = policy.config, self._config.generation.temperature
        base = policy.base

        def compute(weights: Weights, group: RolloutGroup) -> list[list[float]]:
            prompts = [group.prompt.prompt_ids] * len(group.rollouts)
            completions = [rollout.token_ids for rollout in group.rollouts]
            found = completion_statistics(config, base.completed(config, weights), prompts, completions, temperature)
            rows: list[list[float]] = found.log_probs.tolist()  # type: ignore[assignment]
            return rows

        async def log_probs(group: RolloutGroup) -> list[list[float]]:
            return await device.run(compute, self._board.kept[self._board.version], group)

        cluster = self._config.cluster
        return Estimates(log_probs, share=cluster.audit, bound=cluster.max_logp_difference, seed=self._config.seed)

    def _kinship(self, setup: Setup, policy: Policy) -> Kinship:
        prompts = probe_prompts(
            self._config.seed,
            count=min(_PROBE_PROMPTS, self._config.learner.batch_size),
            length=_PROBE_TOKENS,
            vocab_size=policy.config.vocab_size,
        )

        def part(version: int) -> Part:
            return probe_part(version, prompts, max_staleness=setup.max_staleness)

        return Kinship(part, self._judge, lambda: self._publisher.there, facts_here())


def _for_workers(setup: Setup) -> Setup:
    """Without what is this machine's alone."""
    return msgspec.structs.replace(setup, name="worker", limit_gb=None)


def _limits(config: RunConfig, policy: Policy, setup: Setup) -> ResultLimits:
    network, generation, longest = policy.config, config.generation, config.generation.max_completion_length
    if setup.acts is not None:
        longest = _MOST_ROWS * setup.acts.limits.max_completion_length
    return ResultLimits(
        vocab_size=network.vocab_size,
        num_generations=generation.num_generations,
        max_completion_length=longest,
        context=network.max_position_embeddings,
        stop_ids=frozenset(setup.stop_ids),
        has_stop_strings=bool(generation.stop),
        acts=setup.acts is not None,
        experts=network.num_experts if setup.records_experts else 0,
        sets=tuple((each.num_generations, each.max_completion_length) for each in setup.sets),
    )


@asynccontextmanager
async def opened(config: RunConfig, folder: Path, network: OpenNetwork = open_network) -> AsyncIterator[Hub]:
    """The hub of a run that is served, with the message server there and the first worker's join file written."""
    assert config.cluster.serve is not None
    hub = Hub(config, folder)
    async with network(folder / JOIN, config.cluster.serve, hub.tell, hub.revoked) as hub.network:
        yield hub
