"""The picture of a run → one HTML page; how its parts are put together is in `template.py`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from troupe.messages.evaluations import HELD_OUT
from troupe.records import text as words
from troupe.records.conversations import Said, conversation_of, facts_of, observed_within, shortened
from troupe.records.diagnosis import remedy_for, steps_of
from troupe.records.held_out import HeldOut, Point, changes_told, in_words, is_share
from troupe.records.report.charts import sections_of
from troupe.records.report.data import Axes, bars_of, chart_data, marks_of
from troupe.records.report.picture import INCIDENTS_SHOWN, RunPicture, State
from troupe.records.report.static import BROWSER_SCRIPTS, BROWSER_STYLES, CHART_SCRIPTS, CHART_STYLES
from troupe.records.report.template import rendered
from troupe.records.store.completions import StoredCompletion
from troupe.records.store.episodes import StoredEpisode
from troupe.records.store.members import StoredMember
from troupe.records.text import prompt_text

_SCRIPTS = (*CHART_SCRIPTS, "bars.js", *BROWSER_SCRIPTS, "embedded.js", "report.js")
_LONGEST_TEXT = 20_000
"""Characters of a prompt or a completion."""
_LONGEST_SAID = 6000
"""Characters of what is said at once in a conversation, and of a tool's result."""
_MOST_SAID = 60
"""Messages of a conversation."""
_MOST_MEMBERS = 100
_MOST_SCORES = 2
"""Sets of held-out rows among the figures that one reads first."""
BADGES: dict[State, str] = {
    "finished": "good",
    **dict.fromkeys(("running", "starting"), "busy"),
    **dict.fromkeys(("paused", "held", "draining", "stopping", "stopped"), "warn"),
    **dict.fromkeys(("restarting", "crashed"), "bad"),
    "new": "",
}
_BEST_OF = ("accuracy", "avg@", "pass@", "maj@")
_SETTINGS = (
    ("model", "model.path"),
    ("weights", "model.dtype"),
    ("prompts", "data.path"),
    ("held-out prompts", "data.eval_path"),
    ("rewards", "rewards.functions"),
    ("weights of rewards", "rewards.weights"),
    ("loss", "learner.loss_type"),
    ("advantage", "learner.advantage"),
    ("learning rate", "learner.lr"),
    ("KL coefficient", "learner.beta"),
    ("prompts a step", "learner.batch_size"),
    ("completions a prompt", "generation.num_generations"),
    ("longest completion", "generation.max_completion_length"),
    ("temperature", "generation.temperature"),
    ("schedule", "schedule.mode"),
    ("most staleness", "schedule.max_staleness"),
    ("dynamic sampling", "learner.dynamic_sampling"),
    ("seed", "seed"),
)


class Tile(msgspec.Struct, frozen=True):
    """A figure that one reads first."""

    label: str
    figure: str
    more: str = ""


class SetRow(msgspec.Struct, frozen=True, kw_only=True):
    """A figure of a set of held-out rows, as it is shown."""

    figure: str
    first: str
    newest: str
    best: str


class Talk(msgspec.Struct, frozen=True, kw_only=True):
    """A completion as it is shown."""

    label: str
    reward: str
    facts: tuple[str, ...]
    prompt: str
    text: str
    left_out: int
    said: tuple[Said, ...] = ()
    """Of a completion that acted: what was said, in place of its prompt."""


