"""Runs that end amid their work and go on from a checkpoint, again and again, over `wiring.py`; and
what must hold of all their starts together.

All of a run follows from its seed: `python -m tests.support.resumes SEED` makes one again.
"""

from __future__ import annotations

import argparse
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, NamedTuple

import msgspec

from tests.support import virtual_time
from tests.support.chaos import Chaos, config_of, perform, rewards_of, seeded
from tests.support.plans import Plan, draw_plan
from tests.support.wiring import Ledger, prepared_run, virtual_factories
from troupe.checkpoint import Checkpoint, RunState
from troupe.checkpoint.write import encode_unfinished
from troupe.messages import CurriculumState, Evaluated, GroupClosed, Snapshot, Unfinished
from troupe.rewards import RewardManager
from troupe.run.prepare import Prepared
from troupe.run.resume.newest import restored_free, restored_pinned
from troupe.run.supervisor import Supervisor

STARTS = 4
"""Of a run, at most; the last one goes to the end."""


class Cut(NamedTuple):
    """A checkpoint as it lies on the disk, as far as the rig has a disk."""

    version: int
    weights: dict[str, bytes]
    behind: dict[int, dict[str, bytes]]
    num_tokens: int
    skipped_in_a_row: int
    unfinished: bytes
    curriculum: bytes

    @classmethod
    def of(cls, snapshot: Snapshot) -> Cut:
        return cls(
            snapshot.version,
            dict(snapshot.weights),
            {version: dict(weights) for version, weights in snapshot.behind.items()},
            snapshot.num_tokens,
            snapshot.skipped_in_a_row,
            encode_unfinished(snapshot.unfinished),
            msgspec.msgpack.encode(snapshot.curriculum),
        )


class CutChaos(Chaos):
    """Keeps every checkpoint that was written."""

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self.cuts: list[Cut] = []

    def on_write(self, snapshot: Snapshot) -> None:
        super().on_write(snapshot)
        self.cuts.append(Cut.of(snapshot))


class StartLedger(Ledger):
    """Sees one start of several."""

    def __init__(self, limit: int, prepared: Prepared) -> None:
        super().__init__(max(limit, len(prepared.start.restored.alive)))
        self.ends: list[GroupClosed] = []
        for group in prepared.start.restored.collected.collected:
            prompt = group.group.prompt
            self.issued[prompt.gid] = prompt.slot
            if prompt.gid not in prepared.start.restored.collected.replaced:
                self.alive.add(prompt.gid)

    def see(self, channel: str, message: object) -> None:
        super().see(channel, message)
        if isinstance(message, GroupClosed) and channel == "closed groups":
            self.ends.append(message)


class Store:
    """What the durable sinks have: of steps past a cut nothing is left when a run goes on from it."""

    def __init__(self) -> None:
        self.ends: list[GroupClosed] = []

    def go_on(self, ends: list[GroupClosed], version: int) -> None:
        self.ends = [end for end in (*self.ends, *ends) if end.version <= version]

    def by_step(self) -> dict[int, list[Any]]:
        found: defaultdict[int, list[Any]] = defaultdict(list)
        for end in self.ends:
            assert end.scored is not None
            found[end.version].append(
                (
                    end.gid,
                    end.state,
                    end.scored.group.prompt.row,
                    end.scored.group.rollouts,
                    end.scored.scores,
                    end.rewards,
                    end.advantages,
                )
            )
        return dict(found)


def resumed(prepared: Prepared, cut: Cut) -> Prepared:
    """The run, going on from a cut."""
    unfinished = msgspec.msgpack.decode(cut.unfinished, type=Unfinished)
    config = prepared.config
    if (curriculum := prepared.inputs.schedule.curriculum) is not None:
        curriculum.restore(msgspec.msgpack.decode(cut.curriculum, type=CurriculumState), cut.version)
    if config.schedule.mode == "free":
        wanted = (prepared.inputs.total_steps - cut.version) * config.learner.batch_size
        restored = restored_free(unfinished, prepared.inputs.schedule, wanted=wanted)
    else:
        restored = restored_pinned(
            unfinished,
            prepared.inputs.schedule,
            cut.version,
            max_staleness=config.schedule.max_staleness,
            whole_rounds=prepared.inputs.rewards.compares_groups,
        )
    policy: Any = type(prepared.start.policy)(**{**vars(prepared.start.policy), "weights": cut.weights})
    state = RunState(
        version=cut.version,
        seed=config.seed,
        dataset="",
        num_tokens=cut.num_tokens,
        skipped_in_a_row=cut.skipped_in_a_row,
        mode=config.schedule.mode,
    )
    given: dict[str, Any] = {"config": None, "weights": cut.weights, "behind": cut.behind}
    checkpoint = Checkpoint(optimizer_state={}, state=state, unfinished=unfinished, **given)
    start = msgspec.structs.replace(prepared.start, policy=policy, checkpoint=checkpoint, restored=restored)
    return msgspec.structs.replace(prepared, start=start)


