"""The files of a run folder by name, and which of them do not make it the folder of a run."""

import re

from troupe.runtime.guardian import SILENT
from troupe.runtime.lock import LOCK

RUN_TOML = "run.toml"
METRICS = "metrics.jsonl"
STORE = "run.sqlite"
TRACE = "trace.json"
CHANGES = "changes.jsonl"
SUMMARY = "summary.json"
EVALUATIONS = "evaluations.jsonl"
REPORT = "report.html"
COMPARED = "compare.html"
"""The report of several runs, which is in none of their folders."""
CONTROL_SOCKET, CONTROL_POINTER, CONTROL_LOCK = "control.sock", "control.path", "control.lock"
PAGE = "page.url"
LOG = "daemon.log"

_IS_PASSING = re.compile(r"\.c[a-z0-9_]{8}")
_OF_NO_RUN = {LOCK, CONTROL_SOCKET, CONTROL_POINTER, CONTROL_LOCK, SILENT, f"{SILENT}~", PAGE, f".writing-{RUN_TOML}"}


def is_of_no_run(name: str) -> bool:
    """Whether a file of this name may lie in a folder in which no run has begun: it belongs to who holds the folder, or
    was left by a start that was killed."""
    return name in _OF_NO_RUN or name.startswith(LOG) or is_passing(name)


def is_passing(name: str) -> bool:
    """Whether a folder of this name is there only while a control socket is made."""
    return _IS_PASSING.fullmatch(name) is not None
