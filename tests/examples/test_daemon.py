"""The commands of a day with a daemon, as its page shows them."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from tests.examples.running import EXAMPLES, LIMIT_S, command, run_command
from troupe.run.config import config_table, load_config

PAGE = (EXAMPLES / "daemon" / "README.md").read_text(encoding="utf-8")
(STAYS,) = re.findall(r"^```sh\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
DAY, END, UNITS = (block.splitlines() for block in re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


class Day:
    """A folder as the example's, with a daemon in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        table = config_table(load_config(EXAMPLES / "daemon" / "RUN.toml"))
        table["learner"]["max_steps"] = 100_000  # on no machine does it end by itself
        table["daemon"]["first_pause_s"] = 0.1
        (folder / "RUN.toml").write_text(tomli_w.dumps(table))
        self.said = folder / "said.txt"
        self.daemon: subprocess.Popen[bytes]

    def start(self) -> None:
        """As in the first terminal."""
        with self.said.open("ab") as said:
            self.daemon = subprocess.Popen(command(STAYS), cwd=self.folder, stdout=said, stderr=said)

    def type(self, line: str) -> str:
        """As in the second one → what it says."""
        done = run_command(line, self.folder)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def wait_for(self, wanted: Callable[[dict[str, Any]], bool], *, alone: bool = False) -> dict[str, Any]:
        """Until the status is as wanted; `alone`: without a daemon."""
        deadline_s = time.monotonic() + LIMIT_S
        while True:
            done = run_command("troupe status runs/arithmetic --json", self.folder)
            status: dict[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {}
            if wanted(status):
                return status
            assert alone or self.daemon.poll() is None, self.said.read_text()[-4000:]
            assert time.monotonic() < deadline_s, (status, self.said.read_text()[-4000:])
            time.sleep(0.05)

    def trainer(self) -> int:
        """The pid that the log names last."""
        log = (self.folder / "runs" / "arithmetic" / "daemon.log").read_text()
        return int(re.findall(r"trainer started \(pid (\d+)\)", log)[-1])


@pytest.mark.slow
def test_the_commands_of_a_day(tmp_path: Path) -> None:
    day = Day(tmp_path)
    day.start()
    try:
        day.wait_for(lambda status: status.get("step", 0) >= 2)
        for line in DAY:
            said = day.type(line)
            if line.startswith("troupe pause"):
                day.wait_for(lambda status: status["phase"] == "paused")
            if "learner.lr" in line:
                assert "learner.lr will be 0.0001 from the next step on" in said
        there = day.wait_for(lambda status: status["step"] > 20)  # there is a checkpoint
        os.kill(day.trainer(), signal.SIGKILL)
        day.wait_for(lambda status: status.get("phase") == "running" and status["step"] > there["step"])
        day.daemon.kill()
        day.daemon.wait(LIMIT_S)
        day.wait_for(lambda status: status.get("fate") == "cut off", alone=True)
        day.start()
        day.wait_for(lambda status: status.get("phase") == "running")
        day.type(END[0])
        assert day.daemon.wait(LIMIT_S) == 0
        assert "runs/arithmetic: ended after step" in day.type(END[1])
        assert [day.type(line)[:5] for line in UNITS] == ["# Sto", "<?xml"]
    finally:
        day.daemon.kill()
        day.daemon.wait(LIMIT_S)
