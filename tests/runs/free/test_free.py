"""The free schedule in whole runs: every group closes once, nobody waits for ever, what is too old is dealt with."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import anyio
import pytest

import troupe
from tests.support.fakes import BATCH_SIZE, FakeSink, delayed, often_equal, same_bits, tiny_config, weigh_ids
from troupe import load_config
from troupe.actors.learner.actor import Learner
from troupe.checkpoint import list_checkpoints, load_checkpoint
from troupe.cli.demo import DEMO_CONFIG
from troupe.messages import GroupClosed, ScoredGroup, Update
from troupe.policy import load_policy
from troupe.policy.decode.loop import Wave
from troupe.run.ledgers import Factories
from troupe.run.result import RunResult
from troupe.runtime.board import Credits, PolicyBoard

pytestmark = pytest.mark.anyio
STEPS = 6


class Watched:
    """What the learner got and what the sinks were told, of one free run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Path, folder: Path, **settings: Any) -> None:
        self.sink = FakeSink()
        self.groups: list[ScoredGroup] = []
        self.most_alive = 0
        handle, take = Learner.handle, Credits.take

        async def handled(learner: Learner, message: Any) -> None:
            if isinstance(message, ScoredGroup):
                self.groups.append(message)
            await handle(learner, message)

        def taken(credit: Credits, gid: int) -> None:
            take(credit, gid)
            self.most_alive = max(self.most_alive, len(credit.live))

        monkeypatch.setattr(Learner, "handle", handled)
        monkeypatch.setattr(Credits, "take", taken)
        self.factories = Factories(sinks=lambda prepared: [self.sink])
        base = {"schedule__mode": "free", "schedule__generator": "thread", "learner__max_steps": STEPS}
        self.config = tiny_config(model, folder, **base | settings)

    @property
    def closed(self) -> list[GroupClosed]:
        return [message for message in self.sink.got if isinstance(message, GroupClosed)]

    @property
    def updates(self) -> list[Update]:
        return [message for message in self.sink.got if isinstance(message, Update)]

    def check(self, result: RunResult, steps: int = STEPS) -> None:
        """What holds for every free run that has ended well."""
        assert result.steps == steps
        assert [update.step for update in self.updates] == list(range(1, steps + 1))
        assert Counter(g.group.prompt.gid for g in self.groups) == Counter(c.gid for c in self.closed)
        assert set(Counter(c.gid for c in self.closed).values()) == {1}
        limit = (self.config.schedule.max_staleness + 1) * BATCH_SIZE
        assert self.most_alive <= limit
        places: defaultdict[tuple[int, int], list[GroupClosed]] = defaultdict(list)
        for message in self.closed:
            places[message.slot.step, message.slot.place].append(message)
        assert len(places) == steps * BATCH_SIZE
        for messages in places.values():
            assert sorted(m.slot.attempt for m in messages) == list(range(len(messages)))
        for group in self.groups:
            for rollout in group.group.rollouts:
                assert list(rollout.versions) == sorted(rollout.versions)
        assert result.closed_groups == Counter(c.state for c in self.closed)


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
@pytest.mark.parametrize("on_stale", ["drop", "requeue", "correct"])
def test_a_free_run_ends_with_every_group_closed_once(
    tmp_path: Path, ragged_model: Path, monkeypatch: pytest.MonkeyPatch, max_staleness: int, on_stale: str
) -> None:
    run = Watched(
        monkeypatch,
        ragged_model,
        tmp_path,
        schedule__max_staleness=max_staleness,
        schedule__on_stale=on_stale,
        learner__dynamic_sampling=True,
        learner__max_resampling_attempts=1,
    )
    result = troupe.train(run.config, [delayed(3, most_s=0.02, reward=often_equal)], factories=run.factories)
    run.check(result)
    assert result.closed_groups["trained"] >= 1
    final = load_policy(Path(result.folder) / "final").weights
    assert same_bits(final, load_checkpoint(list_checkpoints(Path(result.folder))[0]).weights)
    assert not same_bits(final, load_policy(ragged_model).weights)
    if max_staleness == 0:
        assert {update.metrics["staleness/max"] for update in run.updates} == {0.0}, "synchronous"