def drive(seed: int, starts: int = STARTS, *, curriculum: bool = False) -> None:
    """Make a run in several starts, and see that everything holds; AssertionError where it does not."""
    dice = random.Random(f"resumes/{seed}")
    plan = msgspec.structs.replace(draw_plan(seed), outage=None, watchdog_s=0.0, deadly=0.0)
    steps = dice.randint(3, 8)
    plan = msgspec.structs.replace(plan, steps=steps, requests=(), curriculum=curriculum)
    with TemporaryDirectory(prefix="troupe-resumes-") as folder:
        try:
            _drive(plan, Path(folder), dice, starts)
        except Exception as error:
            fault: BaseException = error
            while isinstance(fault, BaseExceptionGroup):
                fault = fault.exceptions[0]
            what = f"{type(fault).__name__}: {fault}"
            raise AssertionError(f"seed {seed}: {what}\n(python -m tests.support.resumes {seed})\n{plan}") from fault


def _drive(plan: Plan, folder: Path, dice: random.Random, starts: int) -> None:
    whole = _start(plan.calm(), folder, None) if plan.is_reproducible else None
    store, cut, told = Store(), None, list[Evaluated]()
    for number in range(starts):
        length_s = plan.delay_s * plan.steps * 4
        requests = [(dice.random() * length_s, "checkpoint") for _ in range(dice.choice([0, 2, 5, 9]))]
        last = number == starts - 1
        stops = not last and dice.random() < 0.5
        if stops:
            requests.append((dice.random() * length_s, "stop"))
        elif not last and dice.random() < 0.2:
            requests.append((dice.random() * length_s, "drain"))
        now = msgspec.structs.replace(plan, requests=tuple(sorted(requests)))
        if plan.mode == "free" and cut is not None:  # what a resume may ask for otherwise
            now = msgspec.structs.replace(now, max_staleness=dice.randint(0, 3))
            if not last:
                now = msgspec.structs.replace(now, steps=dice.randint(max(1, cut.version), plan.steps))
        start = _start(now, folder, cut, told)
        if last or (start.chaos.cuts and dice.random() < 0.9):
            if last:
                store.go_on(start.ledger.ends, plan.steps)
                break
            cut = start.chaos.cuts[-1] if stops else dice.choice(start.chaos.cuts)
            store.go_on(start.ledger.ends, cut.version)
            told = known_at(start.evaluated, cut, dice)
        elif cut is not None:
            store.go_on([], cut.version)
    check(plan, store)
    if every := plan.evaluate_every:
        versions = [each.version for each in start.evaluated]
        assert {*range(0, plan.steps + 1, every), plan.steps} <= set(versions), "an evaluation was lost"
    if whole is not None:
        values = {each.version: each.metrics for each in start.evaluated}
        assert {each.version: values[each.version] for each in whole.evaluated} == {
            each.version: each.metrics for each in whole.evaluated
        }
        assert start.weights == whole.weights
        straight = Store()
        straight.go_on(whole.ledger.ends, plan.steps)
        assert store.by_step() == straight.by_step()


def known_at(evaluated: Sequence[Evaluated], cut: Cut, dice: random.Random) -> list[Evaluated]:
    """What a kill after a cut leaves in the file: perhaps not what was under way when the cut was made."""
    under_way = {cut.version, *cut.behind}
    done = [each for each in evaluated if each.version <= cut.version]
    return [each for each in done if each.version not in under_way or dice.random() < 0.5]


class Start(NamedTuple):
    """One start, and what it led to."""

    chaos: CutChaos
    ledger: StartLedger
    weights: bytes
    steps: int
    evaluated: tuple[Evaluated, ...]


def _start(plan: Plan, folder: Path, cut: Cut | None, told: Sequence[Evaluated] = ()) -> Start:
    config = config_of(plan, Path(mkdtemp(dir=folder)))
    chaos = CutChaos(plan)
    rewards = rewards_of(chaos)
    prepared = prepared_run(config, RewardManager(rewards, config=config.rewards), plan.rows)
    if cut is not None:
        prepared = resumed(prepared, cut)
        start = msgspec.structs.replace(prepared.start, evaluated=tuple(told))
        prepared = msgspec.structs.replace(prepared, start=start)
    ledger = StartLedger((plan.max_staleness + 1) * plan.prompts, prepared)
    run = Supervisor(config, factories=virtual_factories(prepared, chaos, ledger))
    with seeded(plan.seed):
        report = virtual_time.run(perform, run, chaos, ledger, rewards[0])
    assert not ledger.broken, ledger.broken
    evaluated = run._pipeline.ledgers.evaluations.results
    return Start(chaos, ledger, report.weights, report.steps, evaluated)


def check(plan: Plan, store: Store) -> None:
    """Every group ended once, every place of every step was dealt with, and steps are whole."""
    twice = [gid for gid, times in Counter(end.gid for end in store.ends).items() if times > 1]
    assert not twice, f"ended twice: {twice}"
    attempts: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for end in store.ends:
        attempts[end.slot.step, end.slot.place].append(end.slot.attempt)
    assert sorted(attempts) == [(step, place) for step in range(plan.steps) for place in range(plan.prompts)]
    for place, numbers in attempts.items():
        assert sorted(numbers) == list(range(len(numbers))), f"place {place}: attempts {numbers}"
    assert {end.version for end in store.ends} == set(range(1, plan.steps + 1))


def main() -> None:
    """Make again what failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int, nargs="?")
    arguments = parser.parse_args()
    for seed in range(arguments.first, (arguments.last or arguments.first) + 1):
        try:
            drive(seed)
        except AssertionError as error:
            print(str(error)[:1500])


if __name__ == "__main__":
    main()
