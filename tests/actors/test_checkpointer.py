"""Checkpointer: whole folders that load, a disk that fails and works again, what it tells, the final policy."""

from __future__ import annotations

import gc
import json
import math
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import anyio.lowlevel
import mlx.core as mx
import pytest

from tests.support.fakes import Reports, device_thread, make_scored, same_bits, send_all
from tests.support.tiny import CONFIG
from troupe.actors import checkpointer as writer_room
from troupe.actors.checkpointer import Checkpointer, CheckpointWriter, growing_pauses, lower_priority
from troupe.actors.learner.batch import CompletionLogProbs
from troupe.actors.ledgers import CheckpointLedger
from troupe.checkpoint import CheckpointConfig, RunState, files, list_checkpoints, load_checkpoint
from troupe.checkpoint import keep as keeping
from troupe.checkpoint import write as writing
from troupe.errors import RunError
from troupe.grpo import LearnerConfig, adamw_init, make_batch, train_on_batch
from troupe.messages import CheckpointWritten, Snapshot, Unfinished
from troupe.policy import Weights, load_policy, random_policy
from troupe.policy.safetensors import safetensors_chunks
from troupe.runtime.mailbox import Channel, Mailbox
from troupe.runtime.roles import Restarts, Role, run_roles

pytestmark = pytest.mark.anyio

FOREVER = 1e9
"""Seconds that no test waits."""


def state_of(snapshot: Snapshot) -> RunState:
    return RunState(
        version=snapshot.version,
        seed=4,
        dataset="data",
        num_tokens=snapshot.num_tokens,
        metrics=dict(snapshot.metrics),
    )


class Rig:
    def __init__(
        self,
        run: Path,
        source: Path | None = None,
        *,
        ledger: CheckpointLedger | None = None,
        pauses: Iterable[float] = (FOREVER,),
        settled: bool = True,
        **config: Any,
    ) -> None:
        self.reports, self.inbox, self.run = Reports(), Mailbox("checkpointer"), run
        self.snapshots: Channel[Snapshot] = self.inbox.channel("snapshots", Snapshot, bound=9)
        self.metrics = Mailbox("metrics")
        self.ledger, self.device = ledger or CheckpointLedger(), device_thread("checkpointer")
        self.settled: list[tuple[int, list[str]]] = []
        self._settles = settled
        self.make = partial(
            Checkpointer,
            self.inbox,
            self.metrics.channel("checkpoints", CheckpointWritten, bound=9),
            writer=CheckpointWriter(
                run, CheckpointConfig(**({"keep": 2} | config)), CONFIG, source, run_state=state_of, ledger=self.ledger
            ),
            device=self.device,
            settle=self._settle,
            pauses=lambda: pauses,
            report=self.reports.reporter("checkpointer"),
        )
        self.checkpointer = self.make()

    async def _settle(self, version: int) -> bool:
        self.settled.append((version, self.versions))
        return self._settles

    async def run_with(self, *snapshots: Snapshot) -> None:
        await send_all(self.snapshots, snapshots)
        await run_roles([self.checkpointer])

    @property
    def versions(self) -> list[str]:
        """Of the finished checkpoints, newest first."""
        return [folder.name.removeprefix("step-0000000") for folder in list_checkpoints(self.run)]

    @property
    def told(self) -> list[CheckpointWritten]:
        return list(self.metrics.waiting)

    async def incidents(self) -> list[tuple[str, str]]:
        found = await self.reports.incidents()
        assert {incident.actor for incident in found} <= {"checkpointer"}
        return [(incident.kind, incident.message) for incident in found]


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def weights_of(seed: int) -> Weights:
    return random_policy(CONFIG, seed).weights


def snapshot(version: int, *, final: bool = False, **fields: Any) -> Snapshot:
    state = adamw_init(weights_of(version))
    mx.eval(list(state.values()))
    return Snapshot(
        version=version,
        weights=fields.pop("weights", None) or weights_of(version),
        optimizer_state=state,
        behind={version - 1: weights_of(version - 1)},
        final=final,
        **fields,
    )


@pytest.mark.skipif(sys.platform != "linux", reason="priorities of threads are Linux's")
async def test_its_thread_lets_others_go_first_and_no_other_does(tmp_path: Path) -> None:
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    rig, before = Rig(tmp_path), niceness()
    await rig.checkpointer.start()
    assert await rig.device.run(niceness) == max(5, before)
    assert niceness() == before
    lower_priority()
    assert niceness() == before, "the main thread is nobody's background"


