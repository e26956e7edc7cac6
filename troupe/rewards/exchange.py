"""Rewards under their names: which version of one scores which group, in a call of its own or with the others of its
round, and how another version takes over in a run."""

from __future__ import annotations

from collections.abc import Callable

import anyio

from troupe.errors import RewardError
from troupe.messages import Slot
from troupe.rewards.calling import Exchanged
from troupe.rewards.convention import Reward, check_columns
from troupe.rewards.faults import Fault
from troupe.rewards.loading import is_code, load_beside, load_reward
from troupe.rewards.outcomes import Batch, Outcome, Round, joined
from troupe.rewards.processes.runner import look_at
from troupe.rewards.runners import ActorRunner, Runner
from troupe.runtime.reporter import Reporter


class Rounds:
    """Groups come one by one, each in a task of its own that waits for its scores. The one whose group makes the round
    whole makes the call; where it is cancelled, another one does.

    Outcomes are kept until every group of the round is *settled*: a group that is scored once more after a fault gets
    what its neighbours have got already.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._gathered: dict[Round, _Gathered] = {}

    @property
    def open(self) -> bool:
        """Whether there is a round that has begun and is not settled."""
        return bool(self._gathered)

    def has_begun(self, key: Round | None) -> bool:
        """Whether a group of the round has come, and not all are settled."""
        return key in self._gathered

    async def score(self, batch: Batch, report: Reporter) -> Outcome:
        """The group's part of its round's outcome; `report` gets a span of the wait for the others."""
        key, gid = batch.round, batch.gid
        assert key is not None
        assert gid is not None
        gathered = self._gathered.setdefault(key, _Gathered())
        gathered.groups[gid] = batch
        gathered.wake()
        while gid not in gathered.outcomes:
            if gathered.calling or len(gathered.groups) < key.size:
                with report.span("wait for the round", step=key.step, gid=gid, kind="wait"):
                    await gathered.changed.wait()
                continue
            gathered.calling = True
            try:
                await self._call(gathered)
            finally:
                gathered.calling = False
                gathered.wake()
        return gathered.outcomes[gid]

    def settled(self, key: Round, gid: int) -> None:
        """The group was sent on with its scores: it will not come again."""
        gathered = self._gathered.get(key)
        if gathered is not None:
            gathered.settled.add(gid)
            if len(gathered.settled) >= key.size:
                del self._gathered[key]

    def leave(self, key: Round | None) -> None:
        """Another reward takes over the round, whose call was not made."""
        if key is not None:
            self._gathered.pop(key, None)

    async def _call(self, gathered: _Gathered) -> None:
        groups = sorted(gathered.groups.items(), key=lambda group: _slot(group[1]))
        whole = joined([batch for _, batch in groups])
        outcome = await self._runner.score(whole) if whole.size else Outcome.of_nothing()
        parts = outcome.split([batch.size for _, batch in groups])
        gathered.outcomes.update(zip((gid for gid, _ in groups), parts, strict=True))


class _Gathered:
    """What is there of a round."""

    def __init__(self) -> None:
        self.groups: dict[int, Batch] = {}
        self.outcomes: dict[int, Outcome] = {}
        self.settled: set[int] = set()
        self.calling = False
        self.changed = anyio.Event()

    def wake(self) -> None:
        self.changed.set()
        self.changed = anyio.Event()


def _slot(batch: Batch) -> Slot:
    assert batch.slot is not None
    return batch.slot


class RewardVersion:
    """A reward from the first group that it scores until its last group is done."""

    def __init__(self, runner: Runner, spec: str | None, *, number: int = 0, first_step: int = 0) -> None:
        """`spec`: the text that names the reward; None where it was given in Python. `number`: how often it was
        exchanged before. `first_step`: groups of earlier steps are not scored by it."""
        self.runner, self.spec, self.number, self.first_step = runner, spec, number, first_step
        self.rounds = Rounds(runner)
        self.calls = 0
        self._moved = anyio.Event()

    def settled(self, key: Round, gid: int) -> None:
        """A group of a round was sent on with its scores: it will not come again."""
        self.rounds.settled(key, gid)
        self.wake()

    def wake(self) -> None:
        """Have `done` look again: something has ended."""
        self._moved.set()
        self._moved = anyio.Event()

    async def done(self) -> None:
        """Wait until nothing is under way."""
        while self.calls or self.rounds.open:
            await self._moved.wait()


class NamedReward:
    """The version of a reward that scores now, and those before it that still have groups under way."""

    def __init__(
        self, name: str, reward: Reward, spec: str | None, runner_of: Callable[[Reward, str | None], Runner]
    ) -> None:
        """`runner_of` makes what runs a version, from the reward and the text that names it."""
        self._runner_of = runner_of
        runner = runner_of(reward, spec)
        self.name, self.scope = name, runner.scope
        self.now = RewardVersion(runner, spec)
        self.before: list[RewardVersion] = []
        """The oldest first."""
        self.is_started = False
        """Whether a version that takes over is started, too."""
        self.columns: frozenset[str] | None = None
        """That every version can have, once they are known."""
        self._changing = anyio.Lock()
        """Held while a version gets ready, so that the one that was asked for last scores in the end."""
        self._history = [(0, 0, spec)]

    async def score(self, batch: Batch, report: Reporter) -> Outcome:
        """A group, in a call of its own or with the others of its round; `report` gets a span."""
        if not batch.size and (self.scope != "batch" or batch.round is None):
            return Outcome.of_nothing()
        step = None if batch.slot is None else batch.slot.step
        with report.span(f"score {self.name}", step=step, gid=batch.gid):
            while True:
                version = self._version_for(batch.round, step)
                version.calls += 1
                try:
                    if self.scope == "batch" and batch.round is not None:
                        return await version.rounds.score(batch, report)
                    return await version.runner.score(batch)
                except Exchanged:  # while it waited: the version that took over makes the call
                    version.rounds.leave(batch.round)
                finally:
                    version.calls -= 1
                    version.wake()

    def standing(self, step: int) -> tuple[int, str | None]:
        """How often the reward was exchanged up to a step, and the text that names the version then."""
        return next((number, spec) for first, number, spec in reversed(self._history) if first <= step)

    def check_columns(self, columns: frozenset[str]) -> None:
        """RewardError where this version requires a column that is not among these; the later ones may not either."""
        self.columns = columns
        check_columns(self.now.runner.reward, columns)

    async def stop(self) -> list[Fault]:
        """Stop all versions, each with its timeout."""
        self.is_started = False
        faults = [await version.runner.stop() for version in (*self.before, self.now)]
        self.before.clear()
        return [fault for fault in faults if fault is not None]

    def reinstate(self, spec: str, number: int) -> None:
        """Go on with a version of an earlier start; RewardError where it cannot be used any more."""
        self._take_over(RewardVersion(self._checked(self._runner_of(load_reward(spec), spec)), spec, number=number))

    async def examine(self, spec: str, limit_s: float) -> None:
        """RewardError where a reward that a text names could not take over, as far as that shows before its start. Its
        file is loaded in a process first, where it may hang or end."""
        if is_code(spec):
            await look_at(spec, self.name, limit_s)
        self._checked(self._runner_of(await load_beside(spec), spec))

    async def replace(self, reward: Reward | str, first_step: Callable[[bool], int]) -> tuple[RewardVersion, bool]:
        """Have another reward take over, checked and started → the version before it, and whether that was down.

        `first_step(was_down)` is called when the new one is ready, and says which step's groups are the first that it
        scores; it may raise, and then the old one stays.

        Raises:
            RewardError: for a reward that cannot be used or started, or one of another scope.
        """
        async with self._changing:
            spec = reward if isinstance(reward, str) else None
            loaded = await load_beside(reward) if isinstance(reward, str) else reward
            runner = self._checked(self._runner_of(loaded, spec))
            if isinstance(runner, ActorRunner):
                runner.watch.refuses_forks = True
            old = self.now
            try:
                if self.is_started:
                    await runner.start()
                was_down = old.runner.caller.down is not None
                step = first_step(was_down)
            except BaseException:
                with anyio.CancelScope(shield=True):
                    await runner.stop()
                raise
            self._take_over(RewardVersion(runner, spec, number=old.number + 1, first_step=step))
            self.before.append(old)
        old.runner.caller.retire()
        return old, was_down

    async def stop_replaced(self, old: RewardVersion) -> Fault | None:
        """Stop a version that was replaced, when nothing is under way with it."""
        await old.done()
        fault = None
        with anyio.CancelScope(shield=True):
            if old in self.before:  # otherwise all were stopped meanwhile
                self.before.remove(old)
                fault = await old.runner.stop()
        return fault

    def _version_for(self, key: Round | None, step: int | None) -> RewardVersion:
        """Which one scores a group of a step: a round that is scored in one call stays with the one it began with."""
        for version in self.before:
            if version.rounds.has_begun(key):
                return version
        candidates = (self.now, *reversed(self.before)) if step is not None else ()
        version = next((one for one in candidates if one.first_step <= (step or 0)), self.now)
        return self.now if version.runner.caller.down is not None else version  # none waits for one that was replaced

    def _take_over(self, version: RewardVersion) -> None:
        """Where the new version does not work the run waits for yet another, and goes on."""
        version.runner.caller.proven = True
        self.now = version
        self._history.append((version.first_step, version.number, version.spec))

    def _checked(self, runner: Runner) -> Runner:
        """The runner, if it can take over."""
        if runner.scope != self.scope:
            raise RewardError(
                f"reward {self.name} is called once a {self.scope}, and its replacement would be once a "
                f"{runner.scope}; start a run of its own for that"
            )
        if self.columns is not None:
            check_columns(runner.reward, self.columns)
        return runner
