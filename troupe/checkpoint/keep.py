"""Which checkpoints a run folder has, and which of them stay."""

import math
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec

from troupe.checkpoint.state import MANIFEST, REPLACED_PREFIX, STATE_FILE, TEMPORARY_PREFIX, CheckpointConfig
from troupe.errors import RunError

_STEP_FOLDER = re.compile(rf"({re.escape(REPLACED_PREFIX)})?step-(\d{{8,}})")


class Pruned(msgspec.Struct, frozen=True, kw_only=True):
    """What came of removing checkpoints."""

    removed: tuple[int, ...] = ()
    """Versions that are gone, ascending."""
    faults: tuple[str, ...] = ()
    """What could not be removed, and why."""


class _Judged(msgspec.Struct, frozen=True):
    """What of a state says how good a checkpoint is."""

    metrics: dict[str, float | None] = {}


def checkpoint_folder(run: Path, version: int) -> Path:
    """Where the checkpoint after `version` learner batches lies in a run folder."""
    return run / "checkpoints" / f"step-{version:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """The finished checkpoint folders of a run, newest first. RunError where nobody can tell which there are."""
    found = _list_finished(run)
    return [found[version] for version in sorted(found, reverse=True)]


def newer_versions(run: Path, version: int) -> set[int]:
    """Versions after `version` of which the run folder has finished checkpoints. RunError as above."""
    return {there for there in _list_finished(run) if there > version}


def prune_checkpoints(
    run: Path,
    config: CheckpointConfig,
    *,
    abandoned: Collection[int] = (),
    judged: Mapping[int, float] | None = None,
    pending: Collection[int] = (),
) -> Pruned:
    """Remove all finished checkpoints but the newest `keep` and the best, and what interrupted writes have left.

    `abandoned`: versions that are not of this run any more; they are removed, and never count. `judged`: version → what
    `metric_for_best` is, where not the checkpoints say so; `pending`: of which it is not known yet, so that they stay.
    Only for who writes the checkpoints of the run: what another one is writing would be a leftover too.
    """
    standing = {version: folder for version, folder in _find_finished(run).items() if version not in abandoned}
    kept = set(sorted(standing, reverse=True)[: config.keep])
    if config.keep_best and (best := _best_version(standing, config, judged)) is not None:
        kept.add(best)
    kept |= standing.keys() & set(pending)
    keep_folders = {standing[version] for version in kept}
    removed: set[int] = set()
    faults: list[str] = []
    for folder in _step_folders(run):
        if folder in keep_folders:
            continue
        finished = (folder / MANIFEST).is_file()
        try:
            (folder / MANIFEST).unlink(missing_ok=True)  # first: a half-removed folder is no checkpoint
            shutil.rmtree(folder)
        except OSError as error:
            faults.append(str(error) if error.filename else f"{folder}: {error}")
        else:
            match = _STEP_FOLDER.fullmatch(folder.name)
            if match and finished and int(match[2]) not in kept:
                removed.add(int(match[2]))
    return Pruned(removed=tuple(sorted(removed)), faults=tuple(faults))


def best_checkpoint(run: Path, config: CheckpointConfig, judged: Mapping[int, float] | None = None) -> Path | None:
    """The finished checkpoint whose metric is best; `judged` as of `prune_checkpoints`. RunError as above."""
    found = _list_finished(run)
    best = _best_version(found, config, judged)
    return None if best is None else found[best]


def clear_leftovers(run: Path) -> None:
    """Remove what interrupted writes have left, as far as that is possible: it may take the room that is needed."""
    for folder in _step_folders(run):
        if folder.name.startswith(TEMPORARY_PREFIX) or not (folder / MANIFEST).is_file():
            shutil.rmtree(folder, ignore_errors=True)


def _list_finished(run: Path) -> dict[int, Path]:
    try:
        return _find_finished(run)
    except OSError as error:  # no reason to take it for a run without checkpoints, which begins anew
        raise RunError(f"{run}: its checkpoints cannot be listed now: {error}; mend that and resume") from error


def _find_finished(run: Path) -> dict[int, Path]:
    found: dict[int, Path] = {}
    for folder in _step_folders(run):  # a replaced one sorts before its replacement
        match = _STEP_FOLDER.fullmatch(folder.name)
        if match and (folder / MANIFEST).is_file():
            found[int(match[2])] = folder
    return found


def _step_folders(run: Path) -> Iterator[Path]:
    """Folders of checkpoints, whole or not, by name. OSError where the system does not tell."""
    try:
        folders = sorted((run / "checkpoints").iterdir())  # a glob would pass over what it may not read
    except (FileNotFoundError, NotADirectoryError):
        return
    for folder in folders:
        if _STEP_FOLDER.fullmatch(folder.name.removeprefix(TEMPORARY_PREFIX)):
            yield folder


def _best_version(folders: dict[int, Path], config: CheckpointConfig, judged: Mapping[int, float] | None) -> int | None:
    """The version whose metric is best; None where none has it."""
    sign = 1.0 if config.greater_is_better else -1.0
    values = {version: sign * value for version, value in (judged or {}).items() if version in folders}
    for version, folder in folders.items() if judged is None else ():
        with suppress(OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            state = msgspec.json.decode((folder / STATE_FILE).read_bytes(), type=_Judged)
            value = state.metrics.get(config.metric_for_best)
            if value is not None and not math.isnan(value):
                values[version] = sign * value
    return max(values, key=lambda version: (values[version], version), default=None)
