"""Writing checkpoints and models so that, whatever happens, their folders are whole or absent.

Files go to a temporary folder beside the place, each is put on the disk, the manifest last; then the folder is renamed.
"""

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from troupe.checkpoint.files import Chunks, FileSum, make_folders, sum_file, write_file
from troupe.checkpoint.state import (
    AVERAGE_FILE,
    MADE_FILE,
    MANIFEST,
    MODEL_FILE,
    OPTIMIZER_FILE,
    REFERENCE_FILE,
    REPLACED_PREFIX,
    ROWS_FILE,
    STATE_FILE,
    TEMPORARY_PREFIX,
    UNFINISHED_FILE,
    Checkpoint,
    Made,
)
from troupe.errors import FolderGoneError
from troupe.messages import ScoredGroup, Unfinished
from troupe.policy import MAX_SHARD_BYTES, Companions, NetworkConfig, Weights, save_model_folder
from troupe.policy.adapter.files import AdapterFiles, save_adapter
from troupe.policy.folders import companions_of
from troupe.policy.model_files import ADAPTER_CONFIG
from troupe.policy.network.tensors import as_stored
from troupe.policy.safetensors import safetensors_bytes, safetensors_chunks
from troupe.runtime.files import sync

_SMALL_BYTES = 1 << 20
"""For configuration, state, manifest, and the file system's own."""


def save_checkpoint(
    path: str | Path,
    checkpoint: Checkpoint,
    *,
    source: Path | Companions | None = None,
    adapter: AdapterFiles | None = None,
    before_block: Callable[[], None] = lambda: None,
) -> int:
    """Write a checkpoint folder so that, whatever happens, it is whole or absent; returns its size in bytes.

    `source`: the model folder whose tokenizer files are copied, or what was kept of it. `adapter`: the weights as an
    adapter's files, which lie there instead of a model. What was at `path` is replaced.
    `before_block` is called again and again while files are written; what it raises ends the writing. Raises OSError
    where the disk fails or has too little room; either the old folder or the new one is then whole.
    """
    path = Path(path)
    weights = checkpoint.weights
    if adapter is None and checkpoint.config is not None:
        weights = as_stored(checkpoint.config, weights)
    policy = {MODEL_FILE: (weights, {"format": "pt"})} if adapter is None else adapter.tensors
    files: dict[str, Weights] = {OPTIMIZER_FILE: checkpoint.optimizer_state}
    files |= {f"behind-{version:08d}.safetensors": weights for version, weights in checkpoint.behind.items()}
    if checkpoint.reference is not None:
        files[REFERENCE_FILE] = checkpoint.reference
    if checkpoint.average is not None:
        files[AVERAGE_FILE] = checkpoint.average
    unfinished = encode_unfinished(checkpoint.unfinished)
    needed = sum(map(safetensors_bytes, [*files.values(), *(arrays for arrays, _ in policy.values())]))
    needed += len(unfinished)
    companions = companions_of(source if adapter is None else None)
    with _new_folder(path, needed + companions.total_bytes, before_block) as folder:
        if adapter is not None:
            folder.write(ADAPTER_CONFIG, [adapter.settings])
        elif checkpoint.config is not None:
            companions.write(folder.path, checkpoint.config, checkpoint.weights)
        for name, (arrays, metadata) in policy.items():
            folder.write(name, safetensors_chunks(arrays, metadata))
        for name, arrays in files.items():
            folder.write(name, safetensors_chunks(arrays))
        folder.write(UNFINISHED_FILE, [unfinished])
        if checkpoint.curriculum is not None:
            folder.write(ROWS_FILE, [msgspec.msgpack.encode(checkpoint.curriculum)])
        if checkpoint.made != Made():
            folder.write(MADE_FILE, [msgspec.json.format(msgspec.json.encode(checkpoint.made))])
        folder.write(STATE_FILE, [msgspec.json.format(msgspec.json.encode(checkpoint.state))])
    return folder.size


