"""Looking for completions: every condition and order against going through all of them, piece by piece."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.many import make_many
from tests.support.stored import rows
from troupe.records.layout import STORE
from troupe.records.store.completions import Key, Query
from troupe.records.store.read import StoredRun, open_store

Told = dict[str, Any]

ORDERS: dict[str, tuple[str, bool]] = {
    "all": ("step", False),
    "newest": ("step", True),
    "best": ("reward", True),
    "worst": ("reward", False),
    "longest": ("tokens", True),
    "shortest": ("tokens", False),
    "highest advantage": ("advantage", True),
    "lowest advantage": ("advantage", False),
}
CONDITIONS: dict[str, Callable[[Told, Any], bool]] = {
    "step": lambda one, x: one["step"] == x,
    "first_step": lambda one, x: one["step"] >= x,
    "last_step": lambda one, x: one["step"] <= x,
    "gid": lambda one, x: one["gid"] == x,
    "row": lambda one, x: one["row"] == x,
    "state": lambda one, x: one["state"] == x,
    "finish_reason": lambda one, x: one["finish_reason"] == x,
    "least": lambda one, x: one["looked at"] is not None and one["looked at"] >= x,
    "most": lambda one, x: one["looked at"] is not None and one["looked at"] <= x,
    "text": lambda one, x: x.casefold() in one["text"].casefold(),
    "prompt": lambda one, x: x.casefold() in one["prompt"].casefold(),
}
VALUES: dict[str, list[Any]] = {
    "step": [3, 99],
    "first_step": [10],
    "last_step": [12],
    "gid": [7],
    "row": [5, 96],
    "state": ["trained", "filtered", "quarantined"],
    "finish_reason": ["length"],
    "least": [0.0, 0.4],
    "most": [0.9, 0.0],
    "text": ["GRÜSSE", "100% 7", "r_s", "%"],
    "prompt": ['say "so"', "is 5 ", "100"],
}


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Told]]:
    folder = tmp_path_factory.mktemp("many")
    return folder, make_many(folder, 800, letters=12)


@pytest.fixture(params=["as it is", "of an older version"])
def run(request: pytest.FixtureRequest, many: tuple[Path, list[Told]], tmp_path: Path) -> Iterator[StoredRun]:
    """Stores of older versions have no index of all that is looked for."""
    (tmp_path / STORE).write_bytes((many[0] / STORE).read_bytes())
    if request.param != "as it is":
        rows(tmp_path / STORE, "DROP INDEX completions_by_step")
        rows(tmp_path / STORE, "CREATE INDEX completions_by_step ON completions (step)")
        rows(tmp_path / STORE, "DROP INDEX groups_by_row")
    with open_store(tmp_path) as opened:
        yield opened


def looked_for(told: list[Told], query: dict[str, Any]) -> list[tuple[int, int]]:
    """What going through all finds."""
    name, falls = ORDERS[query.get("choice", "all")]
    score = query.get("reward") or "reward"
    told = [{**one, "looked at": one[score]} for one in told]
    name = "looked at" if name == "reward" else name
    holding = [
        one
        for one in told
        if one[name] is not None and all(CONDITIONS[key](one, x) for key, x in query.items() if key in CONDITIONS)
    ]
    holding.sort(key=lambda one: (-one[name] if falls else one[name], one["gid"], one["sample"]))
    return [(one["gid"], one["sample"]) for one in holding]


def queries(count: int) -> Iterator[dict[str, Any]]:
    drawn = random.Random(7)
    for _ in range(count):
        names = drawn.sample(sorted(CONDITIONS), drawn.choice((0, 1, 1, 2, 3)))
        query: dict[str, Any] = {name: drawn.choice(VALUES[name]) for name in names}
        query["choice"] = drawn.choice(sorted(ORDERS))
        yield query | ({"reward": "other"} if drawn.randrange(4) == 0 else {})


def test_what_is_found_is_what_going_through_all_finds(run: StoredRun, many: tuple[Path, list[Told]]) -> None:
    seen = 0
    for number, asked in enumerate(queries(60)):
        expected = looked_for(many[1], asked)
        query = Query(**asked)
        assert [(one.gid, one.sample) for one in run.completions(query)] == expected, asked
        assert run.count(query) == len(expected), asked
        after: Key | None = None
        pieces: list[tuple[int, int]] = []
        for _ in range(1000):
            piece = run.piece(query, 37, after, patience_s=0.0 if number % 10 == 0 else 9.0)
            pieces += [(key.gid, key.sample) for key in piece.keys]
            if (after := piece.after) is None:
                break
        assert after is None
        assert pieces == expected, asked
        seen += len(expected)
    assert seen > 2000


def test_one_piece_takes_no_longer_than_who_asks_will_wait(many: tuple[Path, list[Told]]) -> None:
    with open_store(many[0]) as run:
        piece = run.piece(Query(text="is nowhere"), 50, patience_s=0.0)
        assert piece.keys == ()
        assert piece.after is not None, "there is something to go on after"
        assert run.piece(Query(text="is nowhere"), 50, patience_s=60.0).after is None


def test_a_piece_by_lot_is_the_only_one(run: StoredRun) -> None:
    piece = run.piece(Query(choice="random", least=0.4), 9)
    assert (len(piece.keys), piece.after) == (9, None)
    assert run.count(Query(choice="random", least=0.4)) > 9


@pytest.mark.slow
@pytest.mark.alone
def test_a_hundred_thousand_completions_stay_quick(tmp_path: Path) -> None:
    """A piece of them is found by the index alone; the limit is many times what it takes."""
    make_many(tmp_path, 100_000, letters=300)
    asked: list[dict[str, Any]] = [{"choice": choice} for choice in ORDERS]
    conditions = {"least": 0.5}, {"row": 5}, {"first_step": 900, "last_step": 1000}, {"state": "filtered"}
    asked += [{"choice": "best", **condition} for condition in conditions]
    with open_store(tmp_path) as run:
        for query in [*asked, {"text": "is nowhere"}, {"prompt": "is 5 "}]:
            took_s = min(_seconds(run, Query(**query)) for _ in range(3))
            assert took_s < 0.5, query


def _seconds(run: StoredRun, query: Query) -> float:
    began_s = time.perf_counter()
    piece = run.piece(query, 50)
    list(run.load(piece.keys))
    return time.perf_counter() - began_s
