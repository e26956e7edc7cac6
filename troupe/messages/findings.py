"""Finding: what the figures of a run say is wrong with it."""

import msgspec


class Finding(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Something that keeps a run from learning, as a rule of `records.diagnosis` sees it; no fault, and none of the
    incidents."""

    rule: str
    """A short fixed word; the metric `diagnosis/RULE` is 1 while the finding holds."""
    title: str
    """What is wrong, in a few words."""
    since: int
    """Step from which on it holds."""
    evidence: str
    """The figures that say so, in a sentence without its end."""
    remedy: str
    """One thing that may help: a `--set section.key=value`."""
    until: int | None = None
    """Step with which it was over; None: it holds."""
