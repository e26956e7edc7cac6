"""Which rows come next, by what came of them: what holds whatever that was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from troupe.dataset import CurriculumConfig, PromptDataset
from troupe.dataset.curriculum import pass_rate, pool_of
from troupe.dataset.pools import Pools
from troupe.messages import RowRecord

CONFIG = CurriculumConfig(enabled=True, window=2, retire_at=0.9, retire_after=2, revisit_every=4)
RATES = st.sampled_from([None, 0.0, 0.25, 0.5, 0.75, 1.0])


def pools(rows: int, config: CurriculumConfig = CONFIG, *, shuffle: bool = True) -> Pools:
    dataset = PromptDataset.from_rows([{"prompt": f"p{i}"} for i in range(rows)])
    return Pools(dataset.order(7, 0, shuffle=shuffle), config, seed=7, shuffle=shuffle)


def config(**changes: Any) -> CurriculumConfig:
    return msgspec.structs.replace(CONFIG, **changes)


def go_through(of: Pools, steps: int, rates: dict[int, float], *, size: int = 4, first: int = 0) -> list[list[int]]:
    """Steps in which every row has a pass rate of its own."""
    shown = []
    for step in range(first, first + steps):
        of.recall(step)
        rows = of.draw(size, step)
        for row in rows:
            of.record(row, rates.get(row, 0.5), step)
        shown.append(rows)
    return shown


@pytest.mark.parametrize(
    ("scores", "passes_from", "expected"),
    [
        ([1.0, 0.0, 1.0, 0.5], 1.0, 0.5),
        ([1.0, None, 0.2], 0.5, 0.5),
        ([1.5, -1.0, 0.25, 0.25], None, 0.375),
        ([None, None], None, None),
    ],
)
def test_a_pass_rate_is_of_the_scores_that_are_there(
    scores: Sequence[float | None], passes_from: float | None, expected: float | None
) -> None:
    assert pass_rate(scores, passes_from) == expected


def test_a_rows_pool_follows_from_its_newest_groups() -> None:
    assert pool_of([], 0, CONFIG) == "normal"
    assert pool_of([1.0], 1, CONFIG) == "easy", "seen once only"
    assert pool_of([1.0, 0.8], 2, CONFIG) == "retired"
    assert pool_of([1.0, 0.7], 2, CONFIG) == "easy"
    assert pool_of([0.0, 1.0, 0.4], 3, CONFIG) == "normal", "the mean of the newest two"
    assert pool_of([0.4, 0.0], 2, CONFIG) == "hard"


@given(st.integers(1, 12), st.integers(1, 6), st.lists(RATES, min_size=1, max_size=40), st.booleans())
def test_the_state_is_all_that_a_choice_follows_from(
    rows: int, size: int, rates: list[float | None], shuffle: bool
) -> None:
    """Steps, of which the first is under way when a checkpoint is cut, and so is a row of replacements."""
    there, step = pools(rows, shuffle=shuffle), 0
    under_way = there.draw(size, 0)
    for step, rate in enumerate(rates, 1):
        there.recall(step)
        following = there.draw(size, step)
        others = there.replacements(size, step, set(following))
        for row in under_way:
            there.record(row, rate, step)
        there.record(others[0], 0.5, step)
        under_way = following
    again = pools(rows, shuffle=shuffle)
    records = sorted(there.records.values(), key=lambda record: record.row)
    again.restore(records, there.away, dict(there.turns))
    assert again.counts == there.counts
    for later in range(step + 1, step + 6):
        for which in (there, again):
            which.recall(later)
        drawn = there.draw(size, later)
        assert drawn == again.draw(size, later)
        assert there.replacements(9, later, set(drawn)) == again.replacements(9, later, set(drawn))
        for which in (there, again):
            for row in drawn:
                which.record(row, 0.75, later)


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 2**31))
def test_a_step_has_a_row_twice_only_where_there_are_too_few(rows: int, size: int, step: int) -> None:
    there = pools(rows)
    drawn = there.draw(size, step)
    others = there.replacements(2 * size, step, set(drawn))
    assert max(Counter(drawn).values()) <= -(-size // rows)
    fresh = others[: max(0, rows - size)]
    assert len(set(fresh)) == len(fresh)
    assert not set(fresh) & set(drawn)


def test_rows_never_seen_come_in_the_order_of_the_first_epoch_and_none_is_left_out() -> None:
    there = pools(10)
    first = [row for step in go_through(there, 5, {}, size=2) for row in step]
    assert first == PromptDataset.from_rows([{"prompt": f"p{i}"} for i in range(10)]).order(7, 0)
    later = [row for step in go_through(there, 15, {}, size=2, first=5) for row in step]
    for walk in range(3):
        assert sorted(later[10 * walk : 10 * walk + 10]) == list(range(10)), "each walk has every row"
    assert later[:10] != later[10:20]


def test_an_easy_row_is_drawn_as_often_as_it_weighs() -> None:
    there = pools(200, config(easy_weight=0.25, hard_weight=0.5, retire_at=None, revisit_every=None))
    rates = {row: (1.0, 0.5, 0.0, 0.5)[row % 4] for row in range(200)}
    go_through(there, 50, rates)  # all are known then
    times = Counter(rates[row] for step in go_through(there, 1500, rates, first=50) for row in step)
    normal = times[0.5] / 100
    assert times[1.0] / 50 / normal == pytest.approx(0.25, rel=0.1)
    assert times[0.0] / 50 / normal == pytest.approx(0.5, rel=0.1)


def test_what_is_mastered_is_drawn_no_more_and_comes_back_when_it_should() -> None:
    there = pools(8, config(revisit_every=None))
    mastered = dict.fromkeys(range(6), 1.0)
    go_through(there, 60, mastered, size=2)
    assert (there.counts["retired"], there.counts["normal"]) == (6, 2)
    assert {row for step in go_through(there, 20, mastered, size=2, first=60) for row in step} == {6, 7}
    back = pools(8)
    go_through(back, 60, mastered, size=2)
    shown = [row for step in go_through(back, 30, mastered, size=2, first=60) for row in step]
    assert set(shown) == set(range(8))


def test_rows_come_back_when_none_is_to_be_retired_any_more() -> None:
    before = pools(8, config(revisit_every=None))
    go_through(before, 60, dict.fromkeys(range(6), 1.0), size=2)
    there = pools(8, config(revisit_every=None, retire_at=None))
    there.restore(before.records.values(), before.away, before.turns)
    there.recall(60)
    assert (there.counts["retired"], there.counts["easy"]) == (0, 6)


def test_where_all_is_mastered_the_rows_of_the_lowest_pass_rates_come() -> None:
    there = pools(5, config(revisit_every=None, retire_at=0.5))
    rates = {0: 0.9, 1: 0.6, 2: 1.0, 3: 0.7, 4: 0.8}
    go_through(there, 40, rates, size=1)
    assert there.counts["retired"] == 5
    assert there.draw(2, 40) == [1, 3]


def test_a_pool_that_weighs_nothing_is_drawn_from_where_there_are_no_others() -> None:
    there = pools(4, config(easy_weight=0.0, retire_at=None, revisit_every=None))
    rates = {0: 1.0, 1: 1.0, 2: 0.5, 3: 0.5}
    go_through(there, 2, rates, size=2)
    assert {row for step in go_through(there, 20, rates, size=1, first=2) for row in step} == {2, 3}
    assert set(there.draw(3, 99)) > {2, 3}


def test_rows_under_way_are_not_drawn_again() -> None:
    there = pools(6)
    first, second = there.draw(3, 0), there.draw(3, 1)
    assert not set(first) & set(second)
    assert not set(there.replacements(3, 2, ())) - set(range(6)), "all are under way: any will do"


def test_a_group_without_scores_says_nothing_of_its_row() -> None:
    there = pools(2)
    (row,) = there.draw(1, 0)
    there.record(row, None, 0)
    assert there.records[row] == RowRecord(row=row, pool="normal", turn=1, visits=0, rates=(), step=0)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"easy_threshold": 0.2, "hard_threshold": 0.2}, "must be below curriculum.easy_threshold"),
        ({"retire_at": None, "revisit_every": 3}, "curriculum.revisit_every needs curriculum.retire_at"),
        ({"retire_at": None, "stop_when_retired": True}, "curriculum.stop_when_retired needs"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        CurriculumConfig(enabled=True, **changes)
