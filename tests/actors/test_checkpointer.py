"""Checkpointer: whole folders that load, a disk that fails, the final policy."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest

from tests.fakes import Reports, device_thread, same_bits, send_all
from tests.tiny import CONFIG
from troupe import checkpoint
from troupe.actors import checkpointer as checkpointer_room
from troupe.actors.checkpointer import Checkpointer
from troupe.checkpoint import RunState, list_checkpoints, load_checkpoint
from troupe.errors import RunError
from troupe.grpo import adamw_init
from troupe.messages import Snapshot
from troupe.policy import Weights, load_policy, random_policy
from troupe.runtime import Channel, Mailbox, Restarts, Role, play

pytestmark = pytest.mark.anyio


class Stage:
    def __init__(self, run: Path, source: Path, *, keep: int = 2) -> None:
        self.reports, self.inbox, self.run = Reports(), Mailbox("checkpointer"), run
        self.snapshots: Channel[Snapshot] = self.inbox.channel("snapshots", Snapshot, bound=9)
        self.make = partial(
            Checkpointer,
            self.inbox,
            device=device_thread("checkpointer"),
            run=run,
            keep=keep,
            policy_config=CONFIG,
            source=source,
            run_state=lambda snapshot: RunState(
                version=snapshot.version, seed=4, dataset="data", num_tokens=snapshot.num_tokens
            ),
            report=self.reports.reporter("checkpointer"),
        )
        self.checkpointer = self.make()

    async def play(self, *snapshots: Snapshot) -> None:
        await send_all(self.snapshots, snapshots)
        await play([self.checkpointer])


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def weights_of(seed: int) -> Weights:
    return random_policy(CONFIG, seed).weights


def snapshot(version: int, *, final: bool = False) -> Snapshot:
    state = adamw_init(weights_of(version))
    mx.eval(list(state.values()))
    return Snapshot(
        version=version,
        weights=weights_of(version),
        optimizer_state=state,
        behind={version - 1: weights_of(version - 1)},
        final=final,
    )


async def test_what_else_a_snapshot_holds_is_written(tmp_path: Path, tiny_model: Path) -> None:
    stage = Stage(tmp_path, tiny_model)
    await stage.play(msgspec.structs.replace(snapshot(3), reference=weights_of(9), num_tokens=77))
    loaded = load_checkpoint(list_checkpoints(tmp_path)[0])
    assert loaded.reference is not None
    assert same_bits(loaded.reference, weights_of(9))
    assert loaded.state.num_tokens == 77


async def test_every_snapshot_is_written_and_the_oldest_removed(tmp_path: Path, tiny_model: Path) -> None:
    stage = Stage(tmp_path, tiny_model)
    await stage.play(snapshot(1), snapshot(2), snapshot(5, final=True))
    folders = list_checkpoints(tmp_path)
    assert [folder.name for folder in folders] == ["step-00000005", "step-00000002"]
    loaded = load_checkpoint(folders[0])
    assert same_bits(loaded.weights, weights_of(5))
    assert same_bits(loaded.behind[4], weights_of(4))
    assert loaded.state == RunState(version=5, seed=4, dataset="data")
    final = load_policy(tmp_path / "final")
    assert same_bits(final.weights, weights_of(5))
    assert final.tokenizer.encode("hi") == [104, 105]
    assert names_in(tmp_path) == {"checkpoints", "final"}, "nothing temporary is left"


async def test_a_failing_disk_is_an_incident_and_the_checkpoint_before_stays(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path, tiny_model, keep=1)
    await stage.checkpointer.handle(snapshot(1))

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "publish_folder", full)
        await stage.checkpointer.handle(snapshot(2))
    [incident] = await stage.reports.incidents()
    assert (incident.kind, incident.actor) == ("checkpoint_failed", "checkpointer")
    assert "the checkpoint of step 2 could not be written: [Errno 28] No space left" in incident.message
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000001"]
    assert same_bits(load_checkpoint(list_checkpoints(tmp_path)[0]).weights, weights_of(1))
    await stage.play(snapshot(3))
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["step-00000003"], "the next one succeeds"


async def test_what_mlx_cannot_write_is_a_failing_disk_too(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise RuntimeError("[write] Unable to write 119091 bytes to file.")

    stage = Stage(tmp_path, tiny_model)
    monkeypatch.setattr(mx, "save_safetensors", full)
    await stage.play(snapshot(2))
    [incident] = await stage.reports.incidents()
    assert "Unable to write 119091 bytes" in incident.message
    assert list_checkpoints(tmp_path) == []


async def test_the_final_policy_must_be_written(tmp_path: Path, tiny_model: Path) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    stage = Stage(tmp_path, tiny_model)
    with pytest.raises(RunError, match="the final policy could not be written"):
        await stage.play(snapshot(2, final=True))


async def test_a_checkpoint_that_is_whole_is_not_written_again(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path, tiny_model)
    await stage.checkpointer.handle(snapshot(2))
    manifest = tmp_path / "checkpoints" / "step-00000002" / "MANIFEST.json"
    written = manifest.stat().st_mtime_ns
    await stage.play(snapshot(2, final=True))
    assert manifest.stat().st_mtime_ns == written
    assert same_bits(load_policy(tmp_path / "final").weights, weights_of(2))


@pytest.mark.parametrize("where", ["publish_folder", "prune_checkpoints", "save_model_folder"])
@pytest.mark.parametrize("late", [False, True])
async def test_a_snapshot_that_a_failed_checkpointer_had_in_hand_is_written_again(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, where: str, late: bool
) -> None:
    room = checkpointer_room if where != "publish_folder" else checkpoint
    work, failures = getattr(room, where), iter([ValueError("before or after")])

    def fails_once(*args: Any, **settings: Any) -> None:
        if not late:
            for error in failures:
                raise error
        work(*args, **settings)
        for error in failures:
            raise error

    monkeypatch.setattr(room, where, fails_once)
    stage = Stage(tmp_path, tiny_model)
    await send_all(stage.snapshots, [snapshot(1), snapshot(2, final=True)])
    role = Role(stage.make)
    await play([role], Restarts(first_s=0.0))
    assert role.restarts == 1
    folders = list_checkpoints(tmp_path)
    assert [folder.name for folder in folders] == ["step-00000002", "step-00000001"]
    for folder, version in zip(folders, (2, 1), strict=True):
        assert same_bits(load_checkpoint(folder).weights, weights_of(version))
    assert same_bits(load_policy(tmp_path / "final").weights, weights_of(2))
    assert names_in(tmp_path) == {"checkpoints", "final"}
