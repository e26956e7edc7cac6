"""What a person sees of a run at a glance: messages in, something that rich can draw out.

It has the same number of lines from one moment to the next, so that nothing jumps: places for what has not come yet
are kept free, and a line that is too long is cut.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.cells import cell_len, chop_cells
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from troupe.messages import GroupClosed, Incident, Phase, Status, Update
from troupe.records.figures import FIGURES, function_of, queue_depths, written
from troupe.records.members import at_a_glance, called, summary, worth_telling
from troupe.records.sinks.base import RunInfo
from troupe.records.sinks.digest import Sample, samples_of
from troupe.runtime.terminal import one_line

_PANELS = ("learning", "completions", "speed")
"""Headings, besides that about the reward."""
_MOST_REWARDS = 4
"""Reward functions that have a line of their own."""
_LAYOUTS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("reward",), ("learning",), ("completions",), ("speed",)),
    (("reward", "speed"), ("learning",), ("completions",)),
    (("reward", "speed"), ("learning", "completions")),
    (("reward", "learning", "completions", "speed"),),
)
"""Which panels stand below each other in how many columns; the first that there is room for is taken."""
_PANEL_WIDTH = 24
_GAP = 3
_WIDEST_BAR, _BESIDE_A_BAR = 60, 40
_ANSWER_LINES = 2
_NOTHING = "–"
_LABEL_WIDTH = 10
_PACE_STEPS = 32
"""Newest steps that say how long the others will take."""
_MOST_TEXT = 1000
"""Characters of a text that may be looked at: more than a terminal has in a line."""
_STYLES: dict[Phase, str] = {
    "running": "bold green",
    "paused": "bold yellow",
    "held": "bold yellow",
    "draining": "bold cyan",
    "stopping": "bold cyan",
    "failed": "bold red",
}


def shown_metrics(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """(label, formatted value) of the metrics worth a glance, in a fixed order; those absent are left out."""
    return [
        (figure.line, written(metrics[metric], figure.spec))
        for metric, figure in FIGURES.items()
        if figure.line and metric in metrics
    ]


def fitted(text: str, width: int) -> str:
    """A line of at most `width` cells; of a longer one the beginning and the end."""
    if cell_len(text) <= width:
        return text
    head = chop_cells(text, max(1, (width - 3) // 2))[0]
    tail = text[len(head) :][-width:]
    while cell_len(head) + 3 + cell_len(tail) > width:
        tail = tail[1:]
    return f"{head} … {tail}"


def clock_time(seconds: float) -> str:
    """`0:04:05`, with days where there are any."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"