def save_final_policy(
    path: Path,
    config: NetworkConfig,
    weights: Weights,
    source: Path | Companions | None = None,
    *,
    adapter: AdapterFiles | None = None,
    before_taking_place: Callable[[], None] = lambda: None,
) -> None:
    """Write a plain model folder, or an adapter folder, with a manifest, in the place of what is at `path`; whole or
    absent, as above."""
    if adapter is not None:
        needed = sum(safetensors_bytes(arrays) for arrays, _ in adapter.tensors.values())
        with _new_folder(path, needed, before_taking_place) as folder:
            save_adapter(folder.path, adapter)
        return
    companions = companions_of(source)
    with _new_folder(
        path, safetensors_bytes(as_stored(config, weights)) + companions.total_bytes, before_taking_place
    ) as folder:
        save_model_folder(folder.path, config, weights, companions, MAX_SHARD_BYTES)


def encode_unfinished(unfinished: Unfinished) -> bytes:
    """As msgpack. Prompts go without text and columns: the dataset can say them once more, and they may hold anything.
    What rewards logged is plain data already; what were not is left out, since it is not worth a checkpoint."""
    fields = {name: getattr(unfinished, name) for name in unfinished.__struct_fields__}
    for name in ("scored", "collected"):  # one by one, so that other threads get a turn
        fields[name] = [msgspec.Raw(_encode_group(group)) for group in fields[name]]
    return msgspec.msgpack.encode(fields)


def _encode_group(group: ScoredGroup) -> bytes:
    replace = msgspec.structs.replace
    prompt = replace(group.group.prompt, prompt="", columns={})
    bare = replace(group, group=replace(group.group, prompt=prompt))
    try:
        return msgspec.msgpack.encode(bare)
    except Exception:  # whatever an object does when it is looked at
        return msgspec.msgpack.encode(replace(bare, extra={}, logged={}))


def replaced_path(path: Path) -> Path:
    """Where the folder at `path` waits while another takes its place."""
    return path.parent / f"{REPLACED_PREFIX}{path.name}"


class _NewFolder:
    """A folder that is being written."""

    def __init__(self, path: Path, before_block: Callable[[], None]) -> None:
        self.path = path
        self._before_block = before_block
        self._sums: dict[str, FileSum] = {}

    @property
    def size(self) -> int:
        """Of all files that the manifest lists."""
        return sum(entry.bytes for entry in self._sums.values())

    def write(self, name: str, chunks: Chunks) -> None:
        """Write one file."""
        self._sums[name] = write_file(self.path / name, chunks, self._before_block)

    def finish(self) -> None:
        """Write the manifest, of the files that others have written too, and have all on the disk."""
        for file in sorted(self.path.iterdir()):
            if file.name not in self._sums:
                sync(file)
                self._sums[file.name] = sum_file(file)
        entries = dict(sorted(self._sums.items()))
        write_file(self.path / MANIFEST, [msgspec.json.format(msgspec.json.encode(entries))])
        sync(self.path)


@contextmanager
def _new_folder(path: Path, needed_bytes: int, before_block: Callable[[], None] = lambda: None) -> Iterator[_NewFolder]:
    """Write files in the body; afterwards the folder is at `path`, or nothing has changed."""
    before_block()
    make_folders(path.parent)
    temporary = path.parent / f"{TEMPORARY_PREFIX}{path.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    _check_room(path.parent, needed_bytes + _SMALL_BYTES)
    before_block()  # having folders on the disk took a while
    try:
        temporary.mkdir()
        folder = _NewFolder(temporary, before_block)
        yield folder
        folder.finish()
        before_block()  # what raises because the place is not the same any more is heeded to the last
        _take_place(temporary, path)
    except RuntimeError as error:  # how MLX says that it could not write
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"{path}: {error}") from error
    except FolderGoneError:  # what has the temporary name there now is not ours
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _take_place(temporary: Path, path: Path) -> None:
    """Rename; what was there goes when the new folder is there for good."""
    old = replaced_path(path)
    if path.exists():  # an older cut of the same step, or the final policy of a run that went on
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
    try:
        temporary.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def _check_room(folder: Path, needed_bytes: int) -> None:
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    if room.f_blocks and free < needed_bytes:  # some network file systems tell nothing: all zeros
        raise OSError(
            errno.ENOSPC,
            f"{needed_bytes / 1e9:.3g} GB are needed and {free / 1e9:.3g} GB are free in {folder}; make room there, or "
            "lower checkpoint.keep",
        )
