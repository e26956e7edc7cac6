"""Makes the pictures of the documents that show what a user sees, each of a real run.

    python -m scripts.make_screens [NAME…] [--out docs/images]

Screens of the display (`screen-….svg`) are what a terminal of 100 × 24 holds, as tmux has it, when what they are to
show is on it. Pages (`page-….png`) are what Chromium draws. The runs are the demo's, with more held-out sums, a larger
network without training where decoding is to be slow, and a judge that listens or does not. Needs tmux, Chromium and
the extra `browser`; takes some minutes on two CPU cores, and the figures differ from machine to machine.
"""

from __future__ import annotations

import json
import os
import platform
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import troupe  # noqa: F401 - before MLX, so that OpenBLAS is loaded first

# isort: split
import click
from rich.color import parse_rgb_hex
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

from troupe.cli.demo import DEMO_CONFIG
from troupe.policy import NetworkConfig, random_policy

ROOT = Path(__file__).resolve().parent.parent
COLUMNS, ROWS = 100, 24
PATIENCE_S = 300.0
PAGE = {"width": 1200, "height": 780}
SLOW = NetworkConfig(
    vocab_size=257,
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=64,
    max_position_embeddings=1024,
    tie_word_embeddings=True,
    eos_token_id=(256,),
)
"""Decodes a few tokens a second on two cores."""
JUDGE = '''
import asyncio

from troupe.rewards import exact_answer_reward


async def my_judge(completions, answer, **columns):
    """What a service at PORT says; here, that it is there."""
    _, writer = await asyncio.open_connection("127.0.0.1", PORT)
    writer.close()
    return exact_answer_reward(completions, answer=answer)
'''


def colours(told: str) -> list[tuple[int, int, int]]:
    """Colours that are told in hexadecimal digits."""
    return [parse_rgb_hex(colour) for colour in told.split()]


THEME = TerminalTheme(
    (24, 26, 31),
    (210, 212, 216),
    colours("1e1e1e e05a5a 5abe6e d6aa50 5a8cf0 be78dc 50bec8 c8c8c8"),
    colours("6e6e6e ff7878 82dc96 f0c86e 82aaff dc96fa 78dce6 ffffff"),
)
"""Background, letters, and the eight colours of a terminal, plain and bright."""
SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g></g></svg>
"""


class Terminal:
    """A terminal of its own in which one command runs."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self._socket = str(folder / "tmux")
        line = f"env PYTHONPATH={shlex.quote(str(ROOT))} {shlex.join(command)}; sleep 600"
        size = ["-x", str(COLUMNS), "-y", str(ROWS)]
        self._tmux("-f", os.devnull, "new-session", "-d", *size, "-c", str(folder), line)

    def text(self, *options: str) -> str:
        """What is on it."""
        return self._tmux("capture-pane", "-p", *options)

    def wait_for(self, holds: Callable[[str], bool]) -> str:
        """What is on it, with its colours, when that holds."""
        until_s = time.monotonic() + PATIENCE_S
        while not holds(self.text()):
            if time.monotonic() > until_s:
                raise TimeoutError(f"what was waited for did not come:\n{self.text()}")
            time.sleep(0.1)
        return self.text("-e")

    def close(self) -> None:
        """End the command, and the terminal."""
        for keys in (["C-c"], ["C-c"], ["C-c"], None):  # the third time a run leaves without saving
            with suppress(subprocess.CalledProcessError):  # all has ended already
                self._tmux("send-keys", *keys) if keys else self._tmux("kill-server")
            time.sleep(1.0)

    def _tmux(self, *arguments: str) -> str:
        done = subprocess.run(
            ["tmux", "-S", self._socket, *arguments], capture_output=True, text=True, check=True, encoding="utf-8"
        )
        return done.stdout