class Display:
    """Takes messages in one thread; may be drawn in another at the same time."""

    def __init__(self, run: RunInfo, *, encoding: str = "utf-8", clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._encoding, self._clock = run, encoding, clock
        self._began_s = clock()
        self._step, self._total_steps = run.first_step, run.total_steps
        self._ends: deque[tuple[int, float]] = deque([(run.first_step, self._began_s)], maxlen=_PACE_STEPS + 1)
        self._metrics: Mapping[str, float] = {}
        self._sample: Sample | None = None
        self._status: Status | None = None
        self._incidents = 0
        self._last_incident = ""

    def add(self, message: object) -> None:
        """Take over what is new."""
        if isinstance(message, Update):
            self._metrics, self._step, self._total_steps = message.metrics, message.step, message.total_steps
            self._ends.append((message.step, self._clock()))
        elif isinstance(message, GroupClosed):
            if samples := samples_of(message):
                self._sample = samples[0]
        elif isinstance(message, Status):
            self._status = message
        elif isinstance(message, Incident):
            self._incidents += 1
            self._last_incident = f"{message.actor}: {message.message}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        yield self._title()
        yield from self._progress(width)
        yield self._banner() or self._now()
        yield _side_by_side(dict(self._panels()), width)
        yield Text()
        yield self._queues()
        yield from self._members()
        yield from self._newest(width)
        yield self._trouble()

    @property
    def _phase(self) -> Phase:
        if self._step >= self._total_steps:
            return "ended"
        if self._status is None:
            return "running" if self._metrics else "starting"
        return self._status.phase

    def _title(self) -> Text:
        style = _STYLES.get(self._phase, "bold")
        told = "complete" if self._phase == "ended" else self._phase
        return _line(
            (one_line(self._run.name, self._encoding), "bold"),
            ("  ", ""),
            (told, style),
            (f"  {clock_time(self._clock() - self._began_s)}", "dim"),
        )

    def _progress(self, width: int) -> Iterator[RenderableType]:
        left = "" if (left_s := self._left_s()) is None else f"{clock_time(left_s)} left"
        epoch = self._metrics.get("epoch", 0.0)
        epochs = epoch * self._total_steps / self._step if self._step else 0.0
        of_epochs = f"{epoch:.2f} of {epochs:.2f}" if epochs else _NOTHING
        part = 1.0 if epochs and epoch >= epochs else epoch - math.floor(epoch)
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_column(width=_LABEL_WIDTH - 2, style="dim", no_wrap=True)
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True, style="cyan")
        bar = max(8, min(_WIDEST_BAR, width - _LABEL_WIDTH - _BESIDE_A_BAR))
        steps = f"{self._step:,} of {self._total_steps:,}"
        grid.add_row("steps", _bar(self._step / max(1, self._total_steps), bar), steps, left)
        grid.add_row("epoch", _bar(part, bar), of_epochs, "")
        yield grid

    def _now(self) -> Text:
        """What the run is at, or waits for."""
        activity = None if self._status is None else self._status.activity
        if activity is None:
            return _row("now", (_NOTHING, "dim"))
        return _row("now", (one_line(activity.text, self._encoding), "yellow" if activity.waiting else "cyan"))

    def _left_s(self) -> float | None:
        """Seconds that the other steps will take at the pace of the newest ones."""
        (first, began_s), (last, ended_s) = self._ends[0], self._ends[-1]
        if last <= first or self._step >= self._total_steps:
            return None
        pace_s = (ended_s - began_s) / (last - first)
        return max(0.0, pace_s * (self._total_steps - last) - (self._clock() - ended_s))

    def _panels(self) -> Iterator[tuple[str, list[tuple[str, str]]]]:
        reward = list(_reward_rows(self._metrics, self._encoding)) if self._metrics else _rows("reward", {})[:2]
        yield "reward", reward
        for heading in _PANELS:
            yield heading, _rows(heading, self._metrics)

    def _queues(self) -> Text:
        now = {} if self._status is None else self._status.queues
        depths = [(name, now.get(name, depth)) for name, depth in queue_depths(self._metrics).items()]
        parts: list[tuple[str, str]] = []
        for name, depth in depths:
            parts += [(f"{name} ", "dim"), (f"{depth:<5}", "" if depth else "dim")]
        return _row("queues", *parts)

    def _members(self) -> Iterator[Text]:
        """Who does the run's work elsewhere, where there is more than one generator in a process."""
        members = () if self._status is None else self._status.members
        if not worth_telling(members):
            return
        parts = [(f"{summary(members)}   ", "")]
        for member in members:
            style = "" if member.state == "working" else "dim" if member.state in ("idle", "ended") else "yellow"
            parts += [(f"{one_line(member.name, self._encoding)} ", "dim"), (f"{at_a_glance(member)}  ", style)]
        yield _row(called(members), *parts)

    def _newest(self, width: int) -> Iterator[Text]:
        room, sample = max(8, width - _LABEL_WIDTH), self._sample
        prompt = answer = reward = ""
        if sample is not None:
            prompt = fitted(one_line(_ends(sample.prompt), self._encoding), room)
            reward = "no score  " if math.isnan(sample.reward) else f"{sample.reward:.3f}  "
            answer = fitted(one_line(_ends(sample.text), self._encoding), _ANSWER_LINES * room - len(reward))
        yield _row("prompt", (prompt, "dim"))
        lines = chop_cells(reward + answer, room) or [""]
        for i in range(_ANSWER_LINES):
            line = lines[i] if i < len(lines) else ""
            score = reward if i == 0 else ""
            yield _row("" if i else "answer", (score, "magenta"), (line[len(score) :], ""))

    def _banner(self) -> Text | None:
        """What whoever looks should see first, in the place of what the run is at; None where there is nothing."""
        if self._status is None or self._phase == "ended" or not self._status.notice:
            return None
        return _line((one_line(self._status.notice, self._encoding), "bold reverse"))

    def _trouble(self) -> Text:
        status = self._status
        if status is not None and status.held and self._phase == "held":
            return _row("held", (one_line("; ".join(status.held), self._encoding), "yellow"))
        if not self._incidents:
            return _row("incidents", ("none", "dim"))
        last = one_line(self._last_incident[:_MOST_TEXT], self._encoding)
        return _row("incidents", (f"{self._incidents}  ", "bold yellow"), (last, "yellow"))


