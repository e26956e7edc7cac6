"""Several run folders → what is compared of them: each run's picture, and what belongs together."""

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from troupe.errors import InputError
from troupe.messages import Status
from troupe.records.compare.figures import Level, RunFigures, figures_of_run, level_of
from troupe.records.compare.settings import (
    Difference,
    Settings,
    differences,
    group_name,
    groups_of,
    settings_of,
    short_names,
)
from troupe.records.held_out import HeldOut
from troupe.records.report.picture import RunPicture, read_run

MOST_RUNS = 32

AskStatus = Callable[[Path], tuple[Status | None, list[str]]]
"""What a live run says of itself, and what is to be noted where it does not answer."""


class ComparedRun(msgspec.Struct, frozen=True, kw_only=True):
    """One of the runs."""

    name: str
    """Short, and no other's."""
    picture: RunPicture
    settings: Settings
    figures: RunFigures
    held_out: dict[str, HeldOut]
    """By set."""

    @property
    def seed(self) -> int | None:
        """That its prompts and samples are drawn with."""
        seed = self.settings.get("seed")
        return seed if isinstance(seed, int) else None


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """Runs of one configuration with other seeds; often one alone."""

    name: str
    runs: tuple[int, ...]
    """Their places."""


class RunComparison(msgspec.Struct, frozen=True, kw_only=True):
    """Runs side by side."""

    runs: tuple[ComparedRun, ...]
    groups: tuple[Group, ...]
    level: Level
    differences: tuple[Difference, ...]
    """The settings that are not the same in all runs."""


def read_runs(folders: Sequence[Path], ask_status: AskStatus, reward: float | None = None) -> RunComparison:
    """What is compared of the runs in these folders. InputError where one is no run, or is named twice; what is damaged
    is a note in its picture.

    `reward`: that it is counted how soon each run has it; None for one that all have had.
    """
    _check(folders)
    names = short_names(folders)
    pictures = [read_run(folder, *ask_status(folder)) for folder in folders]
    settings = [settings_of(picture.config) for picture in pictures]
    level = level_of([picture.metrics for picture in pictures], reward)
    runs = tuple(
        ComparedRun(
            name=name,
            picture=picture,
            settings=said,
            figures=figures_of_run(picture.metrics, level),
            held_out=picture.held_out,
        )
        for name, folder, picture, said in zip(names, folders, pictures, settings, strict=True)
    )
    groups = [
        Group(name=group_name([names[place] for place in places]), runs=tuple(places)) for places in groups_of(settings)
    ]
    return RunComparison(runs=runs, groups=tuple(groups), level=level, differences=tuple(differences(settings)))


def _check(folders: Sequence[Path]) -> None:
    if len(folders) < 2:
        raise InputError("give two runs or more to compare, or a folder that they lie in")
    if len(folders) > MOST_RUNS:
        raise InputError(f"{len(folders)} runs are too many beside each other; give at most {MOST_RUNS} of them")
    seen: dict[Path, Path] = {}
    for folder in folders:
        other = seen.setdefault(folder.resolve(), folder)
        if other is not folder:
            raise InputError(f"{folder}: this run is named twice; name it once")
