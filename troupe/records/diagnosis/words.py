"""Findings as people read them."""

import shlex
from collections.abc import Sequence

from troupe.messages import Finding

_SET = "--set "
_SET_LIVE = ("learner.lr",)
"""Keys of remedies that may change while a run goes on."""


def in_a_line(findings: Sequence[Finding], folder: str = "") -> str:
    """The most serious of those that hold, and how many more there are; empty where there is none. As `in_full`."""
    holding = [finding for finding in findings if finding.until is None]
    if not holding:
        return ""
    more = f" (+{len(holding) - 1} more)" if len(holding) > 1 else ""
    return f"{in_full(holding[0], folder)}{more}"


def in_full(finding: Finding, folder: str = "") -> str:
    """One finding in a sentence. `folder`: of the run, where it goes on and can be spoken to."""
    return f"{finding.title}: {finding.evidence} ({steps_of(finding)}); try {remedy_for(finding, folder)}"


def steps_of(finding: Finding) -> str:
    """When it holds or held."""
    if finding.until is None:
        return f"since step {finding.since:,}"
    return f"steps {finding.since:,} to {finding.until:,}"


def remedy_for(finding: Finding, folder: str = "") -> str:
    """The remedy; for a run that goes on in a folder the command that it heeds, where there is one."""
    setting = finding.remedy.removeprefix(_SET)
    is_live = bool(folder) and setting.partition("=")[0] in _SET_LIVE
    return f"troupe set {shlex.quote(folder)} {setting}" if is_live else finding.remedy
