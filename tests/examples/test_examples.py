"""The table of examples is whole, its commands are ones, and every TOML file that ships can be used."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from tests.examples.running import EXAMPLES, command
from troupe.cli.main import main
from troupe.run.config import RunConfig, check_config, load_config

ROOT = EXAMPLES.parent
TABLE = (EXAMPLES / "README.md").read_text(encoding="utf-8")
PAGES = {path: path.read_text(encoding="utf-8") for path in EXAMPLES.rglob("*.md")}
HEADS = {path: path.read_text(encoding="utf-8").split('"""')[1] for path in EXAMPLES.rglob("*.py")}


MADE = [
    *(EXAMPLES / "smollm2" / ".." / ".." / "models" / name for name in ("smollm2", "smollm2-4bit")),
    *(EXAMPLES / name / "policy" for name in ("higher_lower", "code_agent")),
]
"""Models that an example makes before it trains them."""
SHIPPED = sorted(
    path
    for part in ("troupe", "examples", "docs", "benchmarks", "scripts")
    for path in (ROOT / part).rglob("*.toml")
    if "runs" not in path.parts
)


def lines_of_commands() -> list[str]:
    """Every `troupe …` and `python …` in the pages' blocks and the files' heads."""
    blocks = "\n".join(
        block for text in PAGES.values() for block in re.findall(r"^```(?:bash|sh)\n(.*?)^```$", text, re.M | re.S)
    )
    heads = "\n".join(line[4:] for head in HEADS.values() for line in head.splitlines() if line.startswith("    "))
    lines = [re.sub(r"^(?:\w+=\S+ )+", "", line) for line in (blocks + "\n" + heads).splitlines()]
    return sorted({line for line in lines if line.startswith(("troupe ", "python "))})


def test_everything_in_the_folder_is_in_the_table() -> None:
    shown = set(re.findall(r"^\| \[[^\]]+\]\(([^)]+)\)", TABLE, re.MULTILINE))
    there = {p.name for p in EXAMPLES.iterdir() if p.name not in ("README.md", "__pycache__", "runs")}
    assert shown == there


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.parent.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", PAGES[path]):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("line", lines_of_commands())
def test_every_command_shown_is_one(line: str) -> None:
    words = command(line)
    if line.startswith("python "):
        assert Path(words[1]).is_file()
        return
    name, *arguments = words[3:]
    subcommand = main.get_command(click.Context(main), name)
    assert subcommand is not None
    subcommand.make_context(name, list(arguments), parent=click.Context(main, **main.context_settings))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_toml_that_ships_is_a_whole_config(path: Path) -> None:
    config = load_config(path)
    assert isinstance(check_config(config), RunConfig)
    for part in (config.model.path, config.data.path, config.data.eval_path):
        assert part is None or ":" in part or Path(part).exists() or Path(part) in MADE, part


def test_the_guide_names_the_same_examples_and_commands() -> None:
    guide = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[([^\]]+)\].*\| (?:`([^`]+)`|[^|]*) \| [^|]+ \|$", TABLE, re.MULTILINE)
    assert len(rows) == 11
    for name, shown in rows:
        assert f"| `{name}" in guide
        assert f"`{shown}`" in guide or not shown, shown
