"""The documents say what is so: commands work, settings, names and messages exist, links lead somewhere."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shlex
import shutil
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import mlx.core as mx
import msgspec
import pytest

import troupe
from tests.support.documents import (
    PAGES,
    README,
    ROOT,
    Block,
    Shell,
    anchors,
    blocks,
    commands,
    inline_code,
    links,
    message_texts,
    prose,
)
from tests.support.tiny import CONFIG, TEMPLATE, write_tiny_model
from troupe.cli.main import main
from troupe.run.config import known_keys

ALL = [README, *PAGES, ROOT / "examples" / "README.md"]
BLOCKS = blocks(*ALL)
SECTIONS = {key.partition(".")[0] for key in known_keys() if "." in key}
MOST_NOT_RUN = 12


def named(path: object) -> str:
    return path.name if isinstance(path, Path) else str(path)


def identified(block: Block) -> str:
    return f"{block.page.name}:{block.text.splitlines()[0][:40] if block.text else ''}"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["config_reference", "cli_reference", "alias_tables", "fits_table"])
def test_what_is_generated_is_up_to_date(name: str) -> None:
    if name == "fits_table" and mx.cuda.is_available():
        pytest.skip("the page has the table of Apple's GPU")
    module = script(name)
    assert module.PAGE.read_text(encoding="utf-8") == module.reference(), f"run: python -m scripts.{name}"


def test_every_key_of_the_configuration_has_a_meaning() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    keys = re.findall(r"^\| `([^`]+)`<br>.* \| (.*) \|$", page, re.MULTILINE)
    # those of tables in a list, such as schedule.engines.url, stand below the key of the list
    assert sorted(key for key, _ in keys if key.rpartition(".")[0] not in known_keys()) == sorted(known_keys())
    assert [key for key, meaning in keys if not meaning.strip()] == []


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.kind == "toml"], ids=identified)
def test_every_toml_block_is_a_configuration(block: Block, tmp_path: Path) -> None:
    table = tomllib.loads(block.text)
    if block.mark == "fragment":
        return
    assert table
    file = tmp_path / "run.toml"
    file.write_text(block.text, encoding="utf-8")
    troupe.load_config(file)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.kind == "python"], ids=identified)
def test_every_python_block_compiles(block: Block) -> None:
    compile(block.text, block.title or block.page.name, "exec")


@pytest.mark.parametrize("page", ALL, ids=named)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_a_page_links_to_no_place_that_the_site_does_not_have(page: Path) -> None:
    assert [target for target in links(page) if target.startswith("..")] == []


@pytest.mark.parametrize("page", ALL, ids=named)
def test_every_key_that_is_named_exists(page: Path) -> None:
    known = set(known_keys())
    for code in inline_code(page):
        match = re.match(r"(?:--set |--allow-change )?((\w+)\.(\w+))\b(?![.:(/])", code)
        if match and match[2] in SECTIONS and match[3] not in ("py", "md", "jsonl", "log", "NAME", "KEY", "key"):
            is_name = match[2] == "rewards" and "=" in code  # rewards.NAME=…, to exchange it
            assert match[1] in known or is_name or is_attribute(match[1]), f"{page.name}: {code}"


def is_attribute(name: str) -> bool:
    """Whether a room of the package has it: `rewards.batch_reward`, say."""
    room, _, attribute = name.partition(".")
    return hasattr(getattr(troupe, room, None), attribute)


def shown_commands() -> list[tuple[str, str]]:
    found = [(b.page.name, c) for b in BLOCKS if b.is_shell for c in commands(b) if c.startswith("troupe ")]
    return found + [(page.name, code) for page in ALL for code in inline_code(page) if code.startswith("troupe ")]


@pytest.mark.parametrize(("page", "command"), sorted(set(shown_commands())))
def test_every_command_that_is_shown_exists_with_its_options(page: str, command: str) -> None:
    words = shlex.split(command.partition(" > ")[0])
    if words[1].startswith("-") or words[1] == "COMMAND":
        return
    subcommand = main.get_command(click.Context(main), words[1])
    assert subcommand is not None
    known = {name for param in subcommand.params for name in (*param.opts, *param.secondary_opts)} | {"--help"}
    for word in words[2:]:
        if re.match(r"--?[a-zA-Z]", word):
            assert word.partition("=")[0].strip("[]") in known, command


def test_the_blocks_that_are_not_run_say_why_and_are_few() -> None:
    marked = [b for b in BLOCKS if b.mark.startswith("not run")]
    assert all(len(b.why_not_run or "") >= 10 for b in marked)
    assert len(marked) <= MOST_NOT_RUN


@pytest.mark.parametrize("name", sorted(troupe.__all__))
def test_every_public_name_is_documented(name: str) -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert f"\n::: troupe.{name}\n" in page
    assert inspect.getdoc(getattr(troupe, name))


def test_everything_that_the_reference_of_python_names_exists() -> None:
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for path in re.findall(r"^::: (\S+)$", page, re.MULTILINE):
        found: Any = troupe
        for part in path.split(".")[1:]:
            found = getattr(found, part)
        assert inspect.getdoc(found), path


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_page_is_in_the_navigation(page: Path) -> None:
    assert re.search(rf": {re.escape(page.name)}$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)


def options_of_others() -> list[list[str]]:
    """[theirs, ours, what differs] of the tables in coming-from-trl.md, in their sections' order."""
    text = (ROOT / "docs" / "coming-from-trl.md").read_text(encoding="utf-8")
    return [line.strip("|").split("|") for line in text.splitlines() if re.match(r"\| [`-]", line)]