async def until(holds: Callable[[], object]) -> None:
    """Let others go on until something holds that a thread brings about."""
    while not holds():
        await anyio.lowlevel.checkpoint()


@pytest.fixture(autouse=True)
def no_real_sync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Having things on the disk takes most of the time of these tests, and nobody cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


class Disk:
    """Fails for the versions that are in `broken`, at the moment when a folder would get its name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *broken: int) -> None:
        self.broken = set(broken)
        self.attempts: list[int] = []
        self.on_attempt: Callable[[], object] = lambda: None
        self._take_place = writing._take_place
        monkeypatch.setattr(writing, "_take_place", self._publish)

    def _publish(self, temporary: Path, path: Path) -> None:
        if path.name != "final":
            version = int(path.name.removeprefix("step-"))
            self.attempts.append(version)
            self.on_attempt()
            if version in self.broken:
                raise OSError(28, "No space left on device")
        self._take_place(temporary, path)


async def test_what_else_a_snapshot_holds_is_written(tmp_path: Path, tiny_model: Path) -> None:
    rig = Rig(tmp_path, tiny_model)
    unfinished = Unfinished(next=7, scored=(make_scored(3, 0),))
    whole = snapshot(3, reference=weights_of(9), num_tokens=77, unfinished=unfinished, metrics={"reward": 1})
    await rig.run_with(whole)
    loaded = load_checkpoint(list_checkpoints(tmp_path)[0])
    assert loaded.reference is not None
    assert same_bits(loaded.reference, weights_of(9))
    assert (loaded.state.num_tokens, loaded.state.metrics) == (77, {"reward": 1.0})
    assert loaded.unfinished.next == 7
    assert loaded.unfinished.scored[0].scores == {"r": (0.0, 1.0, 0.5)}


async def test_every_snapshot_is_written_and_told_and_the_oldest_removed(tmp_path: Path, tiny_model: Path) -> None:
    rig = Rig(tmp_path, tiny_model)
    await rig.run_with(snapshot(1), snapshot(2), snapshot(5, final=True))
    assert rig.versions == ["5", "2"]
    newest, _ = list_checkpoints(tmp_path)
    loaded = load_checkpoint(newest)
    assert same_bits(loaded.weights, weights_of(5))
    assert same_bits(loaded.behind[4], weights_of(4))
    assert loaded.state == RunState(version=5, seed=4, dataset="data")
    final = load_policy(tmp_path / "final")
    assert same_bits(final.weights, weights_of(5))
    assert final.tokenizer.encode("hi") == [104, 105]
    assert names_in(tmp_path) == {"checkpoints", "final"}, "nothing temporary is left"
    assert [(told.version, told.removed) for told in rig.told] == [(1, ()), (2, ()), (5, (1,))]
    told = rig.told[-1]
    assert told.folder == str(newest)
    assert told.bytes == sum(path.stat().st_size for path in newest.iterdir() if path.name != "MANIFEST.json")
    assert 0 < told.seconds < 60
    assert rig.metrics.channels[0].closed
    assert await rig.incidents() == []


async def test_before_a_checkpoint_is_there_all_that_was_told_is_on_the_disk(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    await rig.run_with(snapshot(1), snapshot(2))
    assert rig.settled == [(1, []), (2, ["1"])]


async def test_what_does_not_settle_in_time_is_told_and_the_checkpoint_written(tmp_path: Path) -> None:
    rig = Rig(tmp_path, settled=False)
    await rig.run_with(snapshot(3))
    assert rig.versions == ["3"]
    [(kind, message)] = await rig.incidents()
    assert kind == "checkpoint_unsettled"
    assert "told of the steps up to 3" in message


def test_pauses_grow_to_a_minute() -> None:
    assert list(islice(growing_pauses(), 9)) == [1, 2, 4, 8, 16, 32, 60, 60, 60]


async def test_a_failing_disk_is_an_incident_and_what_failed_is_tried_until_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, disk = Rig(tmp_path, pauses=[0.0] * 9, keep=1), Disk(monkeypatch, 2)
    waited: list[bool] = []

    async def learn_on() -> None:
        await rig.snapshots.send(snapshot(1))
        await rig.snapshots.settled()
        await rig.snapshots.send(snapshot(2))
        await rig.snapshots.settled()  # or the test would never end
        waited.append(rig.ledger.pending is not None)
        assert rig.versions == ["1"]

    def attempt() -> None:
        if disk.attempts.count(2) == 4:
            disk.broken.clear()

    disk.on_attempt = attempt
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_roles, [rig.checkpointer])
        await learn_on()
        await until(lambda: rig.ledger.pending is None)
        assert rig.versions == ["2"]
        rig.snapshots.close()
    assert waited == [True]
    assert disk.attempts == [1, 2, 2, 2, 2]
    assert same_bits(load_checkpoint(list_checkpoints(tmp_path)[0]).weights, weights_of(2))
    (failed, message), (back, good) = await rig.incidents()
    assert (failed, back) == ("checkpoint_failed", "checkpoint_back")
    assert "the checkpoint of step 2 could not be written: [Errno 28] No space left" in message
    assert "training goes on" in message
    assert "it is tried again" in message
    assert good == "the checkpoint of step 2 is written: the disk works"
    assert [told.version for told in rig.told] == [1, 2]
    assert names_in(tmp_path / "checkpoints") == {"step-00000002"}


class Held(dict[str, Any]):
    """Weights of which one can tell whether anybody holds them."""


async def test_a_newer_snapshot_takes_the_place_of_one_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, disk = Rig(tmp_path), Disk(monkeypatch, 2)
    old = Held(weights_of(2))
    alive = weakref.ref(old)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_roles, [rig.checkpointer])
        await rig.snapshots.send(snapshot(2, weights=old))
        del old
        await rig.snapshots.settled()
        assert alive() is not None, "kept, to be tried again"
        held: list[object] = []

        def look() -> None:
            gc.collect()
            held.append(alive())

        disk.on_attempt = look
        await rig.snapshots.send(snapshot(3))
        await rig.snapshots.settled()
        rig.snapshots.close()
    assert held == [None], "its arrays are let go of before the next is written"
    assert disk.attempts == [2, 3]
    assert rig.versions == ["3"]
    assert [kind for kind, _ in await rig.incidents()] == ["checkpoint_failed", "checkpoint_back"]


async def test_an_attempt_gives_way_to_a_newer_snapshot_while_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", 4096)
    rig, disk = Rig(tmp_path, pauses=[0.0] * 9), Disk(monkeypatch, 2)
    write_all, write_again, go_on = files._write_all, threading.Event(), threading.Event()
    blocks = 0

    def slow(descriptor: int, block: memoryview) -> None:
        nonlocal blocks
        if rig.ledger.pending is not None:
            blocks += 1
            write_again.set()
            assert go_on.wait(60)
        write_all(descriptor, block)

    monkeypatch.setattr(files, "_write_all", slow)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_roles, [rig.checkpointer])
        await rig.snapshots.send(snapshot(2))
        await until(lambda: write_again.is_set())
        await rig.snapshots.send(snapshot(3))
        go_on.set()
        rig.snapshots.close()
    assert blocks == 1, "it noticed at the next block"
    assert disk.attempts == [2, 3]
    assert names_in(tmp_path / "checkpoints") == {"step-00000003"}
    assert [told.version for told in rig.told] == [3]


async def test_where_memory_has_no_room_for_it_a_snapshot_that_failed_is_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig, disk = Rig(tmp_path, pauses=[0.0] * 9, overlap=False), Disk(monkeypatch, 2)
    await rig.run_with(snapshot(2), snapshot(3))
    assert disk.attempts == [2, 3]
    (_, message), (back, _) = await rig.incidents()
    assert message.endswith("and the next one will be tried")
    assert back == "checkpoint_back"


async def test_the_end_of_the_run_ends_the_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, disk = Rig(tmp_path), Disk(monkeypatch, 2)
    await rig.run_with(snapshot(2))  # it pauses for ever, but the mailbox ends
    assert (disk.attempts, rig.versions) == ([2], [])


async def test_attempts_end_when_there_is_no_pause_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, disk = Rig(tmp_path, pauses=[0.0]), Disk(monkeypatch, 2)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_roles, [rig.checkpointer])
        await rig.snapshots.send(snapshot(2))
        await until(lambda: len(disk.attempts) >= 2)
        await rig.snapshots.send(snapshot(3))
        rig.snapshots.close()
    assert disk.attempts == [2, 2, 3]


async def test_the_final_policy_must_be_written(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    rig = Rig(tmp_path)
    with pytest.raises(RunError, match="the final policy could not be written"):
        await rig.run_with(snapshot(2, final=True))


async def test_a_checkpoint_that_is_whole_is_not_written_again(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    await rig.checkpointer.handle(snapshot(2))
    manifest = tmp_path / "checkpoints" / "step-00000002" / "MANIFEST.json"
    written = manifest.stat().st_mtime_ns
    await rig.run_with(snapshot(2, final=True))
    assert manifest.stat().st_mtime_ns == written
    assert same_bits(load_policy(tmp_path / "final").weights, weights_of(2))
    assert [told.version for told in rig.told] == [2]


async def test_of_the_same_step_what_holds_more_scores_is_written_and_keeps_the_means(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    more = Unfinished(scored=(make_scored(3, 0),))
    await rig.run_with(
        snapshot(2, metrics={"reward": 0.5}),
        snapshot(2, unfinished=more),
        snapshot(2, unfinished=more),
    )
    [folder] = list_checkpoints(tmp_path)
    loaded = load_checkpoint(folder)
    assert len(loaded.unfinished.scored) == 1
    assert loaded.state.metrics == {"reward": 0.5}
    assert [told.version for told in rig.told] == [2, 2]


async def test_means_of_a_checkpoint_that_was_removed_meanwhile_are_gone(tmp_path: Path) -> None:
    rig = Rig(tmp_path, ledger=CheckpointLedger(newest=2))
    await rig.run_with(snapshot(2, unfinished=Unfinished(collected=(make_scored(2, 0),))))
    assert load_checkpoint(list_checkpoints(tmp_path)[0]).state.metrics == {}


async def test_the_best_checkpoint_stays(tmp_path: Path) -> None:
    rig = Rig(tmp_path, keep=1)
    rewards = {1: 0.1, 2: 0.8, 3: 0.3, 4: math.nan, 5: 0.2}
    await rig.run_with(*(snapshot(version, metrics={"reward": reward}) for version, reward in rewards.items()))
    assert rig.versions == ["5", "2"]
    assert [told.removed for told in rig.told] == [(), (1,), (), (3,), (4,)]
    state = json.loads((tmp_path / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert state["metrics"] == {"reward": 0.8}


async def test_a_future_that_was_abandoned_goes_with_the_first_own_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await Rig(tmp_path, keep=9).run_with(*map(snapshot, (1, 2, 6, 7)))
    disk = Disk(monkeypatch, 3)
    rig = Rig(tmp_path, keep=2, ledger=CheckpointLedger(newest=2, abandoned={6, 7}))
    await rig.checkpointer.handle(snapshot(3))
    assert rig.versions == ["7", "6", "2", "1"], "nothing goes before there is one"
    disk.broken.clear()
    await rig.checkpointer.handle(snapshot(4))
    assert rig.versions == ["4", "2"]
    assert rig.told[-1].removed == (1, 6, 7)
    await rig.run_with(*map(snapshot, (6, 7)))
    assert rig.versions == ["7", "6"], "these are its own"


async def test_a_checkpoint_in_the_place_of_an_abandoned_one_is_the_runs_own(tmp_path: Path) -> None:
    await Rig(tmp_path, keep=9).run_with(*map(snapshot, (1, 4)))
    rig = Rig(tmp_path, ledger=CheckpointLedger(newest=1, abandoned={4}))
    await rig.run_with(snapshot(4, num_tokens=9))
    assert rig.versions == ["4", "1"]
    assert load_checkpoint(list_checkpoints(tmp_path)[0]).state.num_tokens == 9


async def test_what_cannot_be_removed_is_an_incident_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(path: Path, ignore_errors: bool = False, **_: Any) -> None:
        if not ignore_errors:
            raise OSError(16, "Device or resource busy")

    rig = Rig(tmp_path, keep=1)
    await rig.checkpointer.handle(snapshot(1))
    with monkeypatch.context() as patch:
        patch.setattr(keeping, "shutil", SimpleNamespace(rmtree=stuck))
        await rig.checkpointer.handle(snapshot(2))
    [(kind, message)] = await rig.incidents()
    assert kind == "prune_failed"
    assert message.startswith("old checkpoints could not be removed: ")
    assert "step-00000001: [Errno 16] Device or resource busy" in message
    with monkeypatch.context() as patch:
        patch.setattr(writer_room, "prune_checkpoints", lambda *_, **__: stuck(tmp_path))
        await rig.checkpointer.handle(snapshot(3))
    [(kind, message)] = await rig.incidents()
    assert (kind, message.count("Device or resource busy")) == ("prune_failed", 1)
    await rig.run_with(snapshot(4))
    assert rig.versions == ["4"]
    assert await rig.incidents() == []
    assert [told.version for told in rig.told] == [1, 2, 3, 4]


async def test_the_room_that_killed_runs_took_is_there_for_the_next_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leftover = tmp_path / "checkpoints" / ".writing-step-00000009"
    leftover.mkdir(parents=True)
    check_room = writing._check_room

    def check(folder: Path, needed_bytes: int) -> None:
        assert not leftover.exists()
        check_room(folder, needed_bytes)

    monkeypatch.setattr(writing, "_check_room", check)
    await Rig(tmp_path).run_with(snapshot(1))


@pytest.mark.parametrize("where", ["save_checkpoint", "prune_checkpoints", "save_final_policy"])
@pytest.mark.parametrize("late", [False, True])
async def test_a_snapshot_that_a_failed_checkpointer_had_in_hand_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, late: bool
) -> None:
    work, failures = getattr(writer_room, where), iter([ValueError("before or after")])

    def fails_once(*args: Any, **settings: Any) -> Any:
        if not late:
            for error in failures:
                raise error
        result = work(*args, **settings)
        for error in failures:
            raise error
        return result

    monkeypatch.setattr(writer_room, where, fails_once)
    rig = Rig(tmp_path)
    await send_all(rig.snapshots, [snapshot(1), snapshot(2, final=True)])
    role = Role(rig.make)
    await run_roles([role], Restarts(first_s=0.0))
    assert role.restarts == 1
    folders = list_checkpoints(tmp_path)
    assert [folder.name for folder in folders] == ["step-00000002", "step-00000001"]
    for folder, version in zip(folders, (2, 1), strict=True):
        assert same_bits(load_checkpoint(folder).weights, weights_of(version))
    assert same_bits(load_policy(tmp_path / "final").weights, weights_of(2))
    assert names_in(tmp_path) == {"checkpoints", "final"}
    assert {told.version for told in rig.told} == {1, 2}


async def test_a_successor_goes_on_trying(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rig, disk = Rig(tmp_path, pauses=[0.0] * 9), Disk(monkeypatch, 2)
    faults = iter([ValueError("out of luck")])

    def attempt() -> None:
        if disk.attempts.count(2) == 2:
            for fault in faults:
                raise fault
        if disk.attempts.count(2) == 4:
            disk.broken.clear()

    disk.on_attempt = attempt
    role = Role(rig.make)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_roles, [role], Restarts(first_s=0.0))
        await rig.snapshots.send(snapshot(2))
        await until(lambda: rig.versions)
        rig.snapshots.close()
    assert role.restarts == 1
    assert disk.attempts == [2, 2, 2, 2]
    assert same_bits(load_checkpoint(list_checkpoints(tmp_path)[0]).weights, weights_of(2))


def bits(arrays: Any) -> dict[str, bytes]:
    return {name: b"".join(safetensors_chunks({name: array})) for name, array in arrays.items()}


async def test_learning_goes_on_while_a_snapshot_is_written_and_changes_nothing_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real steps of learning while a slow disk has taken half a file."""
    config = LearnerConfig(lr=0.1, batch_size=1)
    log_probs = CompletionLogProbs(CONFIG, 1.0)
    completions = [[5, 6, 7], [8, 9], [10]]
    batch = make_batch(
        [(1, 2, 3)] * 3, completions, [[-5.0] * len(row) for row in completions], [1.0, -1.0, 0.5], pad_id=0
    )
    weights, state = weights_of(1), adamw_init(weights_of(1))
    mx.eval(list(state.values()))

    def step(weights: Weights, state: dict[str, mx.array]) -> tuple[Weights, dict[str, mx.array]]:
        result = train_on_batch(weights, state, batch, log_probs, config, lr=0.1)
        assert result.updated
        return result.weights, result.optimizer_state

    weights, state = step(weights, state)
    taken = Snapshot(version=1, weights=weights, optimizer_state=dict(state), behind={0: weights_of(1)})
    expected = [bits(taken.weights), bits(taken.optimizer_state), bits(taken.behind[0])]
    monkeypatch.setattr(files, "BLOCK_BYTES", 4096)
    half_way, learned, write_all, blocks = threading.Event(), threading.Event(), files._write_all, 0

    def slow(descriptor: int, block: memoryview) -> None:
        nonlocal blocks
        blocks += 1
        if blocks == 5:
            half_way.set()
            assert learned.wait(60)
        write_all(descriptor, block)

    monkeypatch.setattr(files, "_write_all", slow)
    rig = Rig(tmp_path)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run_roles, [rig.checkpointer])
        await rig.snapshots.send(taken)
        del taken
        rig.snapshots.close()
        await until(lambda: half_way.is_set())
        for _ in range(3):
            weights, state = step(weights, state)
        learned.set()
    loaded = load_checkpoint(list_checkpoints(tmp_path)[0])
    assert [bits(loaded.weights), bits(loaded.optimizer_state), bits(loaded.behind[0])] == expected
    assert bits(weights) != expected[0]
    assert bits(state) != expected[1]
