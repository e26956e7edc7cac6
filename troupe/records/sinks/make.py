"""From the names in `metrics.sinks` to the sinks themselves."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from rich.console import Console

from troupe.records.layout import METRICS, STORE
from troupe.records.sinks.base import MetricsConfig, RunInfo, Sink, SinkName
from troupe.records.sinks.console import ConsoleSink, PlainSink
from troupe.records.sinks.jsonl import JsonlSink
from troupe.records.sinks.prometheus import PrometheusSink
from troupe.records.sinks.sqlite import SqliteSink
from troupe.records.sinks.tensorboard import FOLDER, TensorBoardSink
from troupe.records.sinks.trackers import TrackioSink, WandbSink
from troupe.runtime.outlets import of_a_display, outlet_of
from troupe.runtime.terminal import can_write


def make_sinks(
    config: MetricsConfig,
    run: RunInfo,
    others: Mapping[SinkName, Callable[[], Sink]] | None = None,
    terminal: Console | None = None,
) -> list[Sink]:
    """The sinks of a run, none of them open. `others`: makers of those that are at home elsewhere. `terminal`: where
    progress is shown; None: standard output."""
    folder = Path(run.folder)
    console = terminal or (Console(file=of_a_display(sys.stdout)) if outlet_of(sys.stdout) else Console())
    makers: dict[SinkName, Callable[[], Sink]] = {
        "console": lambda: ConsoleSink(run, console) if can_draw(console) else PlainSink(run, sys.stdout),
        "jsonl": lambda: JsonlSink(folder / METRICS, first_step=run.first_step),
        "sqlite": lambda: SqliteSink(
            folder / STORE,
            first_step=run.first_step,
            program=run.program,
            machine=run.machine,
            log_probs=config.store_log_probs,
        ),
        "tensorboard": lambda: TensorBoardSink(
            folder / FOLDER, run, completions=config.completions, completions_every=config.completions_every
        ),
        "wandb": lambda: WandbSink(run, config),
        "trackio": lambda: TrackioSink(run, config),
        "prometheus": lambda: PrometheusSink(config.prometheus_port),
        **(others or {}),
    }
    return [makers[name]() for name in config.sinks]


def can_draw(console: Console) -> bool:
    """Whether a display can be redrawn in place there, in letters that its encoding has."""
    return can_write("±–…", console.encoding) and console.is_terminal and not console.is_dumb_terminal
