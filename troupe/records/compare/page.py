"""Several runs → one HTML page: their curves over each other, what differs between them, what they answered."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from troupe.records.compare.charts import Laid, Overlay
from troupe.records.compare.prompts import Answers, SharedPrompt, shared_held_out, shared_in_training
from troupe.records.compare.runs import Group, RunComparison
from troupe.records.compare.words import (
    about_figures,
    figures_told,
    held_out_tables,
    run_figures,
    setting_rows,
    steps_told,
    told_together,
)
from troupe.records.report.data import chart_data
from troupe.records.report.page import BADGES
from troupe.records.report.static import CHART_SCRIPTS, CHART_STYLES
from troupe.records.report.template import rendered
from troupe.records.text import shown

_ASSETS = Path(__file__).with_name("assets")
_MOST_CHARACTERS = 3_000_000
"""Of all completions on the page, about."""
_LONGEST_TEXT = 6000
_SHORTEST_TEXT = 400
"""A completion is never cut to less."""
_LONGEST_PROMPT = 4000


class RunRow(msgspec.Struct, frozen=True, kw_only=True):
    """A line of the table of runs: a run, or the seeds of one configuration together."""

    name: str
    folder: str
    state: str
    badge: str
    steps: str
    figures: list[str]
    colour: int
    is_band: bool = False
    is_within: bool = False
    """Whether a band stands for it, too."""


def compare_page(found: RunComparison) -> str:
    """The page as HTML text."""
    laid = Overlay(found).laid()
    prompts = _prompts(found)
    charts = [chart for section in laid.sections for chart in section.charts]
    data = chart_data(charts, laid.axes) | {
        "runs": [run.name for run in found.runs],
        "colours": laid.colours,
        "within": laid.within,
        "bands": [group.name for group in found.groups if len(group.runs) > 1],
        "prompts": [_told(shared, _longest(prompts)) for shared in prompts],
    }
    figures = run_figures(found)
    return rendered(
        "compare.html",
        scripts=(*CHART_SCRIPTS, "compare.js"),
        styles=(*CHART_STYLES, "compare.css"),
        folder=_ASSETS,
        data=data,
        names=[run.name for run in found.runs],
        titles=[figure.title for figure in figures],
        about=about_figures(found),
        rows=[row for group in found.groups for row in _rows(found, group, laid)],
        groups=[group.name for group in found.groups],
        settings=setting_rows(found),
        sections=laid.sections,
        held_out=list(held_out_tables(found)),
        has_prompts=bool(prompts),
        findings=[(run.name, told) for run in found.runs if (told := run.picture.diagnosis)],
        notes=[(run.name, note) for run in found.runs for note in run.picture.notes],
    )


def _rows(found: RunComparison, group: Group, laid: Laid) -> list[RunRow]:
    figures = run_figures(found)
    members = [found.runs[place] for place in group.runs]
    rows = []
    if len(members) > 1:
        rows.append(
            RunRow(
                name=group.name,
                folder="",
                state=f"{len(members)} seeds",
                badge="",
                steps="",
                figures=told_together(members, figures),
                colour=laid.colours[group.name],
                is_band=True,
            )
        )
    return rows + [
        RunRow(
            name=run.name,
            folder=run.picture.folder,
            state=run.picture.state,
            badge=BADGES[run.picture.state],
            steps=steps_told(run),
            figures=figures_told(run, figures),
            colour=laid.colours[run.name],
            is_within=len(members) > 1,
        )
        for run in members
    ]


def _prompts(found: RunComparison) -> list[SharedPrompt]:
    held_out = shared_held_out([run.held_out for run in found.runs])
    return [*held_out, *shared_in_training([Path(run.picture.folder) for run in found.runs])]


def _longest(prompts: Sequence[SharedPrompt]) -> int:
    """Characters of a completion, so that all of them do not make the page too heavy."""
    count = sum(len(answers.samples) for one in prompts for pair in one.answers for answers in pair)
    return max(_SHORTEST_TEXT, min(_LONGEST_TEXT, _MOST_CHARACTERS // max(1, count)))


def _told(shared: SharedPrompt, longest: int) -> dict[str, Any]:
    return {
        "source": shown(shared.source),
        "prompt": _cut(shared.prompt, _LONGEST_PROMPT),
        "answers": [[_answers(answers, longest) for answers in dict.fromkeys(pair)] for pair in shared.answers],
    }


def _answers(answers: Answers, longest: int) -> dict[str, Any]:
    samples = [
        {
            "text": _cut(sample.text, longest),
            "reward": sample.reward,
            "ended": shown(sample.finish_reason),
            "tokens": sample.tokens,
        }
        for sample in answers.samples
    ]
    return {"step": answers.step, "samples": samples}


def _cut(text: str, longest: int) -> str:
    more = len(text) - longest
    return shown(text[:longest]) + (f" … {more:,} more characters" if more > 0 else "")
