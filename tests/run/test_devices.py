"""Which cards ranks and generators have."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from troupe import RunConfig, load_config
from troupe.actors.schedule import ScheduleConfig
from troupe.errors import ConfigError
from troupe.run.devices import Cards, check_ranks, shared_out


@pytest.mark.parametrize(
    ("settings", "lanes", "cards", "expected"),
    [
        ({}, 1, "01", None),
        ({}, 2, "0", None),
        ({"learner_ranks": 1}, 4, "01", None),
        ({}, 2, "01", Cards(("0", "1"), ("0", "1"))),
        ({}, 8, "012", Cards(("0", "1"), ("2",))),
        ({}, 2, "0123", Cards(("0", "1"), ("2", "3"))),
        ({}, 8, "67", Cards(("6", "7"), ("6", "7"))),
        ({"devices": ("0:learner", "1:generator")}, 1, "67", Cards(("6",), ("7",))),
        ({"devices": ("1: learner, generator", "0:learner")}, 2, "67", Cards(("7", "6"), ("7",))),
        ({"devices": ("1:learner",)}, 1, "67", Cards(("7",), ("7",))),
        ({"devices": ("0:learner", "1:learner"), "learner_ranks": 2}, 2, "", None),
    ],
)
def test_cards_are_shared_out(settings: dict[str, Any], lanes: int, cards: str, expected: Cards | None) -> None:
    assert shared_out(ScheduleConfig(**settings), lanes, tuple(cards)) == expected


def test_each_process_sees_its_card() -> None:
    cards = Cards(("2", "3"), ("4", "5"))
    assert cards.of_rank(1) == {"CUDA_VISIBLE_DEVICES": "3"}
    assert [cards.of_generator(number)["CUDA_VISIBLE_DEVICES"] for number in range(3)] == ["4", "5", "4"]


@pytest.mark.parametrize(
    ("settings", "lanes", "message"),
    [
        ({"learner_ranks": 4}, 4, r"learner_ranks is 4, but there are 2 cards for the learner \(2 are seen"),
        ({"devices": ("0:learner", "2:generator")}, 2, "'2:generator', but only 2 cards are seen here"),
        ({"devices": ("0:learner", "1:lerner")}, 2, "has '1:lerner'; write it as '0:learner,generator'"),
        ({"devices": ("cuda:learner",)}, 2, "has 'cuda:learner'; write it as"),
        ({"devices": ("0:generator",)}, 2, "name a card for the learner, and each once"),
        ({"devices": ("0:learner", "0:learner")}, 2, "name a card for the learner, and each once"),
        ({"devices": ("0:learner", "1:learner")}, 1, "gives the learner 2 cards, but learner.lanes is 1"),
    ],
)
def test_cards_that_cannot_be_had_are_refused(settings: dict[str, Any], lanes: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shared_out(ScheduleConfig(**settings), lanes, ("0", "1"))


@pytest.mark.parametrize(
    ("lanes", "ranks", "message"),
    [
        (64, None, "lanes is 64, but a batch has only 32 rows"),
        (2, 4, r"learner_ranks is 4, .* of which there are 2 \(learner.lanes\)"),
        (8, 3, "give a power of two"),
    ],
)
def test_ranks_that_do_not_fit_the_lanes_are_refused(lanes: int, ranks: int | None, message: str) -> None:
    config: RunConfig = load_config(None, [{"learner": {"lanes": lanes, "batch_size": 4}}])
    schedule = msgspec.structs.replace(config.schedule, learner_ranks=ranks)
    with pytest.raises(ConfigError, match=message):
        check_ranks(msgspec.structs.replace(config, schedule=schedule))
