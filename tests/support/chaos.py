"""Runs in which everything goes wrong that may, in virtual time over `wiring.py`; and what must hold
all the same.

All of a run follows from its seed: `python -m tests.support.chaos SEED` makes one again and tells what happened.
"""

from __future__ import annotations

import argparse
import asyncio
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import anyio

from tests.support import virtual_time
from tests.support.plans import Plan, draw_plan
from tests.support.wiring import DATA, LONGEST, Hooks, Ledger, digest, prepared_run, virtual_factories
from troupe import RewardActor, RewardSample, RunConfig
from troupe.actors.evaluator.settings import EvaluationConfig
from troupe.actors.schedule import ScheduleConfig
from troupe.checkpoint import CheckpointConfig
from troupe.dataset import CurriculumConfig
from troupe.errors import RunError
from troupe.grpo import LearnerConfig
from troupe.messages import Snapshot
from troupe.policy import GenerationConfig
from troupe.rewards import Reward, RewardManager, RewardsConfig
from troupe.run.supervisor import Supervisor
from troupe.runtime.mailbox import ChannelStats

FAULTY = ("prompter", "generator", "environment", "teacher", "scorer", "evaluator", "checkpointer", "metrics")
"""Actors that are restarted when they fail."""
EVALUATING = ("generator", "evaluator", "checkpointer")
"""Whose faults may be those of the evaluator."""
MOST_FAULTS = 3
"""Of an actor: one more and the run may end, as it should."""
TIMEOUT_S = 60.0
"""Of a reward call."""
ODD = {"nan": float("nan"), "infinite": float("-inf"), "none": None, "huge": 1e30}
"""Scores that count as missing."""

CURRICULUM = CurriculumConfig(
    enabled=True, window=2, easy_threshold=0.6, hard_threshold=0.4, retire_at=0.75, retire_after=1, revisit_every=3
)
"""Scores are drawn by lot, so that rows go from pool to pool, and back from retirement."""
FATES = ("raises", "exits", "hangs", "ignores cancellation", *ODD)


