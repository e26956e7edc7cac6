from __future__ import annotations

import math
from typing import Any

import pytest

from tests.records.sinks.steps import closed, update
from tests.support.stored import acted
from troupe.messages import GroupClosed, Incident, Slot
from troupe.records.sinks.digest import Digest, samples_of
from troupe.records.text import prompt_text


def test_a_step_has_what_its_groups_say_one_by_one() -> None:
    digest = Digest(samples=2, every=1)
    assert digest.add(closed(1, texts=("a", "b", "c"), rewards=(0.5, None, 1.0))) is None
    assert digest.add(closed(1, texts=("d",), rewards=(math.inf,), place=1)) is None
    assert digest.add(GroupClosed(gid=7, slot=Slot(step=0, place=2), state="stale", version=1)) is None
    assert digest.add(Incident(actor="scorer", kind="odd", message="late")) is None
    told = digest.add(update(1, loss=0.5))
    assert told is not None
    assert (told.step, told.metrics) == (1, {"loss": 0.5})
    assert told.rewards == (0.5, 1.0)
    assert told.lengths == (1, 2, 3, 1)
    assert [sample.text for sample in told.samples] == ["d", "b"]  # b has no score at all
    following = digest.add(update(2))
    assert following is not None
    assert (following.rewards, following.lengths, following.samples) == ((), (), ())


@pytest.mark.parametrize(
    ("rewards", "kept"),
    [
        ((0.5, 0.5, 0.5), True),
        ((-3.0, 0.0, 1e6), True),
        ((0.0, 1e300), True),
        ((1e-320, 0.0), True),
        ((1e39, 1e39), False),
        ((1e16, 1e16 + 2), False),
        ((1e308, -1e308), False),
    ],
)
def test_rewards_of_which_no_histogram_can_be_made_are_left_out(rewards: tuple[float, ...], kept: bool) -> None:
    digest = Digest()
    digest.add(closed(1, texts=tuple("abc"[: len(rewards)]), rewards=rewards))
    told = digest.add(update(1))
    assert told is not None
    assert told.rewards == (rewards if kept else ())
    assert len(told.lengths) == len(rewards)


def test_samples_go_from_the_best_to_the_worst() -> None:
    for most, expected in ((1, "e"), (2, "ea"), (3, "eca"), (5, "edcba"), (9, "edcba"), (0, "")):
        digest = Digest(samples=most, every=1)
        digest.add(closed(1, texts=tuple("abcde"), rewards=(0.0, 0.1, 0.2, 0.3, 0.4)))
        told = digest.add(update(1))
        assert told is not None
        assert "".join(sample.text for sample in told.samples) == expected


def test_texts_come_with_the_first_step_and_then_now_and_then() -> None:
    digest = Digest(samples=1, every=4)
    with_texts = []
    for step in range(1, 13):
        digest.add(closed(step))
        told = digest.add(update(step))
        assert told is not None
        if told.samples:
            with_texts.append(step)
    assert with_texts == [1, 4, 8, 12]


def test_a_step_that_was_told_is_not_told_again_nor_are_its_groups() -> None:
    digest = Digest(newest=2)
    digest.add(closed(2, texts=("old",)))
    assert digest.add(update(2)) is None
    digest.add(closed(3, texts=("one", "two")))
    told = digest.add(update(3))
    assert told is not None
    assert told.lengths == (1, 2)
    assert digest.add(update(3)) is None
    assert digest.newest == 3


def test_conversations_are_lines() -> None:
    assert prompt_text("plain") == "plain"
    turns: list[dict[str, Any]] = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    assert prompt_text(turns) == 'system: Be kind.\nuser: [{"type":"text","text":"hi"}]'
    [sample] = samples_of(closed(1, texts=("x",), prompt=[{"role": "user"}]))
    assert sample.prompt == "user: null"
    assert sample.scores == {"exact": 1.0}


def test_what_was_said_in_an_episode_is_its_text() -> None:
    digest = Digest(samples=1, every=1)
    digest.add(acted(1, 0))
    told = digest.add(update(1))
    assert told is not None
    assert told.lengths == (81, 50, 23, 11)  # what tools answered is none of the policy's tokens
    [best] = told.samples
    assert best.text.startswith("── turn 1 · 11 tokens · 5 read · 1.45 s\n")
    assert best.text.endswith("**1027**.")
    assert (best.tokens, best.prompt[:7]) == (81, "system:")