class Judge:
    """A service that listens, goes away and comes back."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            self.port: int = server.getsockname()[1]
        self._server: socket.socket | None = None

    def come(self) -> None:
        """Listen from now on."""
        self._server = socket.create_server(("127.0.0.1", self.port), backlog=512)
        threading.Thread(target=self._serve, args=(self._server,), daemon=True).start()

    def go(self) -> None:
        """Listen no more."""
        if self._server is not None:
            self._server.shutdown(socket.SHUT_RDWR)
            self._server.close()
            self._server = None

    def reward(self, folder: Path) -> str:
        """The reward that asks it."""
        (folder / "judge.py").write_text(JUDGE.replace("PORT", str(self.port)), encoding="utf-8")
        return "judge.py:my_judge"

    def _serve(self, server: socket.socket) -> None:
        while True:
            try:
                server.accept()[0].close()
            except OSError:
                return


@contextmanager
def training(folder: Path, *flags: str) -> Iterator[Terminal]:
    """`troupe train` in a terminal."""
    terminal = Terminal([sys.executable, "-m", "troupe", "train", "-o", "runs/sums", *flags], folder)
    try:
        yield terminal
    finally:
        terminal.close()


def held_out(folder: Path) -> str:
    """The first seconds of a run: held-out rows are answered beside the first steps."""
    dice = random.Random(0)
    pairs = [(dice.randrange(100), dice.randrange(100)) for _ in range(8000)]
    rows = [{"prompt": f"{one}+{other}=", "answer": str(one + other)} for one, other in pairs]
    (folder / "held-out.json").write_text(json.dumps(rows), encoding="utf-8")
    with training(folder, "--set", "data.eval_path=held-out.json") as terminal:
        return terminal.wait_for(
            lambda text: "evaluating held_out" in text and re.search(r"rows [1-9]", text) is not None
        )


def first_generation(folder: Path) -> str:
    """A model that takes minutes for its first step."""
    random_policy(SLOW, seed=0).save(folder / "larger")
    demo = DEMO_CONFIG.parent / "policy"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, folder / "larger")
    flags = ("-m", "larger", "-d", str(DEMO_CONFIG.parent / "arithmetic.json"), "--reward", "exact_answer")
    with training(folder, *flags, "--set", "generation.max_completion_length=512", "--batch-size", "4") as terminal:
        return terminal.wait_for(lambda text: "generating step 1: " in text and " tokens (1" in text)


def reward_refused(folder: Path) -> str:
    """A judge that is not listening."""
    with training(folder, "--reward", Judge().reward(folder)) as terminal:
        return terminal.wait_for(lambda text: "waiting for reward my_judge: " in text and "held  " in text)


def reward_back(folder: Path) -> str:
    """A judge that was away for a while."""
    judge = Judge()
    judge.come()
    with training(folder, "--reward", judge.reward(folder), "--max-steps", "400") as terminal:
        terminal.wait_for(lambda text: "step  " in text and " 0 of 400" not in text and "of 400" in text)
        judge.go()
        terminal.wait_for(lambda text: "waiting for reward my_judge: " in text and "held  " in text)
        judge.come()
        # which incident is the newest by then differs: that it answers again, or a group that lacks its scores
        back = terminal.wait_for(
            lambda text: "incidents " in text and "waiting for" not in text and "held  " not in text
        )
        judge.go()
        return back


def display(folder: Path) -> str:
    """A run amid its steps."""
    with training(folder) as terminal:
        return terminal.wait_for(lambda text: re.search(r" [5-8]\d of 100", text) is not None)


SCREENS: dict[str, Callable[[Path], str]] = {
    "screen-display": display,
    "screen-held-out": held_out,
    "screen-first-generation": first_generation,
    "screen-reward-refused": reward_refused,
    "screen-reward-back": reward_back,
}


def page_report(folder: Path, browser: Any, path: Path) -> None:
    """The report of the demo."""
    command = [sys.executable, "-m", "troupe"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for arguments in (["train", "-o", "runs/sums"], ["report", "runs/sums"]):
        subprocess.run([*command, *arguments], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    page = browser.new_page(viewport=PAGE)
    page.goto((folder / "runs" / "sums" / "report.html").as_uri())
    page.wait_for_selector("body[data-drawn]")
    page.evaluate(
        "(name) => { const [facts] = document.querySelectorAll('.head .muted');"
        " facts.textContent = facts.textContent.replace(`${name}, `, ''); }",
        platform.node(),
    )
    page.screenshot(path=path)


def page_compare(folder: Path, browser: Any, path: Path) -> None:
    """Three seeds of the demo and one of a rate that is far too high, on one page."""
    command = [sys.executable, "-m", "troupe"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    runs = {f"seed-{seed}": ["--seed", str(seed)] for seed in (1, 2, 3)} | {"hot": ["--set", "learner.lr=5e-3"]}
    for name, settings in runs.items():
        arguments = ["train", "--max-steps", "90", *settings, "-o", f"runs/lr/{name}"]
        subprocess.run([*command, *arguments], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    subprocess.run([*command, "report", "runs/lr"], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    page = browser.new_page(viewport={"width": 1200, "height": 1160})
    page.goto((folder / "compare.html").as_uri())
    page.wait_for_selector("body[data-drawn]")
    page.screenshot(path=path)


def page_live(folder: Path, browser: Any, path: Path) -> None:
    """The live page of the demo amid its steps."""
    command = [sys.executable, "-m", "troupe", "daemon", str(DEMO_CONFIG), "-o", "runs/sums", "--page"]
    process = subprocess.Popen(
        [*command, "--set", "learner.max_steps=400", "--set", "evaluation.every=20"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().removeprefix("live page: ").strip()
        page = browser.new_page(viewport=PAGE)
        page.goto(address)
        until_s = time.monotonic() + PATIENCE_S
        while not re.match(r"([6-9]\d|\d{3}) /", page.inner_text("#step")) and time.monotonic() < until_s:
            time.sleep(0.2)
        page.evaluate("document.getElementById('folder').textContent = 'runs/sums'")  # not where it lay on this machine
        page.screenshot(path=path)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate()


PAGES: dict[str, Callable[[Path, Any, Path], None]] = {
    "page-report": page_report,
    "page-compare": page_compare,
    "page-live": page_live,
}


def as_svg(text: str, name: str) -> str:
    """A screen as a picture, in which nothing is fetched from elsewhere."""
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        console = Console(width=COLUMNS, record=True, file=nowhere, force_terminal=True, color_system="truecolor")
        lines = [*text.rstrip("\n").split("\n"), *[""] * ROWS][:ROWS]
        console.print(Text.from_ansi("\n".join(lines)), no_wrap=True, crop=True)
        return console.export_svg(title="troupe train", theme=THEME, code_format=SVG, unique_id=name)


@click.command()
@click.argument("names", nargs=-1, type=click.Choice([*SCREENS, *PAGES]))
@click.option("--out", type=click.Path(path_type=Path), default=ROOT / "docs" / "images", show_default=True)
def main(names: tuple[str, ...], out: Path) -> None:
    """Make the pictures NAMES, or all."""
    wanted = names or (*SCREENS, *PAGES)
    for name in (name for name in wanted if name in SCREENS):
        with tempfile.TemporaryDirectory(prefix="troupe-screens-") as folder:
            screen = SCREENS[name](Path(folder))
        (out / f"{name}.svg").write_text(as_svg(screen, name), encoding="utf-8")
        click.echo(f"{out / name}.svg")
    if pages := [name for name in wanted if name in PAGES]:
        from playwright.sync_api import sync_playwright

        program = next(path for kind in ("chromium", "google-chrome") if (path := shutil.which(kind)))
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
            for name in pages:
                with tempfile.TemporaryDirectory(prefix="troupe-screens-") as folder:
                    PAGES[name](Path(folder), browser, out / f"{name}.png")
                click.echo(f"{out / name}.png")
            browser.close()


if __name__ == "__main__":
    main()
