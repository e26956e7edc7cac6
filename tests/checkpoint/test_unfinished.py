"""Groups under way: what comes back, and what a reward's remarks cannot spoil."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.checkpoint.checkpoints import under_way, without_prompts
from tests.support.fakes import make_scored
from troupe.checkpoint.read import read_unfinished
from troupe.checkpoint.write import encode_unfinished
from troupe.errors import CheckpointError
from troupe.messages import Unfinished
from troupe.rewards.extras import DEEPEST, RewardLog


def through(tmp_path: Path, unfinished: Unfinished) -> Unfinished:
    (tmp_path / "unfinished.msgpack").write_bytes(encode_unfinished(unfinished))
    return read_unfinished(tmp_path / "unfinished.msgpack")


def test_everything_comes_back_but_the_prompts_text(tmp_path: Path) -> None:
    unfinished = under_way()
    loaded = through(tmp_path, unfinished)
    assert loaded == without_prompts(unfinished)
    prompt, before = loaded.scored[0].group.prompt, unfinished.scored[0].group.prompt
    assert (prompt.gid, prompt.slot, prompt.row, prompt.prompt_ids) == (
        before.gid,
        before.slot,
        before.row,
        before.prompt_ids,
    )
    assert through(tmp_path, Unfinished()) == Unfinished()


def test_it_is_plain_msgpack(tmp_path: Path) -> None:
    raw = msgspec.msgpack.decode(encode_unfinished(under_way()))
    assert raw["next"] == 9
    assert raw["scored"][0]["scores"] == {"r": [0.5, None, -1.0]}
    assert raw["scored"][0]["group"]["prompt"]["prompt"] == ""


class Odd:
    def __repr__(self) -> str:
        return "<odd>"


class Worse:
    def __repr__(self) -> str:
        raise ValueError("no words")


class Lazy:
    """As an array that can be read on its own thread only."""

    def __repr__(self) -> str:
        raise RuntimeError("no stream in this thread")


def _nested(depth: int, value: Any = 1) -> Any:
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "comes_back"),
    [
        (Odd(), "<odd>"),
        ({"a": Odd()}, {"a": "<odd>"}),
        ({1: 2}, {"1": 2}),
        (datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC), "2026-01-02 00:00:00+00:00"),
        (Worse(), None),
        (Lazy(), None),
        (2**70, str(2**70)),
        ("\ud800", "\\ud800"),
        (_nested(100_000), _nested(DEEPEST, "…")),
    ],
    ids=["object", "inside", "int key", "time", "no repr", "lazy", "huge", "surrogate", "deep"],
)
def test_whatever_a_reward_logs_the_group_comes_back(tmp_path: Path, value: Any, comes_back: Any) -> None:
    log = RewardLog(2)
    log.log_extra("x", [value, 1])
    group = msgspec.structs.replace(make_scored(1, 0), extra=log.extra)
    [found] = through(tmp_path, Unfinished(scored=(group,))).scored
    assert found.scores == group.scores
    assert found.group.rollouts == group.group.rollouts
    assert found.extra == {"x": (comes_back, 1)}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xff",
        b"\x93\x01\x02\x03",
        msgspec.msgpack.encode({"next": "one"}),
        msgspec.msgpack.encode({"next": 1, "more": 2}),
        msgspec.msgpack.encode({"states": {1: "lost"}}),
        msgspec.msgpack.encode(Unfinished()) + b"\x00",
        b"\x81\xa4next\xa1\xff",
        b"\x91" * 100_000,
    ],
)
def test_garbage_is_refused(tmp_path: Path, data: bytes) -> None:
    file = tmp_path / "unfinished.msgpack"
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"unfinished\.msgpack: the groups under way cannot be read: .*older"):
        read_unfinished(file)


@pytest.mark.parametrize("name", [None, ("a",), "\ud800", 3], ids=str)
def test_names_that_are_no_texts_cost_what_was_logged_and_not_the_group(tmp_path: Path, name: Any) -> None:
    log = RewardLog(1)
    log.log_metric(name, 1.0)
    group = msgspec.structs.replace(make_scored(1, 0), logged=log.metrics)
    [found] = through(tmp_path, Unfinished(collected=(group,))).collected
    assert (found.scores, found.logged) == (group.scores, {"\\ud800": 1.0} if name == "\ud800" else {})
