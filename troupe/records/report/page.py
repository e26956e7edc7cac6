"""The picture of a run → one HTML page that needs no other file and no network.

What a policy wrote, what rewards logged and what errors said are put in as text: the template escapes them, the data of
the charts stands in a script tag that is no script and holds no `<`, and the page's policy allows no script but ours.
"""

import base64
import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from markupsafe import Markup

from troupe.records import text as words
from troupe.records.conversations import Said, conversation_of, facts_of, observed_within, shortened
from troupe.records.figures import named_by
from troupe.records.report.charts import Chart, Section, Values, sections_of
from troupe.records.report.picture import INCIDENTS_SHOWN, RunPicture, State
from troupe.records.report.static import read_asset, script_safe
from troupe.records.store.completions import StoredCompletion
from troupe.records.store.episodes import StoredEpisode
from troupe.records.store.members import StoredMember
from troupe.records.text import prompt_text, shown

_SCRIPTS = (
    *("format.js", "charts.js", "bars.js"),
    *("conversation.js", "difference.js", "completion.js", "completions.js", "embedded.js"),
    "report.js",
)
_STYLES = ("style.css", "completions.css")
_LONGEST_TEXT = 20_000
"""Characters of a prompt or a completion."""
_LONGEST_SAID = 6000
"""Characters of what is said at once in a conversation, and of a tool's result."""
_MOST_SAID = 60
"""Messages of a conversation."""
_LONGEST = 100_000
"""Characters of anything else."""
_LONGEST_NAME = 100
"""Characters of what is told of a line."""
_MOST_WAITS = 12
"""Environments and tools of which is told how long they took."""
_MOST_MEMBERS = 100
_MOST_SCORES = 2
"""Scores on held-out rows among the figures that one reads first; with more there is a table."""
_BADGES: dict[State, str] = {
    "finished": "good",
    **dict.fromkeys(("running", "starting"), "busy"),
    **dict.fromkeys(("paused", "held", "draining", "stopping", "stopped"), "warn"),
    **dict.fromkeys(("restarting", "crashed"), "bad"),
    "new": "",
}
_ACTORS = ("generator", "environment", "scorer", "learner", "checkpointer", "prompter", "metrics")
_BESIDE = {"environment": "environments", "reward": "rewards", "checkpoint": "checkpoints", "logging": "logging"}
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


