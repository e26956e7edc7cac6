"""Pinned: the bits of the plain loop whatever happens in time – delays in every actor, reward and sink, longer
channels, groups scored one by one or all at once – for any staleness, and over a resume."""

from __future__ import annotations

import random
import time
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

import troupe
from tests.support.fakes import FakeSink, delayed, often_equal, same_bits, tiny_config
from tests.support.straight import Straight, run_straight
from troupe import RunConfig, Supervisor
from troupe.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from troupe.run.ledgers import Factories
from troupe.runtime.board import PolicyBoard
from troupe.runtime.device import DeviceThread
from troupe.runtime.mailbox import Channel, Mailbox

pytestmark = [pytest.mark.anyio, pytest.mark.no_cover]

STEPS = 5
PLAIN: dict[str, Any] = {"learner__max_steps": STEPS, "schedule__generator": "thread"}
FULL: dict[str, Any] = PLAIN | {
    "learner__batch_size": 3,
    "learner__dynamic_sampling": True,
    "learner__max_resampling_attempts": 2,
    "learner__num_iterations": 2,
    "learner__gradient_accumulation_steps": 2,
    "learner__beta": 0.05,
    "learner__sync_ref_model": True,
    "learner__ref_model_sync_steps": 3,
}
"""Everything that could depend on order."""


class SlowSink(FakeSink):
    """Takes a random while for every message."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__()
        self.dice = dice

    def write(self, message: object) -> None:
        time.sleep(self.dice.random() * 1e-3)
        super().write(message)


class RoomyMailbox(Mailbox):
    """Its channels are longer than they must be."""

    def __init__(self, name: str, room: int) -> None:
        super().__init__(name)
        self._room = room

    def channel(self, name: str, *types: type, bound: int, **settings: Any) -> Any:
        return super().channel(name, *types, bound=bound * self._room, **settings)


def shake(monkeypatch: pytest.MonkeyPatch, seed: int, *, room: int = 1, most_s: float = 0.0015) -> Factories:
    """Let every send, every call of a device and every look at the policy take a random while more."""
    dice = random.Random(seed)

    def late(method: Any) -> Any:
        async def later(*args: Any, **settings: Any) -> Any:
            await anyio.sleep(dice.random() * most_s)
            return await method(*args, **settings)

        return later

    for owner, name in ((Channel, "send"), (DeviceThread, "run"), (PolicyBoard, "get"), (PolicyBoard, "newer_than")):
        monkeypatch.setattr(owner, name, late(getattr(owner, name)))
    return Factories(mailbox=partial(RoomyMailbox, room=room), sinks=lambda prepared: [SlowSink(random.Random(seed))])


def newest(run: str | Path) -> Checkpoint:
    return load_checkpoint(list_checkpoints(Path(run))[0])


STREAMS = {"learner__gradient_accumulation_steps": 4, "schedule__learner_streams": 3}


def check(stored: Checkpoint, straight: Straight, config: RunConfig) -> None:
    """The run has come to the same bits as the loop."""
    assert same_bits(stored.weights, straight.weights)
    assert same_bits(stored.optimizer_state, straight.optimizer_state)
    assert stored.state.num_tokens == straight.num_tokens
    if config.learner.sync_ref_model:
        assert same_bits(stored.reference or {}, straight.reference or {})
    assert sorted(stored.behind) == list(range(STEPS - config.schedule.max_staleness, STEPS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "max_staleness", "timings"),
    [
        pytest.param(PLAIN, 0, [(1, 3, 1)], id="plain, 0"),
        pytest.param(PLAIN, 3, [(2, 1, 64)], id="plain, 3"),
        pytest.param(FULL, 0, [(3, 1, 64)], id="full, 0", marks=pytest.mark.slow),
        pytest.param(PLAIN | STREAMS, 0, [(8, 2, 64)], id="learning on three streams, 0"),
        pytest.param(FULL, 1, [(4, 1, 1), (5, 3, 64)], id="full, 1", marks=pytest.mark.slow),
        pytest.param(FULL, 2, [(6, 2, 64)], id="full, 2", marks=pytest.mark.slow),
        pytest.param(FULL, 3, [(7, 1, 1)], id="full, 3"),
    ],
)
def test_any_staleness_equals_the_plain_loop_whatever_the_timing(
    tmp_path: Path,
    ragged_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    max_staleness: int,
    timings: list[tuple[int, int, int]],
) -> None:
    settings = settings | {"schedule__max_staleness": max_staleness}
    config = tiny_config(ragged_model, tmp_path, **settings)
    straight = run_straight(config, often_equal)
    for seed, room, concurrency in timings:
        with monkeypatch.context() as patch:
            factories = shake(patch, seed, room=room)
            again = tiny_config(ragged_model, tmp_path / str(seed), **settings, rewards__concurrency=concurrency)
            result = troupe.train(again, [delayed(seed, reward=often_equal)], factories=factories)
        assert result.complete
        check(newest(result.folder), straight, config)


@pytest.mark.slow
@pytest.mark.parametrize("max_staleness", [0, 1, 2, 3])
@pytest.mark.parametrize("seed", [10, 11, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(12, 16))])
def test_many_timings_and_longer_delays(
    tmp_path: Path, ragged_model: Path, monkeypatch: pytest.MonkeyPatch, max_staleness: int, seed: int
) -> None:
    config = tiny_config(
        ragged_model,
        tmp_path,
        **FULL,
        schedule__max_staleness=max_staleness,
        rewards__concurrency=random.Random(seed).choice([1, 2, 64]),
    )
    straight = run_straight(config, often_equal)
    factories = shake(monkeypatch, seed, room=1 + seed % 3, most_s=0.02)
    result = troupe.train(config, [delayed(seed, most_s=0.05, reward=often_equal)], factories=factories)
    check(newest(result.folder), straight, config)


def test_each_staleness_gives_other_weights(tmp_path: Path, ragged_model: Path) -> None:
    loops = [
        run_straight(tiny_config(ragged_model, tmp_path, **PLAIN, schedule__max_staleness=eta), often_equal).weights
        for eta in range(4)
    ]
    assert not any(same_bits(one, other) for i, one in enumerate(loops) for other in loops[:i])


@pytest.mark.parametrize(("max_staleness", "ending"), [(2, "drain"), (3, "stop")])
@pytest.mark.slow
async def test_with_more_staleness_too_a_run_goes_on_to_the_same_bits(
    tmp_path: Path, ragged_model: Path, monkeypatch: pytest.MonkeyPatch, max_staleness: int, ending: str
) -> None:
    config = tiny_config(ragged_model, tmp_path, **FULL, schedule__max_staleness=max_staleness)
    straight = run_straight(config, often_equal)
    factories = shake(monkeypatch, 5)
    async with Supervisor(config, [delayed(5, reward=often_equal)], factories=factories) as run:
        async for update in run.updates():
            if update.step == 2:
                getattr(run, ending)()
    assert 2 <= run.result.steps <= STEPS
    assert len(newest(run.folder).behind) == min(run.result.steps, max_staleness)
    async with Supervisor(config, [delayed(6, reward=often_equal)], resume=True, factories=factories) as rest:
        await rest.wait()
    assert rest.result.complete
    check(newest(rest.folder), straight, config)
