"""Checkpoints on disk: what a folder holds, how it is written so that it is whole or absent, how it is read back.

A checkpoint is a Hugging Face model folder that other tools load as it is, plus what training needs to go on:

    config.json  model.safetensors  tokenizer files      the policy
    optimizer.safetensors                                 moments of AdamW, float32
    behind-00000009.safetensors                           older policy versions that generation still needs
    state.json                                            `RunState`
    MANIFEST.json                                         size and sha256 of every file, written last

A folder without a manifest is no checkpoint. Knows nothing of actors.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated

import mlx.core as mx
import msgspec

from troupe.errors import CheckpointError
from troupe.policy import Qwen3Config, Weights, read_model_folder, save_model_folder

MANIFEST = "MANIFEST.json"
_STEP_FOLDER = re.compile(r"step-(\d{8,})")
_TEMPORARY_PREFIX = ".writing-"


class CheckpointConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[checkpoint]` section."""

    every: Annotated[int, msgspec.Meta(ge=1)] = 50
    """Steps between two checkpoints; one is written at the end in any case."""
    keep: Annotated[int, msgspec.Meta(ge=1)] = 2
    """How many of the newest checkpoints stay; older ones are removed after a newer one is whole."""


class RunState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run must know, besides arrays, to go on where a checkpoint was cut."""

    version: int
    """Completed learner batches."""
    seed: int
    dataset: str
    """Fingerprint of the prompts: going on with other prompts would not be the same run."""
    wall_s: float = 0.0
    """Seconds of work before the cut."""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint in memory; arrays are evaluated."""

    config: Qwen3Config
    weights: Weights
    optimizer_state: dict[str, mx.array]
    behind: Mapping[int, Weights]
    """Older policy versions by number; empty where generation needs only the newest."""
    state: RunState


def checkpoint_folder(run: Path, version: int) -> Path:
    """Where the checkpoint after `version` learner batches lies in a run folder."""
    return run / "checkpoints" / f"step-{version:08d}"


def save_checkpoint(path: str | Path, checkpoint: Checkpoint, *, source: Path | None = None) -> None:
    """Write a checkpoint folder so that, whatever happens, it is whole or absent.

    Files go to a temporary folder beside `path`, each is synced to the disk, the folder is renamed, and the manifest
    is written last. `source` is the model folder whose tokenizer files are copied. A leftover of an interrupted
    write to the same path is replaced. Raises OSError where the disk fails; nothing visible has then changed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{_TEMPORARY_PREFIX}{path.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_model_folder(temporary, checkpoint.config, checkpoint.weights, source)
        mx.save_safetensors(str(temporary / "optimizer.safetensors"), dict(checkpoint.optimizer_state))
        for version, weights in checkpoint.behind.items():
            mx.save_safetensors(str(temporary / f"behind-{version:08d}.safetensors"), dict(weights))
        (temporary / "state.json").write_bytes(msgspec.json.format(msgspec.json.encode(checkpoint.state)))
        publish_folder(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish_folder(temporary: Path, path: Path) -> None:
    """Turn a finished temporary folder into `path`: sync, rename, manifest last, sync the parent."""
    entries = {}
    for file in sorted(temporary.iterdir()):
        _sync(file)
        entries[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    _sync(temporary)
    if path.exists():  # an interrupted write, or an older cut of the same step
        shutil.rmtree(path)
    temporary.rename(path)
    draft = path / f"{MANIFEST}.draft"
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(entries)))
    _sync(draft)
    draft.rename(path / MANIFEST)
    _sync(path)
    _sync(path.parent)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint folder, verifying every file against the manifest. CheckpointError names what is wrong."""
    path = Path(path)
    verify_manifest(path)
    try:
        state = msgspec.json.decode((path / "state.json").read_bytes(), type=RunState)
    except (OSError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"{path / 'state.json'}: the state of the run cannot be read: {error}") from None
    config, weights = read_model_folder(path)
    optimizer_state = _load_arrays(path / "optimizer.safetensors")
    behind = {
        int(file.stem.removeprefix("behind-")): _load_arrays(file) for file in sorted(path.glob("behind-*.safetensors"))
    }
    return Checkpoint(config=config, weights=weights, optimizer_state=optimizer_state, behind=behind, state=state)


def verify_manifest(path: Path) -> None:
    """CheckpointError unless the folder has a manifest and every file in it has the size and sum recorded there."""
    manifest = path / MANIFEST
    try:
        entries = msgspec.json.decode(manifest.read_bytes(), type=dict[str, dict[str, int | str]])
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no {MANIFEST}, so this checkpoint was never finished; use an older one"
        ) from None
    except (OSError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"{manifest}: the manifest cannot be read: {error}") from None
    for name, expected in entries.items():
        file = path / name
        if Path(name).name != name:
            raise CheckpointError(f"{manifest}: {name!r} is no plain file name; the manifest is damaged")
        if not file.is_file():
            raise CheckpointError(f"{file}: the file is missing from this checkpoint; use an older one")
        if file.stat().st_size != expected.get("bytes") or _sha256(file) != expected.get("sha256"):
            raise CheckpointError(f"{file}: size or sha256 differs from {MANIFEST}: damaged; use an older checkpoint")


def list_checkpoints(run: Path) -> list[Path]:
    """The finished checkpoint folders of a run, newest first."""
    found = []
    for folder in (run / "checkpoints").glob("step-*"):
        match = _STEP_FOLDER.fullmatch(folder.name)
        if match and (folder / MANIFEST).is_file():
            found.append((int(match[1]), folder))
    return [folder for _, folder in sorted(found, reverse=True)]


def load_newest(run: Path) -> Iterator[Checkpoint | CheckpointError]:
    """Checkpoints of a run, newest first: the loaded one, or the error that tells why it cannot be used."""
    for folder in list_checkpoints(run):
        try:
            yield load_checkpoint(folder)
        except CheckpointError as error:
            yield error


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the `keep` newest finished checkpoints, and what interrupted writes have left behind."""
    for folder in list_checkpoints(run)[keep:]:
        (folder / MANIFEST).unlink()  # first, so that a half-removed folder is never taken for a checkpoint
        shutil.rmtree(folder)
    for leftover in (run / "checkpoints").glob(f"{_TEMPORARY_PREFIX}*"):
        shutil.rmtree(leftover)


def _load_arrays(file: Path) -> dict[str, mx.array]:
    loaded = mx.load(str(file))
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{file}: this is no safetensors file of named tensors")
    mx.eval(list(loaded.values()))
    return loaded


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