def report_page(run: RunPicture) -> str:
    """The page as HTML text."""
    sections = sections_of(run)
    script = "".join(map(read_asset, _SCRIPTS))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    members = run.stored.members if _is_crowd(run.stored.members) else ()
    pages = jinja2.Environment(
        autoescape=True, finalize=_harmless, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    pages.filters |= {
        "date": words.date, "number": words.number, "seconds": words.seconds, "bytes": words.size, "plain": _value,
        "facts": facts_of,
    }  # fmt: skip
    return pages.from_string(read_asset("report.html")).render(
        style=Markup("\n".join(map(read_asset, _STYLES))),
        script=Markup(script),
        digest=digest,
        data=Markup(script_safe({**chart_data(run, sections), "completions": run.stored.browsed})),
        run=run,
        name=Path(run.folder).name,
        badge=_BADGES[run.state],
        facts=list(_facts(run)),
        progress=None if not run.total_steps else min(100.0, 100.0 * run.step / run.total_steps),
        tiles=list(_tiles(run)),
        sections=sections,
        has_waits=bool(_wait_bars(run)),
        most_scores=_MOST_SCORES,
        talks=list(_talks(run)),
        browses=bool(run.stored.browsed.get("rows")),
        incidents_shown=INCIDENTS_SHOWN,
        members=members[-_MOST_MEMBERS:],
        members_left_out=max(0, len(members) - _MOST_MEMBERS),
        settings=list(_settings(run.config)),
        written=words.date(time.time()),
    )


def _is_crowd(members: Sequence[StoredMember]) -> bool:
    """Whether they say more than that each start had its generator in a process."""
    starts = [member.start for member in members]
    return len(starts) > len(set(starts)) or any(member.kind != "process" for member in members)


def chart_data(run: RunPicture, sections: Sequence[Section]) -> dict[str, Any]:
    """What the page's script draws; keys as `charts.js` names them."""
    return {
        "x": run.metrics.steps,
        "marks": [
            {"x": start.first_step, "label": f"start {start.start}, {words.date(start.unix_s)}"}
            for start in run.stored.starts
            if start.first_step
        ],
        "charts": [_chart_data(chart) for section in sections for chart in section.charts],
        "bars": {"actors": _actor_bars(run), "beside": _beside_bars(run), "waits": _wait_bars(run)},
    }


def _chart_data(chart: Chart) -> dict[str, Any]:
    series = []
    for line in chart.lines:
        one: dict[str, Any] = {"name": _name(line.name), "y": _all_rounded(line.mean)}
        if line.low:
            one["band"] = {"low": _all_rounded(line.low), "high": _all_rounded(line.high)}
        series.append(one)
    spec = chart.spec
    told: dict[str, Any] = {"title": _name(spec.title), "about": spec.about, "format": spec.format, "series": series}
    told |= {"smooth": True} if spec.smooth else {}
    return told | ({"min": spec.least} if spec.least is not None else {})


def _name(text: str) -> str:
    return shown(text[:_LONGEST_NAME])


def _all_rounded(values: Values) -> list[float | None]:
    return [_rounded(value) for value in values]


def _rounded(value: float | None) -> float | None:
    """Five digits: more than any chart shows."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.5g}")


def _actor_bars(run: RunPicture) -> list[dict[str, Any]]:
    shares = run.metrics.sums.shares
    there = {name.partition("/")[0] for name in shares}
    rows = []
    for actor in [*(a for a in _ACTORS if a in there), *sorted(there - set(_ACTORS))]:
        busy, idle = shares.get(f"{actor}/busy", 0.0), shares.get(f"{actor}/idle", 0.0)
        parts = [
            {"name": "at work", "value": _rounded(busy), "kind": "busy"},
            {"name": "waiting", "value": _rounded(idle), "kind": "wait"},
            {"name": "the rest", "value": _rounded(max(0.0, 1.0 - busy - idle)), "kind": "idle"},
        ]
        rows.append({"name": actor, "note": f"{words.percent(busy)} at work", "parts": parts})
    return rows


def _beside_bars(run: RunPicture) -> list[dict[str, Any]]:
    rows = []
    for name, label in _BESIDE.items():
        hidden, exposed = (run.metrics.sums.totals.get(f"{name}/{part}_s") for part in ("hidden", "exposed"))
        if hidden is None or exposed is None:
            continue
        parts = [
            {"name": "hidden under device work", "value": _rounded(hidden), "kind": 3},
            {"name": "exposed: the device waited", "value": _rounded(exposed), "kind": 2},
        ]
        note = f"{words.seconds(hidden)} hidden, {words.seconds(exposed)} exposed"
        rows.append({"name": label, "note": note, "parts": parts})
    return rows


def _wait_bars(run: RunPicture) -> list[dict[str, Any]]:
    """How long calls and episodes took, by tool and environment, over all steps; those that took most first."""
    means = {}
    for name, curve in run.metrics.curves.items():
        tool, environment = named_by(name, ("tools/", "/wait_s")), named_by(name, ("environments/", "/wait_s"))
        label = f"{tool}, a call" if tool else f"{environment}, an episode" if environment else ""
        label = "an episode" if name == "environments/wait_s" else label
        if label and (values := [value for value in curve.mean if value is not None]):
            means[label] = math.fsum(values) / len(values)
    rows = []
    for label, mean_s in sorted(means.items(), key=lambda item: -item[1])[:_MOST_WAITS]:
        parts = [{"name": "waited, on average", "value": _rounded(mean_s), "kind": "wait"}]
        rows.append({"name": _name(label), "note": words.seconds(mean_s), "parts": parts})
    return rows


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
    for score in run.evaluated[:_MOST_SCORES]:
        figure = words.percent if score.name == "accuracy" else words.number
        yield Tile(f"held-out {score.name}", figure(score.after), f"from {figure(score.before)}")
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


def _harmless(value: Any) -> Any:
    """What the template puts in: text in which nothing acts, and that has an end. It escapes it afterwards."""
    return value if isinstance(value, Markup) else shown(str(value)[:_LONGEST])


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