def _rows(heading: str, metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """(label, value) of what is measured; places for all of it before the first step."""
    return [
        (figure.panel[1], written(metrics[metric], figure.spec, figure.unit) if metrics else _NOTHING)
        for metric, figure in FIGURES.items()
        if figure.panel[0] == heading and (metric in metrics or not metrics)
    ]


def _reward_rows(metrics: Mapping[str, float], encoding: str) -> Iterator[tuple[str, str]]:
    """The reward, the first spread that is measured, and the means of the functions."""
    yield from _rows("reward", metrics)[: 2 if "reward" in metrics else 1]
    means = {name: value for metric, value in metrics.items() if (name := function_of(metric)) is not None}
    most = _MOST_REWARDS if len(means) <= _MOST_REWARDS else _MOST_REWARDS - 1
    for name in list(means)[:most]:
        yield one_line(name, encoding), written(means[name], ".3f")
    if len(means) > most:
        yield f"and {len(means) - most} more", ""


def _side_by_side(panels: Mapping[str, Sequence[tuple[str, str]]], width: int) -> Table:
    """The panels in as many columns as there is room for."""
    layout = next(
        (columns for columns in _LAYOUTS if len(columns) * (_PANEL_WIDTH + _GAP) - _GAP <= width), _LAYOUTS[-1]
    )
    grid = Table.grid(padding=(0, _GAP, 0, 0))
    for _ in layout:
        grid.add_column(width=_PANEL_WIDTH)
    grid.add_row(*(_column([(heading, panels[heading]) for heading in column]) for column in layout))
    return grid


def _column(panels: Sequence[tuple[str, Sequence[tuple[str, str]]]]) -> Table:
    table = Table.grid(padding=(0, 1, 0, 0), expand=True)
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis", style="dim")
    table.add_column(justify="right", no_wrap=True)
    for i, (heading, figures) in enumerate(panels):
        if i:
            table.add_row("", "")
        table.add_row(Text(heading, style="bold cyan"), "")
        for label, value in figures:
            table.add_row(Text(label), Text(value, style="bold" if label == heading else ""))
    return table


def _bar(part: float, width: int) -> ProgressBar:
    return ProgressBar(total=1.0, completed=part, width=width, complete_style="cyan", finished_style="green")


def _row(label: str, *parts: tuple[str, str]) -> Text:
    return _line((f"{label:<{_LABEL_WIDTH}}", "dim"), *parts)


def _line(*parts: tuple[str, str]) -> Text:
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis", end="\n")


def _ends(text: str) -> str:
    """What there may be room for, of a text of any length."""
    return text if len(text) <= 2 * _MOST_TEXT else text[:_MOST_TEXT] + text[-_MOST_TEXT:]
