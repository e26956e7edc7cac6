"""Checkpoints by name: RUN@STEP, and RUN@best."""

from pathlib import Path

from troupe.checkpoint import best_checkpoint, checkpoint_folder, list_checkpoints
from troupe.errors import InputError
from troupe.records.evaluations import read_evaluations
from troupe.records.layout import RUN_TOML
from troupe.run.config import load_config
from troupe.runtime.files import expanded

_BEST = "best"


def checkpoint_named(name: str) -> Path | None:
    """The folder of a checkpoint that is named by its run and step, or as the best of its run; None of another name.

    InputError where the run has no such checkpoint, which tells those that it has.
    """
    text, found, which = name.rpartition("@")
    run = expanded(text)
    if not found or expanded(name).exists() or not (run / RUN_TOML).is_file():
        return None
    folder = _best_of(run) if which == _BEST else checkpoint_folder(run, int(which)) if which.isdecimal() else None
    if folder is not None and folder.is_dir():
        return folder
    steps = [str(int(path.name.rpartition("-")[2])) for path in reversed(list_checkpoints(run))]
    raise InputError(f"{name}: there is no such checkpoint; {run} has {', '.join(steps) or 'none'}, or write @{_BEST}")


def _best_of(run: Path) -> Path | None:
    """By the metric that the run keeps its best checkpoint by, where that is known of any."""
    config = load_config(run / RUN_TOML).checkpoint
    judged = None
    if config.metric_for_best.startswith("eval/"):
        values = {one.version: one.metrics.get(config.metric_for_best) for one in read_evaluations(run)}
        judged = {version: value for version, value in values.items() if value is not None}
    return best_checkpoint(run, config, judged)
