"""Checkpoints on disk: what a folder holds, how it is written so that it is whole or absent, how it is read back.

A checkpoint is a Hugging Face model folder that other tools load as it is, plus what training needs to go on:

    config.json  model.safetensors  tokenizer files      the policy
    optimizer.safetensors                                 the optimizer's state: moments of AdamW and the like
    behind-00000009.safetensors                           older policy versions that generation still needs
    reference.safetensors                                 the reference policy, where it follows the policy
    state.json                                            `RunState`
    MANIFEST.json                                         size and sha256 of every file, written last

A folder without a manifest is no checkpoint. While a folder replaces an older one of the same name, the older one
waits beside it under `.replaced-NAME`, where reading finds it after a crash. Knows nothing of actors.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import msgspec

from troupe.errors import CheckpointError, ModelError
from troupe.policy import Qwen3Config, Weights, expected_shapes, save_model_folder

MANIFEST = "MANIFEST.json"
_CONFIG, _MODEL, _OPTIMIZER, _STATE = "config.json", "model.safetensors", "optimizer.safetensors", "state.json"
_REFERENCE = "reference.safetensors"
_BEHIND = re.compile(r"behind-(\d{8,})\.safetensors")
_TEMPORARY_PREFIX, _REPLACED_PREFIX = ".writing-", ".replaced-"
_STEP_FOLDER = re.compile(rf"({re.escape(_REPLACED_PREFIX)})?step-(\d{{8,}})")


class CheckpointConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The `[checkpoint]` section."""

    every: Annotated[int, msgspec.Meta(ge=1)] = 50
    """Steps between two checkpoints; one is written at the end in any case."""
    keep: Annotated[int, msgspec.Meta(ge=1)] = 2
    """How many of the newest checkpoints stay; older ones are removed after a newer one is whole."""
    overlap: bool | None = None
    """Learn on while a checkpoint is written, which holds the optimizer's state twice; otherwise the next step waits
    with learning. None: yes, unless a run's memory limit asks for less."""


class RunState(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run must know, besides arrays, to go on where a checkpoint was cut."""

    version: int
    """Completed learner batches."""
    seed: int
    dataset: str
    """Fingerprint of the prompts: going on with other prompts would not be the same run."""
    num_tokens: int = 0
    """Prompt and completion tokens of the run so far."""


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint in memory; arrays are evaluated."""

    config: Qwen3Config
    weights: Weights
    optimizer_state: dict[str, mx.array]
    behind: Mapping[int, Weights]
    """Older policy versions by number; empty where generation needs only the newest."""
    state: RunState
    reference: Weights | None = None
    """The reference policy where it follows the policy."""


def checkpoint_folder(run: Path, version: int) -> Path:
    """Where the checkpoint after `version` learner batches lies in a run folder."""
    return run / "checkpoints" / f"step-{version:08d}"


def save_checkpoint(path: str | Path, checkpoint: Checkpoint, *, source: Path | None = None) -> None:
    """Write a checkpoint folder so that, whatever happens, it is whole or absent.

    Files go to a temporary folder beside `path`, each is synced to the disk, the manifest last, and the folder is
    renamed. `source` is the model folder whose tokenizer files are copied. What was at `path` is replaced. Raises
    OSError where the disk fails; either the old folder or the new one is then whole.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f"{_TEMPORARY_PREFIX}{path.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        save_model_folder(temporary, checkpoint.config, checkpoint.weights, source)
        mx.save_safetensors(str(temporary / _OPTIMIZER), dict(checkpoint.optimizer_state))
        for version, weights in checkpoint.behind.items():
            mx.save_safetensors(str(temporary / f"behind-{version:08d}.safetensors"), dict(weights))
        if checkpoint.reference is not None:
            mx.save_safetensors(str(temporary / _REFERENCE), dict(checkpoint.reference))
        (temporary / _STATE).write_bytes(msgspec.json.format(msgspec.json.encode(checkpoint.state)))
        publish_folder(temporary, path)
    except RuntimeError as error:  # how MLX says that it could not write
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{path}: {error}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def publish_folder(temporary: Path, path: Path) -> None:
    """Turn a finished temporary folder into `path`: manifest last, sync, rename, sync the parent."""
    entries = {}
    for file in sorted(temporary.iterdir()):
        _sync(file)
        entries[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
    manifest = temporary / MANIFEST
    manifest.write_bytes(msgspec.json.format(msgspec.json.encode(entries)))
    _sync(manifest)
    _sync(temporary)
    replaced = _replaced(path)
    if path.exists():  # an older cut of the same step, or the final policy of a run that went on
        shutil.rmtree(replaced, ignore_errors=True)
        path.rename(replaced)
    try:
        temporary.rename(path)
    except BaseException:
        if replaced.exists():
            replaced.rename(path)
        raise
    _sync(path.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint folder, verifying every file against the manifest. CheckpointError names what is wrong.

    Arrays come back bit for bit in the dtype that they were saved in.
    """
    path = Path(path)
    if not path.exists() and _replaced(path).exists():
        path = _replaced(path)
    names = verify_manifest(path)
    if lacking := {_CONFIG, _MODEL, _OPTIMIZER, _STATE} - names:
        raise CheckpointError(
            f"{path / MANIFEST}: does not list {', '.join(sorted(lacking))}: no whole checkpoint; use another one"
        )
    try:
        state = msgspec.json.decode((path / _STATE).read_bytes(), type=RunState)
    except (OSError, msgspec.MsgspecError) as error:
        raise CheckpointError(f"{path / _STATE}: the state of the run cannot be read: {error}") from None
    try:
        config = Qwen3Config.from_dict(msgspec.json.decode((path / _CONFIG).read_bytes(), type=dict[str, Any]))
    except (OSError, msgspec.MsgspecError, ModelError) as error:
        raise CheckpointError(f"{path / _CONFIG}: the model's configuration cannot be used: {error}") from None
    matches = [match for name in sorted(names) if (match := _BEHIND.fullmatch(name))]
    return Checkpoint(
        config=config,
        weights=_load_weights(path / _MODEL, config),
        optimizer_state=_load_arrays(path / _OPTIMIZER),
        behind={int(match[1]): _load_weights(path / match[0], config) for match in matches},
        state=state,
        reference=_load_weights(path / _REFERENCE, config) if _REFERENCE in names else None,
    )


def verify_manifest(path: Path) -> frozenset[str]:
    """The names of the files in a checkpoint folder.

    CheckpointError unless it has a manifest and every file in it has the size and sum recorded there.
    """
    manifest = path / MANIFEST
    try:
        entries = msgspec.json.decode(manifest.read_bytes(), type=dict[str, dict[str, int | str]])
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no {MANIFEST}, so this checkpoint was never finished; use an older one"
        ) from None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{manifest}: the manifest cannot be read: {error}") from None
    for name, expected in entries.items():
        file = path / name
        if Path(name).name != name:
            raise CheckpointError(f"{manifest}: {name!r} is no plain file name; the manifest is damaged")
        if not file.is_file():
            raise CheckpointError(f"{file}: the file is missing from this checkpoint; use an older one")
        if file.stat().st_size != expected.get("bytes") or _sha256(file) != expected.get("sha256"):
            raise CheckpointError(f"{file}: size or sha256 differs from {MANIFEST}: damaged; use an older checkpoint")
    return frozenset(entries)


