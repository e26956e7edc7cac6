"""Findings as people read them."""

from collections.abc import Sequence

from troupe.messages import Finding


def in_a_line(findings: Sequence[Finding]) -> str:
    """The most serious of those that hold, and how many more there are; empty where there is none."""
    if not findings:
        return ""
    more = f" (+{len(findings) - 1} more)" if len(findings) > 1 else ""
    return f"{in_full(findings[0])}{more}"


def in_full(finding: Finding) -> str:
    """One finding in a sentence."""
    when = f"since step {finding.since:,}"
    if finding.until is not None:
        when = f"steps {finding.since:,} to {finding.until:,}"
    return f"{finding.title}: {finding.evidence} ({when}); try {finding.remedy}"
