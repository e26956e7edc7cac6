"""What a person sees of a run at a glance: messages in, something that rich can draw out.

The way of the reward is the largest thing. All of it is as wide as the window and no higher: where a window is low,
what matters least is left out. It has the same number of lines from one moment to the next, so that nothing jumps:
places for what has not come yet are kept free, and a line that is too long is cut.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from troupe.messages import Evaluated, Finding, GroupClosed, Incident, Phase, Status, Update
from troupe.records.diagnosis import in_a_line
from troupe.records.figures import written
from troupe.records.held_out import Standings
from troupe.records.sinks.base import RunInfo
from troupe.records.sinks.digest import Sample, samples_of
from troupe.records.sinks.display_lines import (
    MOST_TEXT,
    REWARD,
    clock_time,
    function_lines,
    member_lines,
    newest_lines,
    panel_figures,
    pool_lines,
    queue_line,
)
from troupe.records.sinks.drawing import (
    GAP,
    LABEL_WIDTH,
    NOTHING,
    Block,
    bar,
    beside,
    fitting,
    line,
    padded,
    panel,
    row,
    shaded,
    told,
)
from troupe.records.trend import Trend, area, spread, telling, trend_of
from troupe.runtime.terminal import arrows, one_line

_PANELS = ("learning", "completions", "speed")
_PANEL_WIDTH = 18
"""At least."""
_WIDE, _WIDE_PANEL = 120, 26
"""From how many columns on panels stand beside the reward, and how wide they are there."""
_WIDE_HEIGHT = 20
_CHART, _HIGHEST_CHART = 3, 10
"""Lines of the reward's curve."""
_NARROW, _NARROWEST_BAR = 60, 4
_MOST_SETS = 3
"""Sets with held-out rows that have a line."""
_ANSWER_LINES, _MOST_ANSWER_LINES = 2, 6
_PACE_STEPS = 32
"""Newest steps that say how long the others will take."""
_STYLES: dict[Phase, str] = {
    "running": "bold green",
    "paused": "bold yellow",
    "held": "bold yellow",
    "draining": "bold cyan",
    "stopping": "bold cyan",
    "failed": "bold red",
}


