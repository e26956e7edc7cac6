"""The documents as data: their blocks, links and headings; and a shell that runs the commands of a page.

Conventions of the pages: a block with `title="NAME"` is a file of that name; a `bash` or `sh` block is run line by
line, unless `<!-- not run: REASON -->` stands before it; `<!-- fragment -->` marks a block that is a part of something.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from troupe.cli.main import main
from troupe.daemon.control.protocol import NobodyThereError, ask
from troupe.messages import GetStatus, Status

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^\n]*?) -->\n)?^```(?P<kind>\w+)(?: title=\"(?P<title>[^\"]+)\")?\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
_WAIT_S = 120.0
_IN_A_SHELL = re.compile(r"[|<>&;$`~]|^\w+=")


class Block(NamedTuple):
    """A fenced block."""

    page: Path
    kind: str
    title: str | None
    mark: str
    """The comment before it, without its brackets."""
    text: str

    @property
    def is_shell(self) -> bool:
        return self.kind in ("bash", "sh", "console")

    @property
    def why_not_run(self) -> str | None:
        """None where it is run."""
        return self.mark.removeprefix("not run: ") if self.mark.startswith("not run: ") else None

    @property
    def file_name(self) -> str | None:
        """Of a block that is a file: by its title, or in the README by its first line or its kind."""
        if self.title is not None or self.page != README:
            return self.title
        if match := re.fullmatch(r"# ([\w.]+\.(?:toml|py))", self.text.splitlines()[0]):
            return match[1]
        return {"json": "prompts.json", "python": "rewards.py"}.get(self.kind)


def blocks(*pages: Path) -> list[Block]:
    """The fenced blocks of some pages, in order."""
    return [
        Block(page, match["kind"], match["title"], match["mark"] or "", match["text"])
        for page in pages
        for match in _BLOCK.finditer(page.read_text(encoding="utf-8"))
    ]


def commands(block: Block) -> list[str]:
    """The lines of a shell block, without prompts, comments and what a console answers."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.kind == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return _BLOCK.sub("", page.read_text(encoding="utf-8"))


def inline_code(page: Path) -> list[str]:
    """What stands between single backticks."""
    return [code.replace("\n", " ") for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


def links(page: Path) -> list[str]:
    """The targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", re.sub(r"(?<!`)`[^`]+`(?!`)", "", prose(page)))


def anchors(page: Path) -> set[str]:
    """The ids of the headings, as MkDocs and GitHub make them of plain words."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


class Shell:
    """Runs the commands of a page in a folder, in order.

    `troupe …` is called in this process, which spares loading everything once more, anything else by bash. What
    lasts (`troupe daemon`, `--watch`) goes to the background, as it would into another terminal, and must have ended
    well when the page is done. A daemon is given so many steps that it runs until it is asked to end.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._background: list[tuple[str, subprocess.Popen[bytes], Path]] = []
        programs = folder / ".programs"
        programs.mkdir()
        for name, words in (("troupe", f"{shlex.quote(sys.executable)} -m troupe"), ("python", sys.executable)):
            (programs / name).write_text(f'#!/bin/sh\nexec {words} "$@"\n', encoding="utf-8")
            (programs / name).chmod(0o755)
        self._environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
            "HOME": str(folder),
        }

    def __enter__(self) -> Shell:
        self._before = Path.cwd()
        os.chdir(self._folder)
        return self

    def __exit__(self, *error: object) -> None:
        os.chdir(self._before)
        for _, process, _ in self._background:
            process.kill()
            process.wait()

    def run(self, command: str) -> None:
        """One line."""
        words = [] if _IN_A_SHELL.search(command) else shlex.split(command)
        if words[:2] == ["troupe", "daemon"] and "--print-unit" not in words:
            self._begin(f"{command} --set learner.max_steps=1000000")
            self._until(self._output_of(words), lambda status: status.step > 0)
        elif "--watch" in words:
            self._begin(command)
        elif words[:1] == ["troupe"]:
            try:
                main.main(words[1:], prog_name="troupe", standalone_mode=False)
            except SystemExit as end:
                code = end.code
            else:
                code = 0
            assert not code, f"{command}: ended with {code}"
            if words[1] == "pause":  # it is heeded in a moment, and the next line may depend on it
                self._until(words[2], lambda status: status.phase == "paused")
        else:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command],
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=_WAIT_S,
                check=False,
            )
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"

    def finish(self) -> None:
        """Wait for what runs in the background."""
        for command, process, log in self._background:
            assert process.wait(_WAIT_S) == 0, f"{command}\n{log.read_text(encoding='utf-8', errors='replace')}"

    def _begin(self, command: str) -> None:
        log = self._folder / f".background-{len(self._background)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {command}"], env=self._environment, stdout=output, stderr=output
            )
        self._background.append((command, process, log))

    def _output_of(self, words: list[str]) -> str:
        if "-o" in words:
            return words[words.index("-o") + 1]
        found = re.search(r'^output = "(.+)"', Path(words[2]).read_text(encoding="utf-8"), re.MULTILINE)
        assert found is not None, f"{words}: which folder?"
        return found[1]

    def _until(self, folder: str, holds: Callable[[Status], bool]) -> None:
        """Wait until the run is as it should be, as somebody at another terminal would see it."""
        until_s = time.monotonic() + _WAIT_S
        while time.monotonic() < until_s:
            with suppress(NobodyThereError):
                if isinstance(status := ask(Path(folder), GetStatus()), Status) and holds(status):
                    return
            for command, process, log in self._background:
                assert not process.poll(), f"{command}\n{log.read_text(encoding='utf-8', errors='replace')}"
            time.sleep(0.05)
        raise AssertionError(f"{folder}: not so within {_WAIT_S} s")


def message_texts() -> Iterator[str]:
    """The fixed parts of all texts in the package's code."""
    for file in (ROOT / "troupe").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
