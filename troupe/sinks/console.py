"""Progress for a person: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from troupe.messages import Incident, Update
from troupe.sinks.base import RunInfo

# metric, label, format: what one looks at while training
_SHOWN = (
    ("reward", "reward", ".3f"),
    ("reward_std", "± within group", ".3f"),
    ("loss", "loss", "+.4f"),
    ("kl", "KL", ".4f"),
    ("entropy", "entropy", ".3f"),
    ("clip_ratio/region_mean", "clipped", ".1%"),
    ("grad_norm", "gradient norm", ".3f"),
    ("learning_rate", "learning rate", ".2e"),
    ("completions/mean_length", "tokens a completion", ".1f"),
    ("tokens_per_second", "tokens/s", ",.0f"),
    ("step_time", "seconds a step", ".2f"),
)
_COLUMNS = 3  # at most: a narrow terminal takes fewer
_COLUMN_WIDTH = 30
_QUEUE_PREFIX, _QUEUE_SUFFIX = "queue/", "/depth"


def shown_metrics(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """(label, formatted value) of the metrics worth a glance, in a fixed order; those absent are left out."""
    return [(label, format(metrics[key], spec)) for key, label, spec in _SHOWN if key in metrics]


def queue_depths(metrics: Mapping[str, float]) -> list[tuple[str, int]]:
    """(channel, messages waiting) from the metrics of a step."""
    return [
        (key.removeprefix(_QUEUE_PREFIX).removesuffix(_QUEUE_SUFFIX), int(value))
        for key, value in metrics.items()
        if key.startswith(_QUEUE_PREFIX) and key.endswith(_QUEUE_SUFFIX)
    ]


class ConsoleSink:
    """A progress bar with time left, a table of the newest metrics, queue depths, and the last incident."""

    name = "console"
    takes: tuple[type, ...] = (Update, Incident)

    def __init__(self, run: RunInfo, console: Console) -> None:
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._console = console
        self._task = self._progress.add_task(escape(run.name), total=run.total_steps, completed=run.first_step)
        self._metrics: Mapping[str, float] = {}
        self._incidents = 0
        self._last_incident = ""
        self._live = Live(get_renderable=self._render, console=console, refresh_per_second=4, transient=False)

    def open(self) -> None:
        """Start the live display."""
        self._live.start()

    def write(self, message: object) -> None:
        """Take over the newest figures; the display refreshes by itself."""
        if isinstance(message, Update):
            self._metrics = message.metrics
            self._progress.update(self._task, completed=message.step, total=message.total_steps)
        elif isinstance(message, Incident):
            self._incidents += 1
            self._last_incident = f"{message.actor}: {message.message}"

    def flush(self) -> None:
        """The display refreshes by itself."""

    def close(self) -> None:
        """Draw the last state and give the terminal back."""
        self._live.stop()

    def _render(self) -> Group:
        figures = Table.grid(padding=(0, 3, 0, 0))
        cells = [cell for label, value in shown_metrics(self._metrics) for cell in (Text(label, style="dim"), value)]
        width = 2 * max(1, min(_COLUMNS, self._console.width // _COLUMN_WIDTH))
        for start in range(0, len(cells), width):
            figures.add_row(*cells[start : start + width])
        parts: list[Progress | Table | Text] = [self._progress, figures]
        if queues := queue_depths(self._metrics):
            parts.append(
                Text("waiting in queues   " + "   ".join(f"{name} {depth}" for name, depth in queues), style="dim")
            )
        if self._incidents:
            parts.append(Text(f"{self._incidents} incidents, last: {self._last_incident}", style="yellow"))
        return Group(*parts)


class PlainSink:
    """One line a step, at most one every `interval_s` seconds, and every incident: for logs and pipes."""

    name = "console"
    takes: tuple[type, ...] = (Update, Incident)

    def __init__(self, run: RunInfo, stream: TextIO, *, interval_s: float = 1.0) -> None:
        self._run = run
        self._stream = stream
        self._interval_s = interval_s
        self._last_s = float("-inf")

    def open(self) -> None:
        """Say what begins."""
        self._say(f"{self._run.name}: step {self._run.first_step} of {self._run.total_steps}, into {self._run.folder}")

    def write(self, message: object) -> None:
        """Print an update when the last line is old enough or the run is complete, and any incident at once."""
        if isinstance(message, Incident):
            self._say(f"incident in {message.actor}: {message.message}")
        elif isinstance(message, Update):
            now_s = time.monotonic()
            if now_s - self._last_s >= self._interval_s or message.step == message.total_steps:
                self._last_s = now_s
                figures = "  ".join(f"{label} {value}" for label, value in shown_metrics(message.metrics))
                self._say(f"step {message.step}/{message.total_steps}  {figures}")

    def flush(self) -> None:
        """Every line is printed at once."""

    def close(self) -> None:
        """Nothing is held open: the stream belongs to the caller."""

    def _say(self, line: str) -> None:
        print(line, file=self._stream, flush=True)
