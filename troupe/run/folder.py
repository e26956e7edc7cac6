"""The folder that a run writes in: chosen, taken before anything is loaded, kept from other runs, and left as it was
found where nothing came of it; its `run.toml` has a sum, by which a resume sees whether it was edited since."""

from __future__ import annotations

import hashlib
import re
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from troupe.actors.generator.locked_folder import SHARED_MEMORY, remove_leftovers
from troupe.dataset import source_name
from troupe.errors import ConfigError, FolderGoneError, OutputError
from troupe.messages import Evaluated
from troupe.records.evaluations import cut_evaluations
from troupe.records.layout import RUN_TOML, is_of_no_run
from troupe.run.config import RunConfig, write_config
from troupe.run.folder_names import run_folder_named
from troupe.runtime.files import drafted, read_toml
from troupe.runtime.held_folder import HeldFolder
from troupe.runtime.lock import LOCK, LockedError, Owner, RunLock

_NUMBERED = re.compile(r"(.+)-(\d{3,})")
_RUNS_AT_ONCE = 10_000


def run_folder(config: RunConfig, *, resume: bool) -> Path:
    """The folder a run writes to; OutputError where it may not be used. Creates nothing.

    Without `output`: `runs/NAME-NNN`, NAME from the source of the prompts, NNN the first number above those taken.
    """
    if config.output is None:
        if resume:
            raise OutputError("nothing to resume: name the run folder to go on with (-o OUT_DIR)")
        name = source_name(config.data.path or "run")
        runs = Path.cwd() / "runs"
        taken = [_NUMBERED.fullmatch(path.name) for path in runs.glob(f"{name}-*")]
        numbers = [int(match[2]) for match in taken if match and match[1] == name]
        return runs / f"{name}-{max(numbers, default=0) + 1:03d}"
    folder = run_folder_named(config.output)
    if not _is_begun(folder):
        return folder
    if resume and not (folder / RUN_TOML).is_file():
        raise OutputError(f"{folder}: there is no {RUN_TOML} among these files, so this is no run to go on with")
    if not resume:
        raise OutputError(
            f"{folder}: the output folder is not empty; add --resume to go on with the run in it, or give "
            "another folder"
        )
    return folder


class RunFolder:
    """One run's hold on its folder."""

    def __init__(self, path: Path, new_folders: list[Path]) -> None:
        """Use `take`."""
        self.path = path
        self._new_folders = new_folders
        self._lock = RunLock(path)
        self._held: HeldFolder | None = None
        self._config: RunConfig | None = None
        self._was_begun = False
        self._is_void = False

    @classmethod
    def take(cls, config: RunConfig, *, resume: bool) -> RunFolder:
        """Make the folder that `run_folder` names, and keep other runs out from now on.

        OutputError where it may not be used, cannot be written, or another run writes there; then nothing has changed.
        """
        folder = run_folder(config, resume=resume)
        try:
            if config.output is None:
                folder, new_folders = _make_next(folder, config)
            else:
                new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder}: the output folder cannot be written: {error}") from None
        place = cls(folder, new_folders)
        try:
            place._take_lock()
            place._hold()
            place._was_begun = _is_begun(folder)
            if config.output is not None:
                run_folder(config, resume=resume)  # once more: another run may have begun, and ended, meanwhile
        except BaseException:
            place._is_void = True
            place.leave()
            raise
        return place

    def begin(self, config: RunConfig, evaluated: Sequence[Evaluated] = ()) -> None:
        """Clear away what a killed run left, and store the config. OutputError where the folder cannot be written.

        `evaluated`: what it goes on from; evaluations of later versions will be made again."""
        self.check()
        try:
            remove_leftovers(SHARED_MEMORY, self.path)
            cut_evaluations(self.path, evaluated)
            _store(config, self.path / RUN_TOML)
            self._config = config
        except OSError as error:
            raise OutputError(f"{self.path}: the output folder cannot be written: {error}") from None

    def check(self) -> None:
        """FolderGoneError where the folder is not in its place any more, and writing there would be half a run in
        either. May be called in any thread."""
        if self._held is not None:
            self._held.check()

    def restore_config(self) -> bool:
        """Store the config of `begin` again where somebody has removed it, since nobody could resume the run without;
        whether that was so. OSError where it cannot be stored now."""
        if self._config is None or (self.path / RUN_TOML).exists():
            return False
        self.check()
        _store(self._config, self.path / RUN_TOML)
        return True

    def gone(self) -> FolderGoneError | None:
        """What `check` would raise."""
        return None if self._held is None else self._held.gone()

    def leave(self) -> None:
        """Let other runs in. Safe to call twice."""
        self._lock.release()
        if self._held is not None:
            self._held.close()
        if self._is_void:
            self._is_void = False
            self._remove_new_folders()

    def remove_traces(self) -> None:
        """Have the disk as it was found after `leave`, unless there is an earlier start of the run in the folder."""
        if self._was_begun or not self._lock.is_held or self.gone() is not None:
            return
        self._is_void = True
        for path in self.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif not is_of_no_run(path.name):
                path.unlink()

    def _take_lock(self) -> None:
        try:
            try:
                self._lock.take()
            except FileNotFoundError:  # who made the folder, and found that it cannot be used, has removed it
                self.path.mkdir(parents=True, exist_ok=True)
                self._lock.take()
        except LockedError as error:
            raise OutputError(_refusal(self.path, error.owner)) from None
        except OSError as error:
            raise OutputError(f"{self.path}: the output folder cannot be written: {error}") from None

    def _hold(self) -> None:
        try:
            self._held = HeldFolder(self.path)
        except OSError as error:
            raise OutputError(f"{self.path}: the output folder cannot be used: {error}") from None

    def _remove_new_folders(self) -> None:
        for folder in self._new_folders:
            try:
                folder.rmdir()
            except OSError:  # somebody else uses it by now
                return


