"""The live page in a real browser, with the real daemon on the demo.

Needs Chromium on the machine and the `browser` extra, and is skipped without them, unless TROUPE_REQUIRE_ORACLES is
set.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.browsers import a_browser, playwright
from troupe.cli.demo import DEMO_CONFIG
from troupe.daemon.control.protocol import ask
from troupe.messages import GetStatus, Status

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
PATIENCE_S = 120.0


class Daemon:
    """`troupe daemon` on the demo, in a process."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process, self.folder = process, folder
        assert process.stdout is not None
        self.address = process.stdout.readline().removeprefix("live page: ").strip()

    def status(self) -> Status:
        status = ask(self.folder, GetStatus())
        assert isinstance(status, Status)
        return status

    @property
    def trainer(self) -> int:
        log = (self.folder / "daemon.log").read_text()
        return int(re.findall(r"trainer started \(pid (\d+)\)", log)[-1])


@contextmanager
def a_daemon(folder: Path, *settings: str) -> Iterator[Daemon]:
    arguments = ["daemon", str(DEMO_CONFIG), "-o", str(folder), "--page"]
    for setting in ("learner.max_steps=5000", "checkpoint.every=100000", "daemon.first_pause_s=0.1", *settings):
        arguments += ["--set", setting]
    process = subprocess.Popen(
        [sys.executable, "-m", "troupe", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": os.fspath(Path(__file__).parents[3])},
    )
    try:
        yield Daemon(process, folder)
    finally:
        process.kill()
        process.communicate()


class Tab:
    """The page as a person has it before him."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.errors: list[str] = []
        page.set_default_timeout(1000 * PATIENCE_S)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", self._hear)

    def _hear(self, told: Any) -> None:
        if told.type == "error":
            self.errors.append(told.text)

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def see(self, holds: Callable[[], bool]) -> None:
        until_s = time.monotonic() + PATIENCE_S
        while not holds():
            assert time.monotonic() < until_s, (self.text("main")[:2000], self.errors)
            time.sleep(0.05)

    def phase_is(self, phase: str) -> None:
        self.see(lambda: self.text("#phase") == phase)

    def press(self, kind: str) -> None:
        self.page.click(f"[data-ask={kind}]:not([disabled])")

    @property
    def step(self) -> int:
        found = re.match(r"([\d,]+) /", self.text("#step"))
        return int(found[1].replace(",", "")) if found else 0

    @property
    def reward_line(self) -> str:
        values = "document.querySelector('#curves .chart')?.troupeChart.plot?.data[1] ?? ''"
        return str(self.page.evaluate(f"JSON.stringify({values})"))


@pytest.fixture
def browser() -> Iterator[Any]:
    with a_browser() as browser:
        yield browser


def test_a_run_is_watched_paused_saved_killed_and_drained_in_a_browser(tmp_path: Path, browser: Any) -> None:
    with a_daemon(tmp_path / "out") as daemon:
        context = browser.new_context(viewport={"width": 1280, "height": 900})
        tab = Tab(context.new_page())
        tab.page.goto(daemon.address)
        assert "token" not in tab.page.url
        assert tab.page.evaluate("document.cookie") == "", "no script gets to see it"
        tab.phase_is("running")
        _watch(tab)
        _use_the_buttons(tab, daemon)
        _outlive_the_trainer(tab, daemon)
        _fits(tab)
        _drain(tab, daemon)
        assert tab.errors == []
        stranger = browser.new_context().new_page()
        with pytest.raises(playwright().Error):
            stranger.goto(daemon.address)


def _watch(tab: Tab) -> None:
    height = tab.page.evaluate("document.querySelector('#talks').offsetTop")
    tab.see(lambda: tab.step >= 2)
    line = tab.reward_line
    tab.see(lambda: tab.reward_line not in ('""', line))
    tab.see(lambda: tab.page.locator("#talks .talk").count() >= 6)
    assert re.fullmatch(r"\d+\+\d+=", tab.text("#talks .prompt >> nth=0").strip())
    assert re.search(r"(best|all alike) · \d tokens", tab.text("#talks .talk >> nth=0"))
    assert tab.page.evaluate("document.querySelector('#talks').offsetTop") == height, "nothing jumps when data come"
    assert {row.split("\n")[0] for row in tab.page.locator("#actors .row").all_inner_texts()} == {
        "prompter",
        "generator",
        "scorer",
        "learner",
        "evaluator",
        "checkpointer",
        "metrics",
    }
    assert tab.page.locator("#queues .row").count() >= 5
    tab.see(lambda: re.search(r"held_out accuracy\n\d\d(\.\d)? %", tab.text(".tiles")) is not None)
    assert (
        tab.page.evaluate("[...document.querySelectorAll('.chart')].map((one) => one.troupeChart.spec.key)[1]")
        == "held_out"
    )
    assert "Nothing needs your attention" in tab.text("#notes")


def _use_the_buttons(tab: Tab, daemon: Daemon) -> None:
    tab.press("Pause")
    tab.phase_is("paused")
    assert "Pause: no further step will be begun" in tab.text("#answer")
    tab.see(lambda: daemon.status().groups == ())
    paused_at = daemon.status().step
    tab.press("Step")
    tab.see(lambda: tab.step == paused_at + 1)
    tab.press("Resume")
    tab.phase_is("running")
    tab.press("Checkpoint")
    tab.see(lambda: any(daemon.folder.glob("checkpoints/step-*/MANIFEST.json")))


def _outlive_the_trainer(tab: Tab, daemon: Daemon) -> None:
    before = daemon.trainer
    os.kill(before, signal.SIGKILL)
    tab.see(lambda: "ended by SIGKILL" in tab.text("#incidents"))
    tab.see(lambda: daemon.status().restarting is None)  # a step was made that none before had made
    assert daemon.trainer != before
    reached = daemon.status().step
    tab.see(lambda: tab.step > reached)
    tab.phase_is("running")


def _fits(tab: Tab) -> None:
    """On a telephone nothing is wider than the screen."""
    tab.page.set_viewport_size({"width": 390, "height": 800})
    tab.see(lambda: tab.page.evaluate("document.documentElement.scrollWidth") <= 390)
    tab.page.set_viewport_size({"width": 1280, "height": 900})


def _drain(tab: Tab, daemon: Daemon) -> None:
    tab.press("Drain")
    tab.page.click("#no")
    tab.see(lambda: daemon.status().phase == "running")
    tab.press("Drain")
    assert "Finish the steps that are begun" in tab.text("#question")
    tab.page.click("#yes")
    tab.phase_is("ended")
    assert re.search(r"ended after \d+ of 5000 steps", tab.text("#notes"))
    assert daemon.process.wait(PATIENCE_S) == 0
    assert not (daemon.folder / "page.url").exists()
    assert tab.page.locator("#buttons button:not([disabled])").count() == 0


COUNTING = """
window.partings = 0;
const close = EventSource.prototype.close;
EventSource.prototype.close = function () { window.partings += 1; close.call(this); };
"""
TURN = """hidden => {
  Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
  document.dispatchEvent(new Event("visibilitychange"));
}"""


def test_a_page_that_is_refused_or_out_of_sight_comes_back(tmp_path: Path, browser: Any) -> None:
    with a_daemon(tmp_path / "out") as daemon:
        tab = Tab(browser.new_page())
        asked: list[str] = []

        def refuse_the_first(route: Any) -> None:
            asked.append(route.request.url)
            if len(asked) == 1:
                route.fulfill(status=503, body="16 pages are open already")
            else:
                route.continue_()

        tab.page.route("**/events", refuse_the_first)
        tab.page.add_init_script(COUNTING)
        tab.page.goto(daemon.address)
        tab.phase_is("running")
        assert len(asked) == 2
        closed = tab.page.evaluate("partings")
        tab.page.evaluate(TURN, True)
        assert tab.page.evaluate("partings") == closed + 1, "the page in front needs the connection"
        step = tab.step
        tab.page.evaluate(TURN, False)
        tab.see(lambda: tab.step > step)
        assert len(asked) == 3


def test_a_judge_that_does_not_listen_is_told_of_in_a_browser(tmp_path: Path, browser: Any, free_tcp_port: int) -> None:
    """What is waited for, from before the first step on; one line for hundreds of faults; never that all is well."""
    judge = tmp_path / "judge.py"
    judge.write_text(
        "import asyncio\nasync def my_judge(completions, **_):\n"
        f"    await asyncio.open_connection('127.0.0.1', {free_tcp_port})\n"
        "    await asyncio.sleep(0.1)\n"
        "    return [1.0] * len(completions)\n"
    )
    with a_daemon(tmp_path / "out", f"rewards.functions=['{judge}:my_judge']") as daemon:
        tab = Tab(browser.new_page())
        tab.page.goto(daemon.address)
        tab.see(lambda: tab.text("#now").startswith("waiting for reward my_judge: connection refused ("))
        tab.see(lambda: "waits" in tab.page.locator("#now").get_attribute("class").split())
        tab.phase_is("held")
        assert "The reward my_judge is down" in tab.text("#notes")
        tab.see(lambda: " times)" in tab.text("#incidents"))
        assert tab.page.locator("#incidents .incident").count() < 20
        with socket.create_server(("127.0.0.1", free_tcp_port), backlog=1024):
            tab.see(lambda: tab.text("#notes").startswith("Nothing holds the run up now. Look at the "))
            tab.see(lambda: tab.text("#notes").startswith("Diagnosis: no signal: in 100% of the groups "))
        assert tab.page.locator("#notes .note.warn").count() >= 1
        assert "Nothing needs your attention" not in tab.text("#notes")
        assert tab.errors == []