class Chaos(Hooks):
    """The waits and faults of a drive: a stream of random numbers of its own for each who asks."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.faults: Counter[str] = Counter()
        """Faults so far, by actor."""
        self._streams: dict[str, random.Random] = {}

    def on_step(self, who: str, place: str) -> None:
        if who == "learner" and self.strikes("learner fails", self.plan.deadly):
            self.faults[who] += 1
            raise ArithmeticError(f"{who} fails at {place}, as chance has it")
        if who in FAULTY and self._faults_of(who) < MOST_FAULTS and self.strikes(f"{who} fails", self.plan.faults):
            self.faults[who] += 1
            raise ArithmeticError(f"{who} fails at {place}, as chance has it")

    def _faults_of(self, who: str) -> int:
        """Of those who have an actor with a device of others, together: it fails with any of them."""
        if self.plan.evaluate_every and who in EVALUATING:
            return sum(self.faults[each] for each in EVALUATING)
        return self.faults[who]

    def delay_s(self, who: str) -> float:
        """Often 0, else exponential, and now and then very long."""
        dice = self._of(who)
        if not self.plan.delay_s or dice.random() < 0.3:
            return 0.0
        return dice.expovariate(1 / self.plan.delay_s) * (20 if dice.random() < 0.07 else 1)

    def strikes(self, who: str, share: float) -> bool:
        return share > 0 and self._of(who).random() < share

    def on_write(self, snapshot: Snapshot) -> None:
        if not snapshot.final and self.strikes("disk", self.plan.bad_disk):
            raise OSError("as chance has it")

    def on_sink(self, message: object) -> None:
        if self.strikes("sink", self.plan.bad_sinks):
            raise OSError("as chance has it")

    def bound(self, channel: str, asked: int) -> int:
        if self.plan.bounds == "wide":
            return asked * 3
        return asked if self.plan.bounds == "asked" or channel in DATA else 1

    def is_finite(self, batch: bytes) -> bool:
        return batch[0] / 256 >= self.plan.bad_updates

    def _of(self, who: str) -> random.Random:
        if who not in self._streams:
            self._streams[who] = random.Random(f"{self.plan.seed}/{who}")
        return self._streams[who]


class Judgement:
    """Scores; and whether there is one at all, which follows from what is scored: timing has no part in it."""

    def __init__(self, chaos: Chaos) -> None:
        self._plan = chaos.plan
        self._chaos = chaos
        self._had_hiccup: set[bytes] = set()

    async def call(self, who: str, ids: Sequence[Sequence[int]]) -> list[Any]:
        """The scores of completions that are scored together, or whatever happens in their place."""
        what = digest(self._plan.seed, who, ids)
        wait_s = self._chaos.delay_s(who)
        if wait_s:
            await anyio.sleep(min(wait_s, TIMEOUT_S / 2))  # a call that is late by chance would change the run
        from_s, to_s = self._plan.outage or (0.0, 0.0)
        if from_s <= anyio.current_time() < to_s:
            raise ConnectionError("nobody is there")
        if what not in self._had_hiccup and self._chaos.strikes(f"{who} hiccups", self._plan.hiccups):
            self._had_hiccup.add(what)
            raise ConnectionError("try again")
        fate = self._fate(what)
        if fate == "raises":
            raise ZeroDivisionError("as fate has it")
        if fate == "exits":
            raise SystemExit("as fate has it")
        while fate in ("hangs", "ignores cancellation"):
            try:
                await anyio.sleep_forever()
            except anyio.get_cancelled_exc_class():
                if fate == "hangs":
                    raise
        return [self._score(who, sample) for sample in ids]

    def _score(self, who: str, ids: Sequence[int]) -> float | None:
        number = digest(self._plan.seed, who, "score", ids)
        return ODD.get(self._fate(number), number[2] % self._plan.levels / self._plan.levels)

    def _fate(self, number: bytes) -> str:
        if number[0] / 256 >= self._plan.bad_rewards:
            return "fine"
        return FATES[number[1] % len(FATES)]


class Judge(RewardActor):
    """Scores sample by sample."""

    name = "judge"

    def __init__(self, judgement: Judgement) -> None:
        self._judgement = judgement

    async def score(self, sample: RewardSample) -> float | None:
        (score,) = await self._judgement.call("judge", [sample.completion_ids])
        return score  # type: ignore[no-any-return]


def rewards_of(chaos: Chaos) -> list[Reward]:
    """A function, and perhaps an actor."""
    judgement = Judgement(chaos)

    async def opinion(completion_ids: list[list[int]], **_: Any) -> list[Any]:
        return await judgement.call("opinion", completion_ids)

    return [opinion, Judge(judgement)] if chaos.plan.with_actor else [opinion]


def config_of(plan: Plan, folder: Path) -> RunConfig:
    """The drive's settings."""
    dynamic = plan.attempts > 0
    return RunConfig(
        seed=plan.seed,
        output=str(folder / "run"),
        generation=GenerationConfig(num_generations=plan.generations, max_completion_length=LONGEST),
        rewards=RewardsConfig(
            retries=plan.retries,
            concurrency=plan.concurrency,
            timeout_s=TIMEOUT_S,
            breaker_failures=2 if plan.outage else 0,
        ),
        learner=LearnerConfig(
            batch_size=plan.prompts,
            max_steps=plan.steps,
            max_nonfinite_steps=99,
            dynamic_sampling=dynamic,
            max_resampling_attempts=max(plan.attempts, 1),
        ),
        schedule=ScheduleConfig(
            generator="thread",
            mode=plan.mode,
            max_staleness=plan.max_staleness,
            on_stale=plan.on_stale,
            watchdog_s=plan.watchdog_s,
        ),
        evaluation=EvaluationConfig(every=plan.evaluate_every),
        checkpoint=CheckpointConfig(every=plan.checkpoint_every, overlap=plan.overlap),
        curriculum=CURRICULUM if plan.curriculum else CurriculumConfig(),
    )


class Report(NamedTuple):
    """How a drive went."""

    ledger: Ledger
    steps: int
    weights: bytes
    channels: list[ChannelStats]
    took_s: float
    """Virtual."""
    faults: Counter[str]
    """Times that an actor failed, by its name."""
    evaluated: dict[int, Mapping[str, float]]
    """By version."""


def drive(plan: Plan) -> Report:
    """Make it, and see that everything holds; AssertionError with the plan where it does not."""
    with TemporaryDirectory(prefix="troupe-chaos-") as folder:
        config = config_of(plan, Path(folder))
        chaos = Chaos(plan)
        ledger = Ledger((plan.max_staleness + 1) * plan.prompts)
        rewards = rewards_of(chaos)
        prepared = prepared_run(config, RewardManager(rewards, config=config.rewards), plan.rows)
        try:
            run = Supervisor(
                config, factories=virtual_factories(prepared, chaos, ledger, real_statistics=plan.seed % 8 == 0)
            )
            with seeded(plan.seed):
                report = virtual_time.run(perform, run, chaos, ledger, rewards[0])
            assert_all_holds(plan, report)
        except Exception as error:
            fault: BaseException = error
            while isinstance(fault, BaseExceptionGroup):
                fault = fault.exceptions[0]
            what = str(fault) if isinstance(fault, AssertionError) else f"{type(fault).__name__}: {fault}"
            raise AssertionError(
                f"seed {plan.seed}: {what}\n(python -m tests.support.chaos {plan.seed})\n{plan}"
            ) from fault
    return report


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Make the pauses of those who have no seed of their own follow from this one."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