def report_page(run: RunPicture, browsed: Mapping[str, Any] | None = None) -> str:
    """The page as HTML text. `browsed`: completions that can be looked through, as `browse.part_in` has them."""
    sections = sections_of(run)
    bars = bars_of(run)
    charts = [chart for section in sections for chart in section.charts]
    axes = Axes.of(run.metrics)
    of_sets = [axes.at(held_out.versions) for held_out in run.held_out.values()]
    data = chart_data(charts, [axes, *of_sets], marks_of(run))
    data |= {"bars": bars, "completions": browsed or {}}
    live = run.folder if run.goes_on else ""
    members = run.stored.members if _is_crowd(run.stored.members) else ()
    return rendered(
        "report.html",
        scripts=_SCRIPTS,
        styles=(*CHART_STYLES, *BROWSER_STYLES),
        data=data,
        filters={
            "changes": changes_told,
            "plain": _value,
            "facts": facts_of,
            "remedy": partial(remedy_for, folder=live),
            "steps": steps_of,
        },
        run=run,
        name=Path(run.folder).name,
        badge=BADGES[run.state],
        facts=list(_facts(run)),
        progress=None if not run.total_steps else min(100.0, 100.0 * run.step / run.total_steps),
        tiles=list(_tiles(run)),
        sections=sections,
        bars=[name for name, rows in bars.items() if rows],
        sets=[(held_out, list(rows_of_set(held_out))) for held_out in run.held_out.values()],
        talks=list(_talks(run)),
        browses=bool(browsed and browsed["rows"]),
        incidents_shown=INCIDENTS_SHOWN,
        members=members[-_MOST_MEMBERS:],
        members_left_out=max(0, len(members) - _MOST_MEMBERS),
        settings=list(_settings(run.config)),
    )


def _is_crowd(members: Sequence[StoredMember]) -> bool:
    """Whether they say more than that each start had its generator in a process."""
    starts = [member.start for member in members]
    return len(starts) > len(set(starts)) or any(member.kind != "process" for member in members)


def _facts(run: RunPicture) -> Iterator[str]:
    """What stands under the name."""
    model = _value_of(run.config, "model.path")
    if isinstance(model, str):
        yield Path(model).name
    if run.stored.starts:
        yield f"began {words.date(run.stored.starts[0].unix_s)}"
    if run.stored.newest_unix_s is not None:
        yield f"newest step {words.date(run.stored.newest_unix_s)}"
    if run.stored.machines:
        yield run.stored.machines[max(run.stored.machines)]
    if run.stored.starts:
        yield f"Troupe {run.stored.starts[-1].troupe}"


def _tiles(run: RunPicture) -> Iterator[Tile]:
    if rewards := run.values("reward"):
        yield Tile("reward", words.number(rewards[-1]), f"from {words.number(rewards[0])}")
    elif losses := run.values("loss"):
        yield Tile("loss", words.number(losses[-1]), f"from {words.number(losses[0])}")
    for held_out in list(run.held_out.values())[:_MOST_SCORES]:
        name = "held-out" if held_out.name == HELD_OUT else held_out.name
        row = next(rows_of_set(held_out))
        yield Tile(f"{name} {row.figure}", row.newest, f"from {row.first}")
    of = [] if run.total_steps is None else [f"of {run.total_steps:,}"]
    epochs = [f"epoch {epoch:.2f}" for epoch in run.values("epoch")[-1:]]
    yield Tile("steps", f"{run.step:,}", ", ".join(of + epochs))
    starts = len(run.stored.starts)
    yield Tile("time", words.seconds(run.seconds), f"in {starts} starts" if starts > 1 else "")
    if run.metrics.sums.sampled and run.metrics.sums.seconds:
        tokens = "" if run.tokens is None else f"{words.number(run.tokens)} in all"
        yield Tile("tokens/s", words.number(run.metrics.sums.sampled / run.metrics.sums.seconds), tokens)
    device_s = run.metrics.sums.totals.get("device_s")
    if device_s is not None and run.metrics.sums.seconds:
        yield Tile("device busy", words.percent(min(1.0, device_s / run.metrics.sums.seconds)), "of the time")
    peak = run.metrics.curves.get("peak_memory_gb")
    if peak is not None and (peaks := [value for value in peak.high or peak.mean if value is not None]):
        yield Tile("peak memory", words.size(1e9 * max(peaks)))
    incidents = sum(run.incidents.values())
    yield Tile("incidents", f"{incidents:,}", ", ".join(list(run.incidents)[:2]))


