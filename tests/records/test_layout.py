"""Which files do not make a folder that of a run."""

from __future__ import annotations

import pytest

from troupe.records.layout import LOG, PAGE, RUN_TOML, is_of_no_run
from troupe.runtime.lock import LOCK

OF_A_HOLDER = (
    LOCK, "control.sock", "control.path", "control.lock", "control.silent", "control.silent~", PAGE, LOG, f"{LOG}.1",
    ".cab_9defg", f".writing-{RUN_TOML}",
)  # fmt: skip
OF_A_RUN = RUN_TOML, "checkpoints", ".config", ".cABCDEFGH", "control", "metrics.jsonl"


@pytest.mark.parametrize("name", [*OF_A_HOLDER, *OF_A_RUN])
def test_files_of_who_holds_a_folder_are_no_run(name: str) -> None:
    assert is_of_no_run(name) == (name in OF_A_HOLDER)
