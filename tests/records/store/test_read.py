"""Reading a store: what is chosen, in which order, while it is written, and what cannot be read."""

from __future__ import annotations

import math
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.support.stored import acted, closed, rows, update
from troupe.errors import InputError, OutputError
from troupe.messages import CheckpointWritten, ClosedState, GroupClosed, Incident
from troupe.records.layout import STORE
from troupe.records.sinks.sqlite import SqliteSink
from troupe.records.store.completions import Query
from troupe.records.store.read import StoredRun, open_store
from troupe.records.trend import stored_rewards

STATES: list[ClosedState] = ["trained", "filtered", "quarantined"]


def closed_group(step: int, place: int) -> GroupClosed:
    scores = [None if (step + place + i) % 4 == 0 else (7 * step + 3 * place + 5 * i) % 11 / 10 for i in range(3)]
    message = closed(step, place, scores, state=STATES[(step + place) % 3])
    assert message.scored is not None
    others = {**message.scored.scores, 'it\'s "odd"': (0.5, -0.5, None)}
    return msgspec.structs.replace(message, scored=msgspec.structs.replace(message.scored, scores=others))


GROUPS = [closed_group(step, place) for step in (1, 2, 3) for place in (0, 1)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    sink = SqliteSink(tmp_path / STORE, program="0.9", log_probs=True, clock=lambda: 50.0)
    sink.open()
    for step in (1, 2, 3):
        for group in GROUPS[2 * step - 2 : 2 * step]:
            sink.write(group)
        metrics = {"reward": step / 4, "rewards/r/mean": math.nan if step == 1 else 0.5, "rewards/r/std": 1.0}
        sink.write(update(step, **metrics))
        sink.write(Incident(actor="scorer", kind="late" if step > 1 else "odd", message="!"))
        sink.write(
            CheckpointWritten(version=step, folder=f"c{step}", bytes=7, seconds=0.5, removed=(1,) if step == 2 else ())
        )
    sink.flush()
    sink.close()
    return tmp_path


@pytest.fixture
def run(folder: Path) -> Iterator[StoredRun]:
    with open_store(folder) as opened:
        yield opened


def values() -> list[tuple[float | None, int, int, int, str]]:
    """(reward, step, gid, sample, state) of all completions."""
    return [
        (reward, group.version, group.gid, sample, group.state)
        for group in GROUPS
        for sample, reward in enumerate(group.rewards)
    ]


def found(run: StoredRun, **query: Any) -> list[tuple[int, int]]:
    asked = Query(**query)
    completions = list(run.completions(asked))
    if asked.choice == "all" and asked.count is None:
        assert run.count(asked) == len(completions)
    return [(c.gid, c.sample) for c in completions]


def test_a_figure_at_few_steps_has_the_ends(tmp_path: Path) -> None:
    sink = SqliteSink(tmp_path / STORE)
    sink.open()
    for step in range(3, 104):
        sink.write(update(step, reward=math.nan if step == 4 else step / 2))
    sink.flush()
    sink.close()
    with open_store(tmp_path) as run:
        assert run.values("reward", 2) == [(3, 1.5), (103, 51.5)]
        assert run.values("reward", 51, up_to=10) == [(step, step / 2) for step in (3, 5, 6, 7, 8, 9, 10)]
        assert len(run.values("reward", 12)) == 11
        assert run.values("reward", 5, up_to=2) == []
        assert run.values("loss", 5) == []


def test_the_overview(run: StoredRun) -> None:
    overview = run.overview()
    assert (overview.steps, overview.newest_step, overview.completions) == (3, 3, 18)
    assert overview.groups == {state: sum(g.state == state for g in GROUPS) for state in sorted(STATES)}
    assert overview.rewards == {"reward": (0.25, 0.75), "rewards/r/mean": (None, 0.5)}
    assert list(overview.incidents.items()) == [("late", 2), ("odd", 1)]
    assert [(c.version, c.folder, c.removed_at_unix_s) for c in overview.checkpoints] == [
        (3, "c3", None),
        (2, "c2", None),
    ]
    [start] = overview.starts
    assert (start.start, start.unix_s, start.pid, start.first_step, start.troupe) == (1, 50.0, os.getpid(), 0, "0.9")
    assert run.step_range() == (1, 3)
    assert run.reward_names() == ["r", 'it\'s "odd"']


def test_a_completion_comes_back_as_it_was_told(run: StoredRun) -> None:
    for completion in run.completions(Query()):
        [group] = [g for g in GROUPS if g.gid == completion.gid]
        assert group.scored is not None
        rollout, prompt = group.scored.group.rollouts[completion.sample], group.scored.group.prompt
        assert (completion.step, completion.state) == (group.version, group.state)
        slot = group.slot
        assert (completion.slot_step, completion.place, completion.attempt) == (slot.step, slot.place, slot.attempt)
        assert (completion.row, completion.epoch) == (prompt.row, prompt.epoch)
        assert (completion.prompt, completion.columns) == (prompt.prompt, prompt.columns)
        assert (completion.text, tuple(completion.token_ids)) == (rollout.text, rollout.token_ids)
        assert completion.versions == [(group.version - 1, len(rollout.token_ids))]
        assert completion.finish_reason == rollout.finish_reason
        assert completion.reward == group.rewards[completion.sample]
        assert completion.advantage == (None if group.advantages is None else group.advantages[completion.sample])
        assert completion.scores == {name: scores[completion.sample] for name, scores in group.scored.scores.items()}
        assert completion.log_probs == pytest.approx(list(rollout.log_probs), abs=1e-6)


def test_best_and_worst_are_those_of_all_with_a_value(run: StoredRun) -> None:
    ranked = sorted((v for v in values() if v[0] is not None), key=lambda v: (v[0] or 0.0, v[2], v[3]))
    assert found(run, choice="worst", count=5) == [v[2:4] for v in ranked[:5]]
    ranked.sort(key=lambda v: (-(v[0] or 0.0), v[2], v[3]))
    assert found(run, choice="best", count=5) == [v[2:4] for v in ranked[:5]]
    assert found(run, choice="best") == [v[2:4] for v in ranked]
    assert found(run, choice="best", step=2) == [v[2:4] for v in ranked if v[1] == 2]


def test_conditions_hold_together(run: StoredRun) -> None:
    everything = values()
    assert found(run) == [v[2:4] for v in everything]
    assert found(run, step=2) == [v[2:4] for v in everything if v[1] == 2]
    assert found(run, gid=GROUPS[3].gid) == [v[2:4] for v in everything if v[2] == GROUPS[3].gid]
    assert found(run, state="filtered") == [v[2:4] for v in everything if v[4] == "filtered"]
    between = [v[2:4] for v in everything if v[0] is not None and 0.4 <= v[0] <= 1.2 and v[4] == "trained"]
    assert between
    assert found(run, least=0.4, most=1.2, state="trained") == between
    assert found(run, count=2) == [v[2:4] for v in everything[:2]]
    assert found(run, step=9) == []


def test_one_score_may_be_looked_at(run: StoredRun) -> None:
    name = 'it\'s "odd"'
    assert found(run, reward=name, most=0.0) == [v[2:4] for v in values() if v[3] == 1]
    assert found(run, reward=name, choice="best", count=6) == [v[2:4] for v in values() if v[3] == 0]
    assert found(run, reward="unknown", least=0.0) == []


def test_random_ones_differ(run: StoredRun) -> None:
    draws = {tuple(found(run, choice="random", count=3)) for _ in range(20)}
    assert len(draws) > 1
    assert all(len(set(draw)) == 3 for draw in draws)


def test_it_reads_what_is_there_while_the_run_writes(tmp_path: Path) -> None:
    sink = SqliteSink(tmp_path / STORE)
    sink.open()
    with open_store(tmp_path) as run:
        empty = run.overview()
        assert (empty.steps, empty.newest_step, empty.rewards, empty.groups) == (0, None, {}, {})
        assert run.reward_names() == []
        for step in (1, 2):
            sink.write(closed_group(step, 0))
            sink.write(update(step))
            sink.flush()
            assert found(run) == [v[2:4] for v in values() if v[1] <= step and v[2] % 2 == 0]
        reading = run.completions(Query())
        next(reading)
        sink.write(closed_group(3, 0))
        sink.write(update(3))
        sink.flush()  # although a reader is in the middle
        assert len(list(reading)) == 5
    sink.close()


def test_reading_leaves_nothing_behind(folder: Path) -> None:
    before = (folder / STORE).read_bytes()
    with open_store(folder) as run:
        assert run.overview().steps == 3
        assert [path.name for path in folder.iterdir()] == [STORE]
    assert [path.name for path in folder.iterdir()] == [STORE]
    assert (folder / STORE).read_bytes() == before


def test_what_a_killed_run_has_in_its_log_is_read_and_stays(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sink = SqliteSink(folder / STORE, first_step=3)
    sink.open()
    sink.write(closed_group(4, 0))
    sink.write(update(4))
    sink.flush()
    killed = tmp_path_factory.mktemp("killed")
    for path in folder.iterdir():  # as it would be had the process been killed now
        (killed / path.name).write_bytes(path.read_bytes())
    sink.close()
    before = {path.name: path.stat().st_size for path in killed.iterdir()}
    assert before[f"{STORE}-wal"] > 0
    for _ in range(2):
        with open_store(killed) as run:
            assert run.step_range() == (1, 4)
    assert {path.name: path.stat().st_size for path in killed.iterdir()} == before


def test_a_run_that_begins_to_write_meanwhile_is_no_damage(folder: Path) -> None:
    def read() -> None:
        with open_store(folder):
            Path(f"{folder / STORE}-wal").write_bytes(b"log")
            raise sqlite3.DatabaseError("database disk image is malformed")

    with pytest.raises(OutputError, match="a run has begun to write into the store meanwhile; ask again"):
        read()


def test_steps_come_in_order_with_their_figures(run: StoredRun) -> None:
    steps = list(run.steps())
    assert [(step.step, step.start, step.unix_s) for step in steps] == [(1, 1, 50.0), (2, 1, 50.0), (3, 1, 50.0)]
    assert steps[0].metrics == {"reward": 0.25, "rewards/r/mean": None, "rewards/r/std": 1.0}
    assert steps[2].metrics == {"reward": 0.75, "rewards/r/mean": 0.5, "rewards/r/std": 1.0}


def test_the_newest_incidents(run: StoredRun) -> None:
    newest = run.newest_incidents(2)
    assert [(i.start, i.step, i.kind, i.actor, i.message, i.gid) for i in newest] == [
        (1, 3, "late", "scorer", "!", None),
        (1, 2, "late", "scorer", "!", None),
    ]
    assert len(run.newest_incidents(9)) == 3


def test_the_ends_of_what_has_completions(run: StoredRun, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert run.steps_with_completions() == [1, 3]
    other = tmp_path_factory.mktemp("other")
    sink = SqliteSink(other / STORE)
    sink.open()
    with open_store(other) as empty:
        assert empty.steps_with_completions() == []
        assert list(empty.steps()) == []
    sink.close()


def test_which_machine_ran(folder: Path, run: StoredRun) -> None:
    assert run.machines() == {}
    for machine in ("one", "another"):
        sink = SqliteSink(folder / STORE, first_step=3, machine=machine)
        sink.open()
        sink.close()
    with open_store(folder) as found:
        assert found.machines() == {2: "one", 3: "another"}
    rows(folder / STORE, "DROP TABLE machines")
    with open_store(folder) as of_an_older_version:
        assert of_an_older_version.machines() == {}


def refusal(folder: Path) -> str:
    with pytest.raises(OutputError) as caught, open_store(folder) as run:
        list(run.completions(Query()))
    return str(caught.value)


def test_what_cannot_be_read_is_said(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    assert refusal(other / "none").startswith(f"{other / 'none'}: there is no such run folder; ")
    assert refusal(other).startswith(f"{other / STORE}: there is no run store; ")
    (other / STORE).touch()
    assert "is empty as yet; ask again" in refusal(other)
    (other / STORE).write_bytes(b"not a database" * 99)
    assert "is damaged: file is not a database; a run that goes on" in refusal(other)
    rows(folder / STORE, "PRAGMA user_version = 2")
    assert "has format 2" in refusal(folder)
    rows(folder / STORE, "PRAGMA user_version = 1")
    data = bytearray((folder / STORE).read_bytes())
    for page in range(1, len(data) // 4096):
        data[page * 4096 : page * 4096 + 8] = b"\xff" * 8
    (folder / STORE).write_bytes(data)
    assert "is damaged: database disk image is malformed" in refusal(folder)


def test_a_store_without_its_tables_cannot_be_read(folder: Path) -> None:
    rows(folder / STORE, "DROP TABLE completions")
    assert "cannot be read now: no such table: completions" in refusal(folder)


def test_a_row_that_no_run_wrote_is_named(folder: Path, run: StoredRun) -> None:
    with closing(sqlite3.connect(folder / STORE)) as connection, connection:
        connection.execute("UPDATE groups SET state = 'lost' WHERE gid = 3")
    with pytest.raises(InputError, match="group 3, sample 0: not as a run stores it: Invalid enum value 'lost'"):
        list(run.completions(Query()))


def test_figures_that_are_no_json_are_damage_and_a_trend_does_without(folder: Path) -> None:
    """A run that goes on, and `troupe status`, ask for the trend: neither may end by what it finds."""
    with closing(sqlite3.connect(folder / STORE)) as connection, connection:
        connection.execute("UPDATE steps SET metrics = '{\"reward\": 0..5}'")
    with (
        pytest.raises(OutputError, match="the run store holds what no run wrote: JSON is malformed"),
        open_store(folder) as run,
    ):
        run.values("reward", 10)
    assert stored_rewards(folder) == ()


def test_an_episode_comes_back_as_it_was_told(tmp_path: Path) -> None:
    group = acted(1, 0)
    assert group.scored is not None
    saved = msgspec.structs.replace(group.scored.group.episodes[1].opening, saved=b"large")
    episodes = list(group.scored.group.episodes)
    episodes[1] = msgspec.structs.replace(episodes[1], opening=saved, attributes={"odd": {"\udcff": [complex(1)]}})
    told = msgspec.structs.replace(group.scored.group, episodes=tuple(episodes))
    group = msgspec.structs.replace(group, scored=msgspec.structs.replace(group.scored, group=told))
    sink = SqliteSink(tmp_path / STORE)
    sink.open()
    for message in (group, closed(1, 1), update(1)):
        sink.write(message)
    sink.flush()
    sink.close()
    with open_store(tmp_path) as run:
        found = list(run.completions(Query()))
        assert run.count(Query()) == len(found) == 7
    assert [one.episode is None for one in found] == [False] * 4 + [True] * 3
    for one, rollout, episode in zip(found, told.rollouts, told.episodes, strict=False):
        assert one.episode is not None
        assert (one.episode.observed, one.episode.rows) == (rollout.observed, rollout.rows)
        assert (one.episode.turns, one.episode.failed) == (episode.turns, episode.failed)
        assert (one.episode.environment, one.episode.reward) == ("library", episode.reward)
    assert found[1].episode is not None
    assert found[1].episode.opening == msgspec.structs.replace(saved, saved=b"")
    assert found[1].episode.attributes == {"odd": {"?": ["(1+0j)"]}}


def test_a_store_of_before_there_were_episodes(folder: Path) -> None:
    with closing(sqlite3.connect(folder / STORE)) as connection:
        connection.execute("DROP TABLE episodes")
    with open_store(folder) as run:
        assert {one.episode for one in run.completions(Query())} == {None}
    sink = SqliteSink(folder / STORE, first_step=2)
    sink.open()
    for message in (acted(3, 0), update(3)):
        sink.write(message)
    sink.flush()
    sink.close()
    assert rows(folder / STORE, "SELECT step, sample FROM episodes") == [(3, 0), (3, 1), (3, 2), (3, 3)]
    again = SqliteSink(folder / STORE, first_step=2)
    again.open()
    again.close()
    assert rows(folder / STORE, "SELECT count(*) FROM episodes") == [0]  # they are made again, as completions are