def test_new_weights_are_taken_amid_a_completion(
    tmp_path: Path, ragged_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Watched(monkeypatch, ragged_model, tmp_path, schedule__max_staleness=3)
    begun: list[Wave] = []
    advance, three = Wave.advance, threading.Event()

    def waits_for_a_version(wave: Wave) -> bool:
        """The second decode goes on after three tokens when version 1 is there."""
        if wave not in begun:
            begun.append(wave)
        deadline_s = time.monotonic() + 60
        while wave in begun[1:2] and wave.length == 3 and wave._current_weights([0])[1][0] < 1:
            three.set()
            assert time.monotonic() < deadline_s
            time.sleep(0.001)
        return advance(wave)

    def weigh(completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Holds version 1 up until then; in a thread of its own."""
        assert three.wait(60)
        return weigh_ids(completion_ids)

    monkeypatch.setattr(Wave, "advance", waits_for_a_version)
    run.check(troupe.train(run.config, [weigh], factories=run.factories))
    mixed = [r.versions for g in run.groups for r in g.group.rollouts if r.versions[:4] == (0, 0, 0, 1)]
    assert mixed, "three tokens of version 0, the next of 1"


@pytest.mark.parametrize(
    ("on_stale", "ends"), [("drop", ["stale"]), ("requeue", ["stale", "trained"]), ("correct", ["trained"])]
)
@pytest.mark.parametrize("until", [3, STEPS - 1], ids=["amid the run", "last of all"])
def test_a_group_that_is_scored_too_late(
    tmp_path: Path, ragged_model: Path, monkeypatch: pytest.MonkeyPatch, on_stale: str, ends: list[str], until: int
) -> None:
    run = Watched(monkeypatch, ragged_model, tmp_path, schedule__max_staleness=1, schedule__on_stale=on_stale)
    reached, publish = anyio.Event(), PolicyBoard.publish
    late: list[list[int]] = []

    def published(board: PolicyBoard[Any], version: int, weights: Any) -> None:
        publish(board, version, weights)
        if version == until:
            reached.set()

    async def first_is_late(completion_ids: list[list[int]], **_: Any) -> list[float]:
        if not late:
            late.extend(completion_ids)
            await reached.wait()
        return weigh_ids(completion_ids)

    monkeypatch.setattr(PolicyBoard, "publish", published)
    run.check(troupe.train(run.config, [first_is_late], factories=run.factories))
    [old] = [g for g in run.groups if [list(r.token_ids) for r in g.group.rollouts] == late]
    slot = old.group.prompt.slot
    attempts = [
        group
        for group in run.groups
        if (group.group.prompt.slot.step, group.group.prompt.slot.place) == (slot.step, slot.place)
    ]
    closed = {message.gid: message.state for message in run.closed}
    assert [closed[group.group.prompt.gid] for group in attempts] == ends
    assert {group.group.prompt.row for group in attempts} == {old.group.prompt.row}, "the same row is prompted again"
    assert len({group.group.rollouts for group in attempts}) == len(ends), "with other noise"
    assert all(state == "trained" for gid, state in closed.items() if gid != old.group.prompt.gid)


def test_scores_that_are_missing_close_a_group_without_holding_up_a_step(
    tmp_path: Path, ragged_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None] * len(completion_ids)

    run = Watched(monkeypatch, ragged_model, tmp_path, schedule__max_staleness=1, schedule__on_stale="requeue")
    result = troupe.train(run.config, [never], factories=run.factories)
    run.check(result)
    assert result.closed_groups == {"quarantined": STEPS * BATCH_SIZE}


@pytest.mark.soak
def test_the_demo_learns_as_much_as_pinned(tmp_path: Path) -> None:
    reached = {}
    for mode in ("pinned", "free"):
        settings = {
            "output": str(tmp_path / mode),
            "metrics": {"sinks": ["jsonl"]},
            "schedule": {"mode": mode, "max_staleness": 1, "generator": "thread"},
        }
        result = troupe.train(load_config(DEMO_CONFIG, [settings]))
        assert result.complete
        reached[mode] = result.accuracy_after or 0.0
    assert min(reached.values()) >= 0.9
    assert abs(reached["free"] - reached["pinned"]) <= 0.05