async def perform(run: Supervisor, chaos: Chaos, ledger: Ledger, reward: Reward) -> Report:
    """Go through the whole run, and ask of it what the plan says."""
    plan = chaos.plan
    async with anyio.create_task_group() as tasks:
        try:
            async with run:
                tasks.start_soon(_ask, run, plan, reward, ledger.limit)
                await run.wait()
        except ArithmeticError:
            if not chaos.faults["learner"]:
                raise
        except RunError as error:
            if not (plan.asks("stop") and "could not be written" in str(error)):
                raise
        tasks.cancel_scope.cancel()
    others = asyncio.all_tasks() - {asyncio.current_task()}
    assert not others, f"tasks are left: {others}"
    learner = run._pipeline.learner
    mailboxes = {actor.inbox.name: actor.inbox for actor in run._pipeline.actors}
    return Report(
        ledger,
        learner.version,
        learner.weights["w"],  # type: ignore[arg-type]
        [channel.stats() for mailbox in mailboxes.values() for channel in mailbox.channels if not channel.side],
        asyncio.get_running_loop().time(),
        chaos.faults,
        {each.version: each.metrics for each in run._pipeline.ledgers.evaluations.results},
    )


async def _ask(run: Supervisor, plan: Plan, reward: Reward, most_alive: int) -> None:
    for when_s, what in plan.requests:
        await anyio.sleep_until(when_s)
        if what == "exchange":
            run.exchange_reward("opinion", reward)  # for its like, so that scores stay the same
        else:
            getattr(run, what)()
        assert len(run.status().groups) <= most_alive
    run.resume()


def assert_all_holds(plan: Plan, report: Report) -> None:
    """What is true of every run, whatever happened in it."""
    ledger = report.ledger
    assert not ledger.broken, ledger.broken
    assert set(ledger.closed.values()) <= {1}, "a group was closed twice"
    assert ledger.closed.keys() <= ledger.issued.keys(), "a group was closed that nobody issued"
    for channel in report.channels:  # what a failed actor had in hand waits again, beside what came meanwhile
        assert channel.peak_depth <= channel.bound + (report.faults.total() > 0), channel
    assert [update.step for update in ledger.updates] == list(range(1, len(ledger.updates) + 1))
    assert ledger.written == sorted(ledger.written), "checkpoints came out of order"
    if plan.asks("stop") or report.faults["learner"]:
        assert report.steps >= len(ledger.updates)
        return
    assert ledger.closed.keys() == ledger.issued.keys(), "a group was lost"
    assert not ledger.alive
    assert report.steps == len(ledger.updates) == ledger.final
    first = [slot for slot in ledger.issued.values() if slot.attempt == 0]
    assert len(first) == report.steps * plan.prompts, "a step is not whole"
    assert all(channel.depth == 0 for channel in report.channels), "a message was left unread"
    if not plan.asks("drain"):
        assert report.steps == plan.steps
    if every := plan.evaluate_every:
        assert report.evaluated.keys() == {*range(0, report.steps + 1, every), report.steps}, "an evaluation was lost"


def assert_timing_changes_nothing(plan: Plan, report: Report) -> None:
    """A pinned run learns the same without the delays and accidents, as far as it went."""
    calm = drive(plan.calm())
    went = len(report.ledger.learned)
    for version in report.evaluated.keys() & calm.evaluated.keys():
        assert report.evaluated[version] == calm.evaluated[version], f"seed {plan.seed}: timing changed an evaluation"
    same = report.ledger.learned == calm.ledger.learned[:went]
    if report.steps == calm.steps and not plan.asks("stop"):
        same = same and (report.weights, report.ledger.states) == (calm.weights, calm.ledger.states)
    assert same, f"seed {plan.seed}: timing changed the run\n(python -m tests.support.chaos {plan.seed})\n{plan}"


def main() -> None:
    """Make again what failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seed", type=int, nargs="+")
    for seed in parser.parse_args().seed:
        plan = draw_plan(seed)
        print(plan)
        report = drive(plan)
        if plan.is_reproducible:
            assert_timing_changes_nothing(plan, report)
        print(f"{report.steps} steps in {report.took_s:g} s; groups {dict(report.ledger.states)}")
        print(f"most alive {report.ledger.most_alive}; incidents {dict(report.ledger.incidents)}")


if __name__ == "__main__":
    main()