def _is_begun(folder: Path) -> bool:
    """Whether there is something in a folder that no start of a run may overwrite."""
    return folder.is_dir() and any(not is_of_no_run(path.name) for path in folder.iterdir())


def _make_next(folder: Path, config: RunConfig) -> tuple[Path, list[Path]]:
    """Make the numbered folder, or the next one that nobody else makes at the same moment; and what was made."""
    for _ in range(_RUNS_AT_ONCE):
        new_folders = [path for path in folder.parents if not path.exists()]
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            folder.mkdir()
        except FileExistsError:
            folder = run_folder(config, resume=False)
            continue
        return folder, [folder, *new_folders]
    raise OutputError(f"{folder}: no number is free; name a folder (-o OUT_DIR)")


def _store(config: RunConfig, path: Path) -> None:
    """The old file or the new one is there, whole, at any moment."""
    with drafted(path, durable=True) as draft:
        write_config(config, draft)
        seal(draft)


def _refusal(folder: Path, owner: Owner | None) -> str:
    if owner is None:
        who = "another run is writing in this folder"
    elif owner.is_here:
        who = f"another run, process {owner.pid}, is writing in this folder"
    else:
        who = f"another run, process {owner.pid} on the machine {owner.host}, is writing in this folder, or was killed"
    named = shlex.quote(str(folder))
    remedy = f"wait until it has ended (troupe status {named}), end it (troupe stop {named}), or give another folder"
    if owner is not None and not owner.is_here:
        remedy += f"; if it is dead, remove {folder / LOCK}"
    return f"{folder}: {who}; {remedy}"


_SEAL = "# What a resume may take for settled, unless it was edited since: sha256 "


def seal(path: Path) -> None:
    """Add the sum, in a comment at the end, to a file that was just written. OSError where the disk fails."""
    with path.open("a", encoding="utf-8") as file:
        file.write(f"\n{_SEAL}{_sum(read_toml(path))}\n")


def is_as_written(path: Path) -> bool:
    """Whether the file says what a run wrote into it; layout, order and comments may differ. False, too, without a
    sum."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        sums = [line.removeprefix(_SEAL).strip() for line in lines if line.startswith(_SEAL)]
        return sums[-1:] == [_sum(read_toml(path))]
    except (OSError, UnicodeDecodeError, ConfigError):
        return False


def _sum(table: dict[str, Any]) -> str:
    text = msgspec.json.encode(table, order="deterministic")
    return hashlib.sha256(text).hexdigest()
