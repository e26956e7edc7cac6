"""`troupe inspect OUT --rows`: what became of each row of the dataset."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from troupe.cli.blocks import Block, print_blocks
from troupe.dataset import CurriculumConfig
from troupe.dataset.pools import POOLS
from troupe.errors import ConfigError, InputError
from troupe.messages import PromptText
from troupe.records.layout import RUN_TOML
from troupe.records.store.read import StoredRun
from troupe.records.store.rows import RowStory
from troupe.records.text import MISSING, prompt_text
from troupe.runtime.files import read_toml
from troupe.runtime.terminal import tell_json

RowOrder = Literal["pass-rate", "row", "groups", "reward", "length", "gain", "step"]
_MOST_SHOWN = 20
_MOST_OF_A_PROMPT = 48
_HEAD = (
    "row", "pool", "groups", "pass rate", "first", "newest", "reward", "tokens", "no signal", "steps", "prompt"
)  # fmt: skip


def _gain(story: RowStory) -> float | None:
    if story.first_pass_rate is None or story.newest_pass_rate is None:
        return None
    return story.newest_pass_rate - story.first_pass_rate


_ORDERS: dict[RowOrder, Callable[[RowStory], float | None]] = {
    "pass-rate": lambda story: story.pass_rate,
    "row": lambda story: story.row,
    "groups": lambda story: -story.groups,
    "reward": lambda story: story.reward,
    "length": lambda story: -story.mean_length,
    "gain": _gain,
    "step": lambda story: -story.newest_step,
}


def tell_rows(
    run: StoredRun, folder: Path, *, reward: str | None, order: RowOrder, limit: int | None, as_json: bool
) -> None:
    """Print what became of the rows: JSON lines of all or of so many, or a table. `reward`: the score to look at; None:
    what the run's curriculum looks at. InputError for a reward that the run does not have."""
    names = run.reward_names()
    if reward is not None and names and reward not in names:
        raise InputError(f"--reward {reward}: the run has no such reward; it has {', '.join(names)}")
    config = _settings(folder, reward)
    stories = sorted(run.rows(config), key=lambda story: _place(_ORDERS[order](story), story.row))
    prompts = run.prompts_of_rows()
    if as_json:
        for story in stories[:limit]:
            tell_json(msgspec.json.encode(_fields(story) | {"prompt": prompts.get(story.row)}).decode())
        return
    print_blocks(show_rows(stories, prompts, limit or _MOST_SHOWN, config.reward))


def show_rows(
    stories: Sequence[RowStory], prompts: dict[int, PromptText | None], most: int, reward: str | None
) -> Iterator[Block]:
    """How many rows are in which pool, and the first so many of them."""
    if not stories:
        yield Block(title="no group has ended yet")
        return
    pools = Counter(story.pool for story in stories)
    there = ", ".join(f"{pools[pool]} {pool}" for pool in POOLS if pools[pool])
    by = f", by {reward}" if reward else ""
    lines = [_line(story, prompts.get(story.row)) for story in stories[:most]]
    yield Block(title=f"{len(stories)} rows were seen: {there}{by}", rows=[_HEAD, *lines])
    if (left := len(stories) - most) > 0:
        yield Block(title=f"{left} more: ask for them (--limit K, --sort ORDER), or for all (--json)")


def _line(story: RowStory, prompt: PromptText | None) -> tuple[str, ...]:
    text = " ".join((prompt_text(prompt) or MISSING).split())
    if len(text) > _MOST_OF_A_PROMPT:
        text = f"{text[: _MOST_OF_A_PROMPT - 1]}…"
    steps = f"{story.first_step}–{story.newest_step}" if story.groups > 1 else str(story.first_step)
    return (
        str(story.row), story.pool, str(story.groups), _share(story.pass_rate), _share(story.first_pass_rate),
        _share(story.newest_pass_rate), MISSING if story.reward is None else f"{story.reward:.3f}",
        f"{story.mean_length:.0f}", _share(story.without_signal), steps, text,
    )  # fmt: skip


def _share(value: float | None) -> str:
    return MISSING if value is None else f"{value:.0%}"


def _fields(story: RowStory) -> dict[str, Any]:
    fields: dict[str, Any] = msgspec.to_builtins(story)
    return fields


def _place(value: float | None, row: int) -> tuple[bool, float, int]:
    return value is None, value or 0.0, row


def _settings(folder: Path, reward: str | None) -> CurriculumConfig:
    """What the run's curriculum asks of a row; the defaults where it is not known."""
    try:
        config = msgspec.convert(read_toml(folder / RUN_TOML).get("curriculum", {}), CurriculumConfig)
    except (ConfigError, msgspec.ValidationError):
        config = CurriculumConfig()
    return config if reward is None else msgspec.structs.replace(config, reward=reward)