def rows_of_set(held_out: HeldOut) -> Iterator[SetRow]:
    """The figures of a set, those that tell most first; what says the same as one before is left out."""
    told: list[list[float]] = []
    for figure in held_out.figures:
        points = held_out.compared(figure)
        values = [point.value for point in points]
        is_of_scores = in_words(figure) == figure
        if not points or (is_of_scores and values in told) or (figure == "missing" and not any(values)):
            continue
        told += [values] if is_of_scores else []
        is_part = is_share(figure)
        by_version = {point.version: point for point in points}
        first, newest = by_version.get(held_out.since), by_version.get(held_out.newest)
        best = max(points, key=lambda point: point.value)
        yield SetRow(
            figure=in_words(figure),
            first=_point(first if held_out.since < held_out.newest else None, is_part),
            newest=_point(newest, is_part),
            best=f"{_point(best, is_part)} (step {best.version:,})" if figure.startswith(_BEST_OF) else "",
        )


def _point(point: Point | None, is_part: bool) -> str:
    """With its standard error, of which two digits tell."""
    if point is None:
        return words.MISSING
    if is_part:
        return words.percent(point.value) + ("" if point.se is None else f" ± {words.percent(point.se)}")
    if not point.se:
        return words.number(point.value)
    digits = max(0, 1 - math.floor(math.log10(point.se)))
    return f"{point.value:.{digits}f} ± {point.se:.{digits}f}"


def _talks(run: RunPicture) -> Iterator[Talk]:
    """Row by row: the best of the first step, the best of the newest, and so on."""
    for choice in ("best", "random", "worst"):
        for samples in run.stored.samples:
            if (completion := samples.completions.get(choice)) is not None:
                yield _talk(completion, f"step {samples.step:,}, {choice}")


def _talk(completion: StoredCompletion, label: str) -> Talk:
    text, left_out = _cut(completion.text)
    facts = [f"{len(completion.token_ids):,} tokens", f"ended by {completion.finish_reason}"]
    if completion.episode is not None:
        facts = [*_episode_facts(completion.episode, len(completion.token_ids)), facts[1]]
    if completion.advantage is not None:
        facts.append(f"advantage {words.number(completion.advantage)}")
    if completion.state != "trained":
        facts.append(completion.state)
    if list(completion.scores.values()) != [completion.reward]:
        facts += [f"{name} {words.number(score)}" for name, score in completion.scores.items()]
    answer = (completion.columns or {}).get("answer")
    if answer is not None:
        facts.append(f"answer {_cut(_value(answer), 200)[0]}")
    prompt, more = _cut(prompt_text(completion.prompt) or words.MISSING)
    return Talk(
        label=label,
        reward=words.number(completion.reward),
        facts=tuple(facts),
        prompt=prompt + (f" … {more:,} more characters" if more else ""),
        text=text,
        left_out=left_out,
        said=shortened(conversation_of(completion), _LONGEST_SAID, _MOST_SAID),
    )


def _episode_facts(episode: StoredEpisode, length: int) -> Iterator[str]:
    if episode.environment:
        yield episode.environment
    turns, read = len(episode.turns), observed_within(episode.observed, 0, length)
    yield f"{turns:,} turn{'' if turns == 1 else 's'}"
    yield f"{length - read:,} tokens"
    yield f"{read:,} read"
    if waited := sum(turn.answer.seconds for turn in episode.turns) + episode.opening.seconds:
        yield f"waited {words.seconds(waited)}"
    if episode.failed:
        yield "no whole episode"


def _cut(text: str, longest: int = _LONGEST_TEXT) -> tuple[str, int]:
    return text[:longest], max(0, len(text) - longest)


def _settings(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for label, key in _SETTINGS:
        value = _value_of(config, key)
        if value is not None and value != []:
            yield label, _value(value)


def _value_of(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(_value, value))
    return str(value)
