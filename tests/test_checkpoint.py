from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import pytest

from tests.tiny import CONFIG
from troupe import checkpoint as room
from troupe.checkpoint import (
    MANIFEST,
    Checkpoint,
    CheckpointConfig,
    RunState,
    checkpoint_folder,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    prune_checkpoints,
    save_checkpoint,
    verify_manifest,
)
from troupe.errors import CheckpointError
from troupe.grpo import adamw_init
from troupe.policy import Weights, init_weights, load_policy


def weights(seed: int, dtype: mx.Dtype = mx.float32) -> Weights:
    made = init_weights(CONFIG, mx.random.key(seed), dtype)
    mx.eval(list(made.values()))
    return made


def made(version: int, *, dtype: mx.Dtype = mx.float32, behind: tuple[int, ...] = ()) -> Checkpoint:
    held = weights(version, dtype)
    moments = {
        name: array + 0.5 if array.ndim else mx.array(float(version)) for name, array in adamw_init(held).items()
    }
    state = moments | {"m.model.norm.weight": weights(version + 100)["model.layers.0.input_layernorm.weight"] * 0.3}
    mx.eval(list(state.values()))
    return Checkpoint(
        config=CONFIG,
        weights=held,
        optimizer_state=state,
        behind={number: weights(number, dtype) for number in behind},
        state=RunState(version=version, seed=11, dataset="abc"),
    )


def assert_same_arrays(a: Any, b: Any) -> None:
    assert set(a) == set(b)
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        left, right = (bytes(memoryview(x[name].reshape(-1).view(mx.uint8))) for x in (a, b))
        assert left == right, name


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    assert (a.config, a.state) == (b.config, b.state)
    assert list(a.weights) == list(b.weights)  # sums over all weights add in this order
    assert_same_arrays(a.weights, b.weights)
    assert_same_arrays(a.optimizer_state, b.optimizer_state)
    assert list(a.behind) == list(b.behind)
    for version in a.behind:
        assert list(a.behind[version]) == list(b.behind[version])
        assert_same_arrays(a.behind[version], b.behind[version])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_folders_are_numbered_by_step(run: Path) -> None:
    assert checkpoint_folder(run, 10) == run / "checkpoints" / "step-00000010"
    assert CheckpointConfig() == CheckpointConfig(every=50, keep=2)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16], ids=str)
def test_comes_back_bit_for_bit(run: Path, dtype: mx.Dtype) -> None:
    whole = made(7, dtype=dtype, behind=(5, 6))
    save_checkpoint(checkpoint_folder(run, 7), whole)
    assert_same(load_checkpoint(str(checkpoint_folder(run, 7))), whole)


def test_a_reference_that_moved_and_the_tokens_so_far_come_back(run: Path) -> None:
    whole = msgspec.structs.replace(
        made(7, behind=(6,)),
        reference=weights(8),
        state=RunState(version=7, seed=11, dataset="abc", num_tokens=12345),
    )
    folder = checkpoint_folder(run, 7)
    save_checkpoint(folder, whole)
    loaded = load_checkpoint(folder)
    assert_same(loaded, whole)
    assert loaded.reference is not None
    assert_same_arrays(loaded.reference, weights(8))
    save_checkpoint(folder, made(7))
    assert load_checkpoint(folder).reference is None, "what a checkpoint does not hold is not left in its folder"


def test_a_reference_of_another_model_is_refused(run: Path) -> None:
    folder = checkpoint_folder(run, 7)
    save_checkpoint(folder, msgspec.structs.replace(made(7), reference={"w": mx.zeros(3)}))
    with pytest.raises(CheckpointError, match=r"reference\.safetensors: its tensors are not those"):
        load_checkpoint(folder)


def test_every_entry_of_the_optimizers_state_comes_back(run: Path) -> None:
    whole = made(7)
    whole.optimizer_state["entropy_coef"] = mx.array(0.25)
    save_checkpoint(checkpoint_folder(run, 7), whole)
    assert load_checkpoint(checkpoint_folder(run, 7)).optimizer_state["entropy_coef"].item() == 0.25


