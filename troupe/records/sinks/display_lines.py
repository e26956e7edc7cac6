"""Lines of the display that follow from the newest figures, status or completion alone, and how figures are written."""

import math
from collections.abc import Iterator, Mapping, Sequence

from rich.cells import chop_cells
from rich.text import Text

from troupe.messages import Status
from troupe.records.figures import FIGURES, function_of, queue_depths, written
from troupe.records.members import at_a_glance, called, summary, worth_telling
from troupe.records.sinks.digest import Sample
from troupe.records.sinks.drawing import LABEL_WIDTH, NOTHING, fitted, row
from troupe.runtime.terminal import one_line

REWARD = "magenta"
"""Style of rewards."""
MOST_TEXT = 1000
"""Characters of a text that may be looked at: more than a terminal has in a line."""


def shown_metrics(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """(label, formatted value) of the metrics worth a glance, in a fixed order; those absent are left out."""
    return [
        (figure.line, written(metrics[metric], figure.spec))
        for metric, figure in FIGURES.items()
        if figure.line and metric in metrics
    ]


def clock_time(seconds: float) -> str:
    """`0:04:05`, with days where there are any."""
    minutes, second = divmod(max(0, round(seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return (f"{days} d " if days else "") + f"{hour}:{minute:02d}:{second:02d}"


def panel_figures(heading: str, metrics: Mapping[str, float]) -> Sequence[tuple[str, str]]:
    """(label, value) of what is measured; places for all of it before the first step."""
    return [
        (figure.panel[1], written(metrics[metric], figure.spec, figure.unit) if metrics else NOTHING)
        for metric, figure in FIGURES.items()
        if figure.panel[0] == heading and (metric in metrics or not metrics)
    ]


def function_lines(metrics: Mapping[str, float], encoding: str) -> list[Text]:
    """The means of the reward functions on a line, where there are several."""
    means = {name: value for metric, value in metrics.items() if (name := function_of(metric)) is not None}
    if len(means) < 2:
        return []
    parts = [
        part
        for name, value in means.items()
        for part in ((f"{one_line(name, encoding)} ", "dim"), (f"{written(value, '.3f')}   ", ""))
    ]
    return [row("rewards", *parts)]


def pool_lines(metrics: Mapping[str, float]) -> list[Text]:
    """How many rows are in each pool, where they are drawn by their pass rates."""
    there = [
        (figure, metrics[metric]) for metric, figure in FIGURES.items() if figure.chart == "pools" and metric in metrics
    ]
    parts = [
        part
        for figure, value in there
        for part in ((f"{figure.name} ", "dim"), (f"{written(value, figure.spec)}   ", ""))
    ]
    return [row("rows", *parts)] if parts else []


def queue_line(metrics: Mapping[str, float], status: Status | None) -> Text:
    """How many messages wait in each queue: now where that is known, else at the end of the step."""
    now = {} if status is None else status.queues
    depths = [(name, now.get(name, depth)) for name, depth in queue_depths(metrics).items()]
    parts: list[tuple[str, str]] = []
    for name, depth in depths:
        parts += [(f"{name} ", "dim"), (f"{depth:<5}", "" if depth else "dim")]
    return row("queues", *(parts or [(NOTHING, "dim")]))


def member_lines(status: Status | None, encoding: str) -> Iterator[Text]:
    """Who does the run's work elsewhere, where there is more than one generator in a process."""
    members = () if status is None else status.members
    if not worth_telling(members):
        return
    parts = [(f"{summary(members)}   ", "")]
    for member in members:
        style = "" if member.state == "working" else "dim" if member.state in ("idle", "ended") else "yellow"
        parts += [(f"{one_line(member.name, encoding)} ", "dim"), (f"{at_a_glance(member)}  ", style)]
    yield row(called(members), *parts)


def newest_lines(sample: Sample | None, width: int, most: int, encoding: str) -> Iterator[Text]:
    """A completion: its prompt, its reward, and `most` lines of what was said."""
    room = max(8, width - LABEL_WIDTH)
    prompt, answer, reward = NOTHING, "", ""
    if sample is not None:
        prompt = fitted(one_line(_ends(sample.prompt), encoding), room)
        reward = "no score  " if math.isnan(sample.reward) else f"{sample.reward:.3f}  "
        answer = fitted(one_line(_ends(sample.text), encoding), most * room - len(reward))
    yield row("prompt", (prompt, "dim"))
    lines = chop_cells(reward + answer, room) or [""]
    for i in range(most):
        text = lines[i] if i < len(lines) else ""
        score = reward if i == 0 else ""
        yield row("" if i else "answer", (score, REWARD), (text[len(score) :], ""))


def _ends(text: str) -> str:
    """What there may be room for, of a text of any length."""
    return text if len(text) <= 2 * MOST_TEXT else text[:MOST_TEXT] + text[-MOST_TEXT:]
