"""What is read back, and what is refused by its name."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest

from tests.checkpoint.checkpoints import assert_same, assert_same_arrays, made, weights, whole
from troupe.checkpoint import (
    FORMAT,
    MANIFEST,
    Checkpoint,
    RewardState,
    RunState,
    checkpoint_folder,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    read_state,
    save_checkpoint,
)
from troupe.checkpoint import read as reading_room
from troupe.errors import CheckpointError, RunError
from troupe.messages import Unfinished

FILES = (
    "behind-00000001.safetensors",
    "config.json",
    "model.safetensors",
    "optimizer.safetensors",
    "reference.safetensors",
    "rows.msgpack",
    "state.json",
    "unfinished.msgpack",
)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "step-00000002"
    save_checkpoint(folder, whole(2))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / saved.name)
    return tmp_path / saved.name


def rewrite(folder: Path, name: str, data: bytes | None) -> None:
    """Change a file and its entry in the manifest, a fault that no sum can show; or, with None, remove the entry."""
    listed = json.loads((folder / MANIFEST).read_text())
    if data is None:
        del listed[name]
    else:
        listed[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        (folder / name).write_bytes(data)
    (folder / MANIFEST).write_text(json.dumps(listed))


def become_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_comes_back_bit_for_bit(run: Path, dtype: mx.Dtype) -> None:
    before = made(7, dtype=dtype, behind=(5, 6))
    save_checkpoint(checkpoint_folder(run, 7), before)
    assert_same(load_checkpoint(str(checkpoint_folder(run, 7))), before)


def test_all_that_a_checkpoint_can_hold_comes_back(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, *FILES]
    assert_same(load_checkpoint(folder), whole(2))


def test_every_entry_of_the_optimizers_state_comes_back(run: Path) -> None:
    before = made(7)
    before.optimizer_state["entropy_coef"] = mx.array(0.25)
    save_checkpoint(checkpoint_folder(run, 7), before)
    assert load_checkpoint(checkpoint_folder(run, 7)).optimizer_state["entropy_coef"].item() == 0.25


def test_a_folder_of_the_first_format_is_read(folder: Path) -> None:
    rewrite(folder, "state.json", b'{"version": 2, "seed": 1, "dataset": "x"}')
    rewrite(folder, "unfinished.msgpack", None)
    (folder / "unfinished.msgpack").unlink()
    loaded = load_checkpoint(folder)
    assert loaded.state == RunState(format=1, version=2, seed=1, dataset="x")
    assert (loaded.state.mode, loaded.state.model, loaded.state.num_tokens) == ("pinned", "", 0)
    assert (loaded.state.rewards, loaded.state.metrics, loaded.state.skipped_in_a_row) == ({}, {}, 0)
    assert loaded.unfinished == Unfinished()


def test_what_is_written_says_its_format(folder: Path) -> None:
    raw = json.loads((folder / "state.json").read_text())
    assert raw["format"] == FORMAT == 3
    assert raw["rewards"] == {"kind": {"version": 3, "spec": "rewards.py:kind"}, "given": {"version": 0, "spec": None}}
    assert read_state(folder).rewards["kind"] == RewardState(version=3, spec="rewards.py:kind")


def test_a_newer_format_is_refused_and_nothing_older_taken_instead(run: Path) -> None:
    for version in (1, 2):
        save_checkpoint(checkpoint_folder(run, version), made(version))
    newest = checkpoint_folder(run, 2)
    rewrite(newest, "state.json", b'{"format": 4, "version": {"major": 2}, "more": []}')
    message = r"step-00000002: a checkpoint of format 4, but this Troupe knows those up to 3; go on with the newer"
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(newest)
    with pytest.raises(CheckpointError, match=message):
        list(load_newest(run))


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "cut", "half", "grow", "empty", "zeros", "gone", "folder"])
def test_damage_is_refused_by_the_name_of_the_file(folder: Path, name: str, damage: str) -> None:
    file = folder / name
    data = file.read_bytes()
    middle = len(data) // 2
    damaged: dict[str, Callable[[], Any]] = {
        "flip": lambda: file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]),
        "cut": lambda: file.write_bytes(data[:-1]),
        "half": lambda: file.write_bytes(data[:middle]),
        "grow": lambda: file.write_bytes(data + b"}"),
        "empty": lambda: file.write_bytes(b""),
        "zeros": lambda: file.write_bytes(bytes(len(data))),
        "gone": file.unlink,
        "folder": lambda: become_a_folder(file),
    }
    damaged[damage]()
    with pytest.raises(CheckpointError, match=r"use an older" if name == MANIFEST else rf"{name}: .*use an older"):
        load_checkpoint(folder)


def test_no_bit_of_a_manifest_can_flip_unnoticed(folder: Path) -> None:
    original = (folder / MANIFEST).read_bytes()
    content = json.loads(original)
    for place in range(0, len(original), 5):
        for bit in (0, 7):
            data = bytearray(original)
            data[place] ^= 1 << bit
            (folder / MANIFEST).write_bytes(data)
            try:
                load_checkpoint(folder)
            except CheckpointError:
                continue
            assert json.loads(data) == content  # only white space may differ


@pytest.mark.parametrize("name", ["../x", "/etc/hosts", "..", ".", "", "a/b", "a\x00b", "x" * 300, "no such file"])
def test_a_manifest_never_leads_out_of_its_folder(folder: Path, name: str) -> None:
    (folder.parent / "x").write_text("out")
    listed = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({name: {"bytes": 3, "sha256": "0"}, **listed}))
    with pytest.raises(CheckpointError, match=r"no plain file name; the manifest is damaged|is missing|cannot be read"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    "text",
    [
        b"[]",
        b"null",
        b"3",
        b'{"state.json": 3}',
        b'{"state.json": null}',
        b'{"state.json": {"bytes": "3", "sha256": "0"}}',
        b'{"state.json": {"bytes": 3}}',
        b'{"state.json": {"bytes": 3, "sha256": 7}}',
        b'{"state.json": {"bytes": 1e400, "sha256": ""}}',
        b'{"state.json": {"bytes": 99999999999999999999999, "sha256": ""}}',
        b'{"state.json": {"bytes": -1, "sha256": ""}}',
        b'{"\xff": {"bytes": 1, "sha256": ""}}',
        b'{"\\ud800": {"bytes": 1, "sha256": ""}}',
        b'{"x":' * 100_000,
        b"{}",
    ],
)
def test_an_absurd_manifest_is_refused(folder: Path, text: bytes) -> None:
    (folder / MANIFEST).write_bytes(text)
    with pytest.raises(CheckpointError, match=r"older|use another"):
        load_checkpoint(folder)


def test_a_folder_without_a_manifest_is_no_checkpoint(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"no MANIFEST\.json.*never finished"):
        load_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"no MANIFEST\.json"):
        load_checkpoint(folder / "nowhere")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_manifest_that_forgets_a_file_is_refused(folder: Path, name: str) -> None:
    rewrite(folder, name, None)
    with pytest.raises(CheckpointError, match=rf"does not list {name}: no whole checkpoint; use another one"):
        load_checkpoint(folder)


def test_what_is_not_listed_is_not_read(folder: Path) -> None:
    (folder / "behind-00000000.safetensors").write_bytes(b"stray")
    (folder / "notes").mkdir()
    assert list(load_checkpoint(folder).behind) == [1]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("state.json", b'{"version": "two"}', r"state\.json: the state of the run cannot be read"),
        ("state.json", b'{"version": -1, "seed": 1, "dataset": ""}', r"state\.json: .*>= 0.*version"),
        ("state.json", b'{"version": 1, "seed": 1.5, "dataset": ""}', r"state\.json: .*int.*seed"),
        ("state.json", b'{"version": 1, "seed": 1, "dataset": 7}', r"state\.json: .*str.*dataset"),
        ("state.json", b'{"version": 1, "seed": 1, "dataset": "", "mode": "other"}', r"state\.json: .*mode"),
        ("state.json", b'{"version": 1, "seed": 1, "dataset": "", "metrics": {"a": "b"}}', r"state\.json: .*metrics"),
        ("state.json", b'{"version": 1, "seed": 1, "dataset": "", "rewards": {"a": 1}}', r"state\.json: .*rewards"),
        ("state.json", b'{"version": 1, "seed": 1, "dataset": "", "other": 1}', r"state\.json: .*other"),
        ("state.json", b'{"format": "2", "version": 1, "seed": 1, "dataset": ""}', r"state\.json: .*format"),
        ("state.json", b'{"format": 0, "version": 1, "seed": 1, "dataset": ""}', r"state\.json: .*format"),
        ("state.json", b"\xff", r"state\.json: the state of the run cannot be read"),
        ("state.json", b"[]", r"state\.json: the state of the run cannot be read"),
        ("unfinished.msgpack", b"\xc1", r"unfinished\.msgpack: the groups under way cannot be read"),
        ("config.json", b"[]", r"config\.json: the model's configuration cannot be used"),
        ("config.json", b'{"model_type": "llama"}', r"config\.json: the model's configuration cannot be used"),
        ("config.json", b'{"a":' * 100_000, r"config\.json: the model's configuration cannot be used"),
        ("optimizer.safetensors", b"garbage", r"optimizer\.safetensors: the arrays cannot be read"),
        ("optimizer.safetensors", b"", r"optimizer\.safetensors: the arrays cannot be read"),
        ("model.safetensors", (9).to_bytes(8, "little") + b"{" * 9, r"model\.safetensors: the arrays cannot be read"),
    ],
)
def test_files_that_were_written_wrong_are_refused(folder: Path, name: str, data: bytes, message: str) -> None:
    rewrite(folder, name, data)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_weights_that_do_not_fit_the_configuration_are_refused(folder: Path, run: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    rewrite(folder, "config.json", json.dumps(raw | {"num_hidden_layers": 1}).encode())
    with pytest.raises(CheckpointError, match=r"safetensors: its tensors are not those that config\.json asks for"):
        load_checkpoint(folder)
    other = msgspec.structs.replace(made(7), reference={"w": mx.zeros(3)})
    save_checkpoint(checkpoint_folder(run, 7), other)
    with pytest.raises(CheckpointError, match=r"reference\.safetensors: its tensors are not those"):
        load_checkpoint(checkpoint_folder(run, 7))


def test_load_newest_goes_back_until_one_is_whole(run: Path) -> None:
    for version in (1, 2, 10):
        save_checkpoint(checkpoint_folder(run, version), made(version))
    (checkpoint_folder(run, 10) / "state.json").write_text("{}")
    checkpoint_folder(run, 99).mkdir()
    (run / "checkpoints" / "step-x").mkdir()
    assert [folder.name for folder in list_checkpoints(run)] == ["step-00000010", "step-00000002", "step-00000001"]
    found = load_newest(run)
    damaged, intact = next(found), next(found)
    assert isinstance(damaged, CheckpointError)
    assert "step-00000010/state.json" in str(damaged)
    assert isinstance(intact, Checkpoint)
    assert_same(intact, made(2))
    assert list(load_newest(run / "nothing")) == []


def test_what_a_checkpoint_does_not_hold_is_not_left_in_its_folder(run: Path) -> None:
    folder = checkpoint_folder(run, 7)
    save_checkpoint(folder, msgspec.structs.replace(made(7, behind=(6,)), reference=weights(8)))
    reference = load_checkpoint(folder).reference
    assert reference is not None
    assert_same_arrays(reference, weights(8))
    save_checkpoint(folder, made(7))
    loaded = load_checkpoint(folder)
    assert (loaded.reference, loaded.behind) == (None, {})


def out_of_memory(*_: object) -> Any:
    raise RuntimeError("[malloc] Unable to allocate 4096 bytes.")


@pytest.mark.parametrize("place", ["load", "eval"])
def test_memory_that_is_short_now_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setattr(mx, place, out_of_memory)
    message = r"model\.safetensors: whole, but cannot be read now: \[malloc\] .*; free memory and resume"
    with pytest.raises(RunError, match=message):
        load_checkpoint(folder)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.EACCES])
@pytest.mark.parametrize("name", [MANIFEST, "model.safetensors", "state.json"])
def test_what_passes_never_leads_to_an_older_checkpoint(
    run: Path, monkeypatch: pytest.MonkeyPatch, name: str, number: int
) -> None:
    for version in (1, 2):
        save_checkpoint(checkpoint_folder(run, version), made(version))
    fail_at(monkeypatch, checkpoint_folder(run, 2) / name, number)
    with pytest.raises(RunError, match=rf"step-00000002/{name}: .*cannot be read now: .*that is no damage: .* resume"):
        list(load_newest(run))


def test_a_disk_that_errs_has_damaged_the_file(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for version in (1, 2):
        save_checkpoint(checkpoint_folder(run, version), made(version))
    fail_at(monkeypatch, checkpoint_folder(run, 2) / "model.safetensors", errno.EIO)
    damaged, intact = load_newest(run)
    assert isinstance(damaged, CheckpointError)
    assert isinstance(intact, Checkpoint)
    assert_same(intact, made(1))


@pytest.mark.parametrize("name", ["config.json", "state.json", "unfinished.msgpack", "rows.msgpack"])
def test_small_files_too_may_be_readable_later(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    listed = reading_room.verify_manifest(folder)
    monkeypatch.setattr(reading_room, "verify_manifest", lambda path: listed)
    fail_at(monkeypatch, folder / name, errno.EMFILE)
    with pytest.raises(RunError, match=rf"{name}: .* now: .*Too many open files.*; that is no damage: allow more open"):
        load_checkpoint(folder)


def fail_at(monkeypatch: pytest.MonkeyPatch, file: Path, number: int) -> None:
    """Opening this one file fails."""
    real = Path.open

    def opened(path: Path, *args: Any, **options: Any) -> Any:
        if path == file:
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "open", opened)


def test_a_header_that_is_not_sound_is_damage(folder: Path) -> None:
    rewrite(folder, "optimizer.safetensors", (1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: the arrays cannot be read: .*use an older"):
        load_checkpoint(folder)


def test_no_open_file_left_for_mlx_is_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(file: Path) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(mx, "load", out_of_memory)
    monkeypatch.setattr(reading_room, "read_header", fail)
    with pytest.raises(RunError, match="whole, but cannot be read now"):
        load_checkpoint(folder)
