"""summary.json: what became of a run."""

from pathlib import Path

import msgspec

from troupe.errors import OutputError
from troupe.messages import Finding
from troupe.records.layout import SUMMARY
from troupe.runtime.files import drafted


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a run; stored as `summary.json`."""

    folder: str
    steps: int
    """Learner batches completed, those before a resume included."""
    total_steps: int
    version: int
    """Policy version in `final/`."""
    wall_s: float
    """Seconds of this start, evaluation included."""
    closed_groups: dict[str, int]
    """Groups of this start by the state in which they closed."""
    incidents: dict[str, int]
    """Incidents of this start by kind."""
    switched_off_sinks: dict[str, str]
    findings: tuple[Finding, ...] = ()
    """What the figures say is wrong with the run; those that are over by now (`until`) come last."""
    accuracy_before: float | None = None
    """Share of held-out rows that the untrained policy, decoding greedily, answers exactly; None without such rows."""
    accuracy_after: float | None = None
    rewards_before: dict[str, float] = {}
    """Mean score of each reward on the held-out rows, greedy, before training; those that scored none are left out."""
    rewards_after: dict[str, float] = {}
    stopped_early: str = ""
    """Why the run ended before its last step, where `evaluation.patience` or `curriculum.stop_when_retired` had it
    end."""

    unevaluated: tuple[int, ...] = ()
    """Versions whose evaluation was under way when the run was stopped; whoever resumes it makes them."""

    @property
    def complete(self) -> bool:
        """Whether every step was made, or none more is to be; otherwise the run can be resumed."""
        return self.steps >= self.total_steps or bool(self.stopped_early)


def write_summary(result: RunResult) -> None:
    """Put the result into its folder, whole or not at all."""
    path = Path(result.folder) / SUMMARY
    with drafted(path) as draft:
        draft.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")


def remove_summary(folder: Path) -> None:
    """What an earlier start came to counts no more. OutputError where the folder cannot be written."""
    try:
        (folder / SUMMARY).unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: the output folder cannot be written: {error}") from None
