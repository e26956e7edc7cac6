"""Reading checkpoint folders: every file is verified before it is used, and what is wrong is named."""

import errno
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import mlx.core as mx
import msgspec

from troupe.checkpoint.files import FileSum, sum_file
from troupe.checkpoint.keep import list_checkpoints
from troupe.checkpoint.state import (
    AVERAGE_FILE,
    BEHIND_FILE,
    CONFIG_FILE,
    FORMAT,
    MADE_FILE,
    MANIFEST,
    MODEL_FILE,
    OPTIMIZER_FILE,
    REFERENCE_FILE,
    ROWS_FILE,
    STATE_FILE,
    UNFINISHED_FILE,
    Checkpoint,
    Made,
    RunState,
)
from troupe.checkpoint.write import replaced_path
from troupe.errors import CheckpointError, ModelError, RunError, TroupeError
from troupe.messages import CurriculumState, Unfinished
from troupe.policy import NetworkConfig
from troupe.policy.adapter.peft import WEIGHTS_FILE as ADAPTER_FILE
from troupe.policy.adapter.peft import our_name
from troupe.policy.network.tensors import stacked, stored_shapes
from troupe.policy.safetensors import read_header

_UNREADABLE = (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
_OF_THE_MACHINE = {
    errno.EMFILE: "allow more open files",
    errno.ENFILE: "allow more open files",
    errno.ENOMEM: "free memory",
    errno.ESTALE: "mount its file system again",
    errno.EACCES: "allow this user to read it",
}
"""Number of an OSError that says nothing of the file → what to do. EIO is not among them: the disk is damaged."""


class _NewerFormatError(CheckpointError):
    """A folder that a newer Troupe has written."""


class _Numbered(msgspec.Struct, frozen=True):
    """All that is read of a state before its format is known to be one of ours."""

    format: Annotated[int, msgspec.Meta(ge=1)] = 1


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint folder, verifying every file against the manifest. CheckpointError names what is wrong.

    RunError where the machine cannot read it now (memory, open files, rights), which says nothing of the checkpoint.
    Arrays come back bit for bit in the dtype that they were saved in.
    """
    path = Path(path)
    if not path.exists() and replaced_path(path).exists():
        path = replaced_path(path)
    names = verify_manifest(path)
    of_adapter = ADAPTER_FILE in names
    policy_files = {ADAPTER_FILE} if of_adapter else {CONFIG_FILE, MODEL_FILE}
    if lacking := (policy_files | {OPTIMIZER_FILE, STATE_FILE}) - names:
        raise CheckpointError(
            f"{path / MANIFEST}: does not list {', '.join(sorted(lacking))}: no whole checkpoint; use another one"
        )
    state = read_state(path)
    config = None if of_adapter else _read_config(path / CONFIG_FILE)
    weights = _load_adapter(path / ADAPTER_FILE) if config is None else _load_weights(path / MODEL_FILE, config)
    matches = [match for name in sorted(names) if (match := BEHIND_FILE.fullmatch(name))]
    return Checkpoint(
        config=config,
        weights=weights,
        optimizer_state=_load_arrays(path / OPTIMIZER_FILE),
        behind={int(match[1]): _load_like(path / match[0], weights) for match in matches},
        state=state,
        made=read_made(path),
        reference=_load_like(path / REFERENCE_FILE, weights) if REFERENCE_FILE in names else None,
        average=_load_like(path / AVERAGE_FILE, weights) if AVERAGE_FILE in names else None,
        unfinished=read_unfinished(path / UNFINISHED_FILE) if UNFINISHED_FILE in names else Unfinished(),
        curriculum=_read_curriculum(path / ROWS_FILE) if ROWS_FILE in names else None,
    )


def _read_config(file: Path) -> NetworkConfig:
    try:
        return NetworkConfig.from_dict(msgspec.json.decode(file.read_bytes(), type=dict[str, Any]))
    except (*_UNREADABLE, ModelError) as error:
        raise _fault_of_reading(f"{file}: the model's configuration cannot be used", error) from None


def read_state(folder: Path) -> RunState:
    """The state in a checkpoint folder, which is not verified. CheckpointError where it is damaged, RunError where it
    cannot be read now."""
    file = folder / STATE_FILE
    try:
        raw = file.read_bytes()
        written = msgspec.json.decode(raw, type=_Numbered).format
        if written > FORMAT:
            raise _NewerFormatError(
                f"{folder}: a checkpoint of format {written}, but this Troupe knows those up to {FORMAT}; go on with "
                "the newer Troupe that wrote it"
            )
        return msgspec.structs.replace(msgspec.json.decode(raw, type=RunState), format=written)
    except _UNREADABLE as error:
        raise _fault_of_reading(f"{file}: the state of the run cannot be read", error) from None


def read_unfinished(file: Path) -> Unfinished:
    """What a checkpoint's file says; CheckpointError where it is damaged, RunError where it cannot be read now."""
    try:
        return msgspec.msgpack.decode(file.read_bytes(), type=Unfinished)
    except _UNREADABLE as error:
        raise _fault_of_reading(f"{file}: the groups under way cannot be read", error) from None


def _read_curriculum(file: Path) -> CurriculumState:
    try:
        return msgspec.msgpack.decode(file.read_bytes(), type=CurriculumState)
    except _UNREADABLE as error:
        raise _fault_of_reading(f"{file}: what is known of the rows cannot be read", error) from None


def read_made(folder: Path) -> Made:
    """How the run of a checkpoint folder, which is not verified, was made; an empty one where the file is missing, as
    older versions wrote none, or damaged: to compare less is no fault of the run."""
    try:
        return msgspec.json.decode((folder / MADE_FILE).read_bytes(), type=Made)
    except _UNREADABLE:
        return Made()


def verify_manifest(path: Path) -> frozenset[str]:
    """The names of the files in a checkpoint folder.

    CheckpointError unless it has a manifest and every file in it has the size and sum recorded there; RunError where
    that cannot be found out now.
    """
    manifest = path / MANIFEST
    try:
        entries = msgspec.json.decode(manifest.read_bytes(), type=dict[str, FileSum])
    except FileNotFoundError:
        raise CheckpointError(
            f"{path}: no {MANIFEST}, so this checkpoint was never finished; use an older one"
        ) from None
    except _UNREADABLE as error:
        raise _fault_of_reading(f"{manifest}: the manifest cannot be read", error) from None
    for name, expected in entries.items():
        file = path / name
        if Path(name).name != name or name in ("", ".."):
            raise CheckpointError(f"{manifest}: {name!r} is no plain file name; the manifest is damaged")
        try:
            there = file.is_file()
            whole = there and file.stat().st_size == expected.bytes and sum_file(file) == expected
        except (OSError, ValueError) as error:
            raise _fault_of_reading(f"{file}: cannot be read", error) from None
        if not there:
            raise CheckpointError(f"{file}: the file is missing from this checkpoint; use an older one")
        if not whole:
            raise CheckpointError(f"{file}: size or sha256 differs from {MANIFEST}: damaged; use an older checkpoint")
    return frozenset(entries)


def load_newest(run: Path) -> Iterator[Checkpoint | CheckpointError]:
    """Checkpoints of a run, newest first: the loaded one, or the error that tells why it cannot be used.

    Raises CheckpointError where one is of a newer format, and RunError where one cannot be read now: going on from an
    older one would be to lose steps that are there.
    """
    for folder in list_checkpoints(run):
        try:
            yield load_checkpoint(folder)
        except _NewerFormatError:
            raise
        except CheckpointError as error:
            yield error


def _load_weights(file: Path, config: NetworkConfig) -> dict[str, mx.array]:
    """The tensors of a policy, in the order of `expected_shapes`."""
    loaded = _load_arrays(file)
    if {name: array.shape for name, array in loaded.items()} != stored_shapes(config):
        raise CheckpointError(f"{file}: its tensors are not those that {CONFIG_FILE} asks for; use an older checkpoint")
    return stacked(config, loaded)


def _load_adapter(file: Path) -> dict[str, mx.array]:
    """The tensors of an adapter under our names."""
    loaded = {our_name(name): array for name, array in _load_arrays(file).items()}
    if None in loaded or not loaded:
        raise CheckpointError(f"{file}: its tensors are not an adapter's; use an older checkpoint")
    return {str(name): array for name, array in loaded.items()}


def _load_like(file: Path, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The tensors of another version of a policy, in its order."""
    loaded = _load_arrays(file)
    if {name: array.shape for name, array in loaded.items()} != {name: a.shape for name, a in weights.items()}:
        raise CheckpointError(f"{file}: its tensors are not those of the policy beside it; use an older checkpoint")
    return {name: loaded[name] for name in weights}


def _load_arrays(file: Path) -> dict[str, mx.array]:
    """What is in a file that has been verified: where its header, too, is sound, the file is not at fault."""
    try:
        loaded = mx.load(str(file))
        assert isinstance(loaded, dict)  # what .safetensors gives
        mx.eval(list(loaded.values()))
    except (RuntimeError, MemoryError, ValueError) as error:
        if isinstance(error, ValueError) or not _is_sound(file):
            raise CheckpointError(f"{file}: the arrays cannot be read: {error}; use an older checkpoint") from None
        raise RunError(f"{file}: whole, but cannot be read now: {error}; free memory and resume") from None
    return loaded


def _is_sound(file: Path) -> bool:
    try:
        read_header(file)
    except ModelError:
        return False
    except OSError:
        pass  # it has been read whole a moment ago
    return True


def _fault_of_reading(told: str, error: Exception) -> TroupeError:
    """What to raise. CheckpointError for damage, a reason to go on from an older checkpoint; otherwise RunError: what
    passes is no such reason, for steps that are there would be lost. `told`: which file, and what about it."""
    remedy = _OF_THE_MACHINE.get(getattr(error, "errno", None) or 0)
    if remedy is None:
        return CheckpointError(f"{told}: {error}; use an older checkpoint")
    return RunError(f"{told} now: {error}; that is no damage: {remedy} and resume")