class Display:
    """Takes messages in one thread; may be drawn in another at the same time."""

    def __init__(self, run: RunInfo, *, encoding: str = "utf-8", clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._encoding, self._clock = run, encoding, clock
        self._folder = run.typed
        self._began_s = clock()
        self._step, self._total_steps = run.first_step, run.total_steps
        self._ends: deque[tuple[int, float]] = deque([(run.first_step, self._began_s)], maxlen=_PACE_STEPS + 1)
        self._metrics: Mapping[str, float] = {}
        self._way = trend_of(run.past, "loss" if run.config.get("task") == "sft" else "reward")
        self._held_out = Standings(run.evaluated)
        self._sample: Sample | None = None
        self._status: Status | None = None
        self._findings: Sequence[Finding] = ()
        self._incidents = 0
        self._last_incident = ""

    def add(self, message: object) -> None:
        """Take over what is new."""
        if isinstance(message, Update):
            self._metrics, self._step, self._total_steps = message.metrics, message.step, message.total_steps
            self._ends.append((message.step, self._clock()))
            if (figure := telling(message.metrics)) != self._way.of:
                self._way = Trend(figure)
            self._way.add(message.step, message.metrics.get(figure, math.nan))
            self._findings = message.findings
        elif isinstance(message, Evaluated):
            self._held_out.add(message)
        elif isinstance(message, GroupClosed):
            if samples := samples_of(message):
                self._sample = samples[0]
        elif isinstance(message, Status):
            self._status, self._findings = message, message.findings
        elif isinstance(message, Incident):
            self._incidents += 1
            self._last_incident = f"{message.actor}: {message.message}"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, height = options.max_width, max(1, options.size.height - 1)
        chart, answer = _CHART, _ANSWER_LINES
        spare = max(0, height - len(self._lines(width, height, chart, answer)))
        chart, spare = chart + min(spare, _HIGHEST_CHART - chart), spare - min(spare, _HIGHEST_CHART - chart)
        answer += min(spare, _MOST_ANSWER_LINES - answer)
        yield from self._lines(width, height, chart, answer)

    def _lines(self, width: int, height: int, chart: int, answer: int) -> list[Text]:
        """What there is room for. `chart`, `answer`: how many lines the curve and the answer take."""
        return fitting([*self._head(width), *self._middle(width, height, chart), *self._foot(width, answer)], height)

    def _head(self, width: int) -> Iterator[Block]:
        """How far the run is, what it is at, and what somebody should look at."""
        now = self._banner() or self._now()
        yield Block([self._title(), self._progress(width), now])
        for lines in (self._trouble(width), self._diagnosis(width)):
            yield Block(lines[:1])
            yield Block(lines[1:], rank=2)
        yield Block([] if self._findings else [Text()], rank=9)

    def _middle(self, width: int, height: int, chart: int) -> Iterator[Block]:
        """The reward and the figures of the step."""
        panels = {heading: panel_figures(heading, self._metrics) for heading in _PANELS}
        if width >= _WIDE and height >= _WIDE_HEIGHT:
            first, second, third = (panel(heading, panels[heading], _WIDE_PANEL) for heading in _PANELS)
            room = width - 2 * (_WIDE_PANEL + GAP)
            right = beside([[*first, Text(" " * _WIDE_PANEL), *third], second])
            below = [*function_lines(self._metrics, self._encoding), *pool_lines(self._metrics)]
            left = [*self._curve(room, max(chart, len(right) - 1 - len(below))), *below]
            yield Block(beside([[padded(text, room) for text in left], right]))
            yield Block(self._held_out_lines(width), rank=2)
            return
        heading, *curve = self._curve(width, chart)
        yield Block([heading])
        yield Block(curve, rank=1)
        yield Block(function_lines(self._metrics, self._encoding), rank=5)
        yield Block(pool_lines(self._metrics), rank=6)
        yield Block(self._held_out_lines(width), rank=2)
        yield Block([Text()], rank=10)
        columns = max(1, min(len(_PANELS), (width + GAP) // (_PANEL_WIDTH + GAP)))
        room = (width - GAP * (columns - 1)) // columns
        for at in range(0, len(_PANELS), columns):
            drawn = [panel(heading, panels[heading], room) for heading in _PANELS[at : at + columns]]
            yield Block(beside(drawn), rank=3 if at == 0 else 6 + at)

    def _foot(self, width: int, answer: int) -> Iterator[Block]:
        """Queues, who else is at work, and the newest completion."""
        yield Block([Text()], rank=9)
        yield Block([queue_line(self._metrics, self._status)], rank=7)
        yield Block(list(member_lines(self._status, self._encoding)), rank=4)
        yield Block(list(newest_lines(self._sample, width, answer, self._encoding)), rank=5)

    @property
    def _phase(self) -> Phase:
        if self._step >= self._total_steps:
            return "ended"
        if self._status is None:
            return "running" if self._metrics else "starting"
        return self._status.phase

    def _title(self) -> Text:
        style = _STYLES.get(self._phase, "bold")
        phase = "complete" if self._phase == "ended" else self._phase
        return line(
            (one_line(self._run.name, self._encoding), "bold"),
            ("  ", ""),
            (phase, style),
            (f"  {clock_time(self._clock() - self._began_s)}", "dim"),
        )

    def _progress(self, width: int) -> Text:
        """How many steps are done, the time left where it is known, and epochs; a bar takes what they leave."""
        left = "" if (left_s := self._left_s()) is None else f"{clock_time(left_s)} left"
        epoch = self._metrics.get("epoch", 0.0)
        epochs = epoch * self._total_steps / self._step if self._step else 0.0
        of_epochs = f"epoch {epoch:.2f} of {epochs:.2f}" if epochs else ""
        steps = f"{self._step:,} of {self._total_steps:,}"
        parts = [(f"  {steps:<{2 * len(f'{self._total_steps:,}') + 4}}", ""), (f"  {left:<12}", "cyan")]
        parts += [(f"  {of_epochs:<20}", "dim")]
        while len(parts) > 1 and width - LABEL_WIDTH - sum(len(text) for text, _ in parts) < _NARROWEST_BAR:
            parts.pop()
        room = max(_NARROWEST_BAR, width - LABEL_WIDTH - sum(len(text) for text, _ in parts))
        return row("steps", *bar(self._step / max(1, self._total_steps), room, self._encoding), *parts)

    def _now(self) -> Text:
        """What the run is at, or waits for."""
        activity = None if self._status is None else self._status.activity
        if activity is None:
            return row("now", (NOTHING, "dim"))
        return row("now", (one_line(activity.text, self._encoding), "yellow" if activity.waiting else "cyan"))

    def _left_s(self) -> float | None:
        """Seconds that the other steps will take at the pace of the newest ones."""
        (first, began_s), (last, ended_s) = self._ends[0], self._ends[-1]
        if last <= first or self._step >= self._total_steps:
            return None
        pace_s = (ended_s - began_s) / (last - first)
        return max(0.0, pace_s * (self._total_steps - last) - (self._clock() - ended_s))

    def _curve(self, width: int, rows: int) -> list[Text]:
        """The way of the reward, or of what tells best instead, and its first and newest value above it."""
        trend, room = self._way, max(1, width - LABEL_WIDTH)
        if trend.first is None or trend.newest is None:
            why = "nan" if trend.of in self._metrics else f"{NOTHING} with the first step"
            return [row(trend.of, (why, "dim")), *(Text() for _ in range(rows))]
        first, newest = written(trend.first, ".3f"), written(trend.newest, ".3f")
        way = newest if trend.steps[0] == trend.steps[1] else arrows(f"{first} → {newest}", self._encoding)
        in_group = next((f"   {label} {value}" for label, value in panel_figures("reward", self._metrics)[1:]), "")
        steps = f"   step {trend.steps[0]:,} to {trend.steps[1]:,}" if trend.steps[0] < trend.steps[1] else ""
        heading = line((f"{trend.of:<{LABEL_WIDTH}}", "bold"), (way, "bold"), (in_group, "dim"), (steps, "dim"))
        values = spread(trend.values, room) if len(trend.values) > 1 else []
        if not values:
            return [heading, *(Text() for _ in range(rows))]
        edges = [written(max(values), ".3f"), *[""] * (rows - 1)]
        if min(values) < max(values):
            edges[-1] = written(min(values), ".3f")
        labels = [(f"{edge:>{LABEL_WIDTH - 1}} ", "dim") for edge in edges]
        drawn = shaded(area(values, room, rows, encoding=self._encoding), REWARD)
        return [heading, *(line(label, *parts) for label, parts in zip(labels, drawn, strict=True))]

    def _held_out_lines(self, width: int) -> list[Text]:
        """How the sets of held-out rows stand, a line each."""
        return [
            row("held-out", (name and f"{name}  ", "dim"), (standing, ""))
            for name, standing in self._held_out.lines(self._encoding, short=width < _NARROW)[:_MOST_SETS]
        ]

    def _banner(self) -> Text | None:
        """What whoever looks should see first, in the place of what the run is at; None where there is nothing."""
        if self._status is None or self._phase == "ended" or not self._status.notice:
            return None
        return line((one_line(self._status.notice, self._encoding), "bold reverse"))

    def _trouble(self, width: int) -> list[Text]:
        status = self._status
        if status is not None and status.held and self._phase == "held":
            return [row("held", (one_line("; ".join(status.held), self._encoding), "yellow"))]
        if not self._incidents:
            return [row("incidents", ("none", "dim"))]
        last = one_line(self._last_incident[:MOST_TEXT], self._encoding)
        return told("incidents", f"{self._incidents:,}", last, width, 1 if width >= _NARROW else 2)

    def _diagnosis(self, width: int) -> list[Text]:
        """The most serious of what its figures say is wrong; nothing where nothing is."""
        if not self._findings:
            return []
        text = one_line(in_a_line(self._findings, self._folder)[:MOST_TEXT], self._encoding)
        title = one_line(self._findings[0].title, self._encoding)
        most = 2 if width >= _WIDE else 3 if width >= _NARROW else 5
        return told("diagnosis", title, text.removeprefix(title).removeprefix(": "), width, most)