def test_a_state_without_a_count_of_tokens_is_read(run: Path) -> None:
    assert msgspec.json.decode(b'{"version": 3, "seed": 1, "dataset": "x"}', type=RunState).num_tokens == 0


def test_is_a_model_folder_with_the_tokenizer_of_its_source(run: Path, tiny_model: Path) -> None:
    folder = checkpoint_folder(run, 3)
    whole = made(3)
    save_checkpoint(folder, whole, source=tiny_model)
    policy = load_policy(folder)
    assert policy.tokenizer.encode("hi") == [104, 105]
    assert_same_arrays(policy.weights, whole.weights)
    assert (folder / "tokenizer.json").read_bytes() == (tiny_model / "tokenizer.json").read_bytes()
    listed = json.loads((folder / MANIFEST).read_text())
    assert set(listed) == {path.name for path in folder.iterdir()} - {MANIFEST}
    assert verify_manifest(folder) == set(listed)


FILES = ["config.json", "model.safetensors", "optimizer.safetensors", "state.json", "behind-00000001.safetensors"]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "step-00000002"
    save_checkpoint(folder, made(2, behind=(1,)))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / saved.name)
    return tmp_path / saved.name


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "grow", "gone"])
def test_damage_is_refused_by_the_name_of_the_file(folder: Path, name: str, damage: str) -> None:
    file = folder / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:-1] if damage == "cut" else data + b"\n" if damage == "grow" else data)
    with pytest.raises(CheckpointError, match=rf"{name}: .*use an older"):
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


@pytest.mark.parametrize(
    ("name", "message"),
    [("../x", "no plain file name"), ("/etc/hosts", "no plain file name"), ("..", "missing"), ("", "missing")],
)
def test_a_manifest_never_leads_out_of_its_folder(folder: Path, name: str, message: str) -> None:
    (folder.parent / "x").write_text("out")
    listed = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({name: {"bytes": 3, "sha256": "0"}, **listed}))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_a_folder_without_a_manifest_is_no_checkpoint(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"no MANIFEST\.json.*never finished"):
        load_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"no MANIFEST\.json"):
        load_checkpoint(folder / "nowhere")
    (folder / MANIFEST).mkdir()
    with pytest.raises(CheckpointError, match="the manifest cannot be read"):
        load_checkpoint(folder)


def rewrite(folder: Path, name: str, data: bytes) -> None:
    """Change a file and its entry in the manifest: a fault that no sum can show."""
    (folder / name).write_bytes(data)
    (folder / MANIFEST).unlink()
    room.publish_folder(folder.rename(folder.with_name("draft")), folder)


def test_every_file_must_be_listed(folder: Path) -> None:
    listed = json.loads((folder / MANIFEST).read_text())
    del listed["optimizer.safetensors"], listed["state.json"]
    (folder / MANIFEST).write_text(json.dumps(listed))
    with pytest.raises(CheckpointError, match=r"does not list optimizer\.safetensors, state\.json"):
        load_checkpoint(folder)


def test_a_file_that_is_not_listed_is_not_read(folder: Path) -> None:
    (folder / "behind-00000000.safetensors").write_bytes(b"stray")
    assert list(load_checkpoint(folder).behind) == [1]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("state.json", b'{"version": "two"}', r"state\.json: the state of the run cannot be read"),
        ("config.json", b"[]", r"config\.json: the model's configuration cannot be used"),
        ("config.json", b'{"model_type": "llama"}', r"config\.json: the model's configuration cannot be used"),
        ("optimizer.safetensors", b"garbage", r"optimizer\.safetensors: the arrays cannot be read"),
    ],
)
def test_files_that_were_written_wrong_are_refused(folder: Path, name: str, data: bytes, message: str) -> None:
    rewrite(folder, name, data)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(folder)


def test_weights_that_do_not_fit_the_configuration_are_refused(folder: Path) -> None:
    raw = json.loads((folder / "config.json").read_text())
    rewrite(folder, "config.json", json.dumps(raw | {"num_hidden_layers": 1}).encode())
    with pytest.raises(CheckpointError, match=r"safetensors: its tensors are not those that config\.json asks for"):
        load_checkpoint(folder)