def test_every_name_of_ours_in_the_tables_of_options_exists() -> None:
    known = set(known_keys()) | {name for param in main.load_all()["train"].params for name in param.opts}
    known |= {"sqlite", "…"}
    rows = options_of_others()
    assert len(rows) > 60
    for _, ours, _ in rows:
        for name in re.findall(r"`([^`]+)`", ours):
            assert name in known, name


def test_every_name_of_trls_in_the_table_of_options_exists() -> None:
    trl = pytest.importorskip("trl")
    known = set(trl.GRPOConfig.__dataclass_fields__) | set(inspect.signature(trl.GRPOTrainer).parameters)
    text = (ROOT / "docs" / "coming-from-trl.md").read_text(encoding="utf-8").partition("## From mlx-lm-lora")[0]
    for row in re.findall(r"^\| (`.+?) \|", text, re.MULTILINE):
        assert set(re.findall(r"`([^`]+)`", row)) <= known


def test_every_message_in_troubleshooting_is_one_of_ours() -> None:
    corpus = "\0".join(" ".join(text.split()) for text in message_texts())
    for block in blocks(ROOT / "docs" / "troubleshooting.md"):
        for line in block.text.splitlines():
            words = line.split()
            ours = {
                place
                for start in range(len(words) - 2)
                if " ".join(words[start : start + 3]) in corpus
                for place in range(start, start + 3)
            }
            fixed = [word for word in words if not re.search(r"[\d…/]", word)]  # figures and paths are of the moment
            assert len(ours) >= 0.5 * len(fixed), line


def test_the_pages_are_short_enough_to_be_read() -> None:
    generated = {"configuration.md", "cli.md", "design.md"}
    for page in PAGES:
        if page.name not in generated:
            assert len(page.read_text(encoding="utf-8").splitlines()) <= 220, page.name
            assert all(len(line) <= 200 or line.startswith(("|", "troupe ")) for line in prose(page).splitlines())


def runnable(page: Path) -> list[Block]:
    return [b for b in blocks(page) if b.is_shell and b.why_not_run is None]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What stands for a real model in the documents."""
    larger = msgspec.structs.replace(CONFIG, max_position_embeddings=256)
    folder = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", larger)
    thinks = TEMPLATE + "{% if enable_thinking is defined and not enable_thinking %}{% endif %}"
    (folder / "chat_template.jinja").write_text(thinks, encoding="utf-8")
    return folder


def run_all(together: list[str], folder: Path, model: Path, *pages: Path) -> None:
    """Run commands in a folder that has the files of some pages and a model."""
    for block in blocks(*pages):
        if block.file_name is not None:
            (folder / block.file_name).write_text(block.text, encoding="utf-8")
    shutil.copytree(model, folder / "models" / "Qwen3-0.6B")
    with Shell(folder) as shell:
        for command in together:
            shell.run(command)
        shell.finish()


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=named)
def test_the_commands_of_a_page_work_in_the_order_shown(page: Path, tmp_path: Path, model: Path) -> None:
    run_all([command for block in runnable(page) for command in commands(block)], tmp_path, model, README, page)


@pytest.mark.slow
def test_the_readmes_commands_for_several_terminals_work(tmp_path: Path, model: Path) -> None:
    together = [command for block in blocks(README) if block.kind == "sh" for command in commands(block)]
    assert together
    run_all(together, tmp_path, model, README)


@pytest.mark.skipif(sys.platform == "win32", reason="no such shell")
def test_the_extras_that_the_documents_name_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for page in ALL:
        text = page.read_text(encoding="utf-8")
        for names in re.findall(r"'\.\[([\w,-]+)\]'", text):
            assert set(names.split(",")) <= set(extras), f"{page.name}: {names}"
        assert "troupe[" not in text, f"{page.name}: Troupe is installed from its clone, and others have its name"
        for names in re.findall(r"\./setup\.sh((?: \w+)+)", text):
            assert set(names.split()) <= set(extras), f"{page.name}: {names}"
