"""Findings as people read them."""

import shlex
from collections.abc import Sequence

from troupe.messages import Finding

_FOLDER = "OUT_DIR"
"""Stands in commands for the run folder, as in their help texts."""


def in_a_line(findings: Sequence[Finding], folder: str = "") -> str:
    """The most serious of those that hold, and how many more there are; empty where there is none. As `in_full`."""
    if not findings:
        return ""
    more = f" (+{len(findings) - 1} more)" if len(findings) > 1 else ""
    return f"{in_full(findings[0], folder)}{more}"


def in_full(finding: Finding, folder: str = "") -> str:
    """One finding in a sentence. `folder`: of the run, for the command in it."""
    when = f"since step {finding.since:,}"
    if finding.until is not None:
        when = f"steps {finding.since:,} to {finding.until:,}"
    return f"{finding.title}: {finding.evidence} ({when}); try {remedy_for(finding, folder)}"


def remedy_for(finding: Finding, folder: str = "") -> str:
    """The remedy, with the run folder in it where one is given."""
    return finding.remedy.replace(_FOLDER, shlex.quote(folder)) if folder else finding.remedy