def list_checkpoints(run: Path) -> list[Path]:
    """The finished checkpoint folders of a run, newest first."""
    found: dict[int, Path] = {}
    for folder in sorted((run / "checkpoints").glob("*step-*")):  # a replaced one sorts before its replacement
        match = _STEP_FOLDER.fullmatch(folder.name)
        if match and (folder / MANIFEST).is_file():
            found[int(match[2])] = folder
    return [found[version] for version in sorted(found, reverse=True)]


def load_newest(run: Path) -> Iterator[Checkpoint | CheckpointError]:
    """Checkpoints of a run, newest first: the loaded one, or the error that tells why it cannot be used."""
    for folder in list_checkpoints(run):
        try:
            yield load_checkpoint(folder)
        except CheckpointError as error:
            yield error


def prune_checkpoints(run: Path, keep: int) -> None:
    """Remove all but the `keep` newest finished checkpoints, and what interrupted writes have left behind.

    Only for who writes the checkpoints of the run: what another one is writing would be a leftover too.
    """
    kept = list_checkpoints(run)[:keep]
    for folder in (run / "checkpoints").glob("*step-*"):
        name = folder.name.removeprefix(_TEMPORARY_PREFIX)
        if folder not in kept and _STEP_FOLDER.fullmatch(name):
            (folder / MANIFEST).unlink(missing_ok=True)  # first: a half-removed folder is no checkpoint
            shutil.rmtree(folder)


def _replaced(path: Path) -> Path:
    """Where the folder at `path` waits while another takes its place."""
    return path.parent / f"{_REPLACED_PREFIX}{path.name}"


def _load_weights(file: Path, config: Qwen3Config) -> dict[str, mx.array]:
    """The tensors of a policy, in the order of `expected_shapes`."""
    loaded, wanted = _load_arrays(file), expected_shapes(config)
    if {name: array.shape for name, array in loaded.items()} != wanted:
        raise CheckpointError(f"{file}: its tensors are not those that {_CONFIG} asks for; use an older checkpoint")
    return {name: loaded[name] for name in wanted}


def _load_arrays(file: Path) -> dict[str, mx.array]:
    try:
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)  # what .safetensors gives
        mx.eval(list(loaded.values()))
    except RuntimeError as error:
        raise CheckpointError(f"{file}: the arrays cannot be read: {error}") from None
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