def test_load_newest_goes_back_until_one_is_whole(run: Path) -> None:
    for version in (1, 2, 10):
        save_checkpoint(checkpoint_folder(run, version), made(version))
    (checkpoint_folder(run, 10) / "state.json").write_text("{}")
    checkpoint_folder(run, 99).mkdir()
    (run / "checkpoints" / "step-x").mkdir()
    assert [folder.name for folder in list_checkpoints(run)] == ["step-00000010", "step-00000002", "step-00000001"]
    found = load_newest(run)
    damaged, whole = next(found), next(found)
    assert isinstance(damaged, CheckpointError)
    assert "step-00000010/state.json" in str(damaged)
    assert isinstance(whole, Checkpoint)
    assert_same(whole, made(2))
    assert list(load_newest(run / "nothing")) == []


def test_prune_keeps_the_newest_and_clears_leftovers(run: Path) -> None:
    for version in (1, 2, 3):
        save_checkpoint(checkpoint_folder(run, version), made(version))
    folders = run / "checkpoints"
    (folders / ".writing-step-00000004").mkdir()
    (folders / ".replaced-step-00000003").mkdir()
    (folders / "step-00000004").mkdir()  # half removed
    (folders / "notes").mkdir()
    prune_checkpoints(run, 2)
    assert sorted(path.name for path in folders.iterdir()) == ["notes", "step-00000002", "step-00000003"]
    assert_same(load_checkpoint(checkpoint_folder(run, 3)), made(3))


class PowerCut(BaseException):
    """Nothing of ours runs after it."""


def steps_of(save: Callable[[], None], monkeypatch: pytest.MonkeyPatch, fail_at: int, error: BaseException) -> int:
    """Run `save` with the nth sync, rename or removal failing (0: none); returns how many there were."""
    count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            # after a power cut nothing is done any more; a failing disk may work again the next moment
            if count == fail_at and not kwargs.get("ignore_errors"):
                raise error
            if 0 < fail_at <= count and isinstance(error, PowerCut):
                raise error
            return function(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", counted(os.fsync))
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        try:
            save()
        except type(error):
            assert count >= fail_at > 0
    return count


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PowerCut()], ids=["disk", "power"])
@pytest.mark.parametrize("exists", [False, True], ids=["new", "again"])
def test_whatever_fails_the_old_or_the_new_state_is_whole(
    run: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, exists: bool
) -> None:
    folder = checkpoint_folder(run, 5)
    old, new = made(5), msgspec.structs.replace(made(5), state=RunState(version=5, seed=12, dataset="abc"))
    ends = set()
    total = steps_of(lambda: save_checkpoint(folder, new), monkeypatch, 0, error)
    for fail_at in range(1, total + 5):  # the last ones fail nowhere
        shutil.rmtree(run, ignore_errors=True)
        if exists:
            save_checkpoint(folder, old)
        steps_of(lambda: save_checkpoint(folder, new), monkeypatch, fail_at, error)
        found = list_checkpoints(run)
        if exists or found:
            (whole,) = found
            loaded = load_checkpoint(folder)
            assert loaded.state.seed in (11, 12)
            assert load_checkpoint(whole).state == loaded.state
            assert_same(loaded, old if loaded.state.seed == 11 else new)
            ends.add(loaded.state.seed)
        else:
            ends.add(0)
        if isinstance(error, OSError):
            assert not list(run.glob("checkpoints/.writing-*"))
        save_checkpoint(folder, new)  # the next start goes on as if nothing had been
        prune_checkpoints(run, 1)
        assert [path.name for path in (run / "checkpoints").iterdir()] == [folder.name]
        assert load_checkpoint(folder).state.seed == 12
    assert ends == {11 if exists else 0, 12}


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on file sizes")
def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path: Path) -> None:
    program = f"""
        import resource, signal, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        import troupe
        from test_checkpoint import made, save_checkpoint
        whole = made(1)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        try:
            save_checkpoint(Path({str(tmp_path)!r}) / "checkpoints" / "step-00000001", whole)
        except OSError as error:
            print("OSError", error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("OSError")
    assert list((tmp_path / "checkpoints").iterdir()) == []
