"""Answers in run.sqlite: read again as they were given, cut where an episode goes on in another way, gone when no run
can need them."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from tests.support.stored import closed, rows, update
from troupe.messages import Answer, Answered, CheckpointWritten, Slot, ToolCall
from troupe.records.sinks.sqlite import SqliteSink
from troupe.records.store.answers import stored_answers

ANSWER = Answer(
    said={"role": "assistant", "content": "é"},
    messages=({"role": "tool", "name": "add", "content": "3"},),
    calls=(ToolCall(name="add", arguments={"a": 1, "b": [2.5, None]}, result="3", error="late", seconds=0.5),),
    reward=0.1,
    state="s",
    info={"x": [1, {"y": "z"}]},
    saved=b"\x00\xff",
)


def answered(turn: int, *ids: int, gid: int = 4, sample: int = 1, answer: Answer = ANSWER) -> Answered:
    slot = Slot(step=gid // 2, place=gid % 2)
    return Answered(gid=gid, slot=slot, sample=sample, turn=turn, token_ids=ids, answer=answer)


def told(path: Path, *messages: object, first_step: int = 0) -> None:
    with closing(SqliteSink(path, first_step=first_step)) as sink:
        sink.open()
        for message in messages:
            sink.write(message)
        sink.flush()


def written(version: int, *removed: int) -> CheckpointWritten:
    return CheckpointWritten(version=version, folder=f"step-{version}", bytes=1, seconds=1.0, removed=removed)


def test_what_was_answered_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    assert stored_answers(path, 0) == []
    given = [answered(0), answered(1, 7, 8), answered(-1, 1), answered(0, gid=5)]
    told(path, *given)
    assert sorted(stored_answers(path, 0), key=repr) == sorted(given, key=repr)
    told(path, *given)
    assert len(stored_answers(path, 0)) == 4, "told once more they are still the same"


def test_other_tokens_make_what_followed_void(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    told(path, answered(0), answered(1, 7), answered(2, 8), answered(-1, 2), answered(2, 8, sample=0))
    told(path, answered(1, 7), answered(1, 9))
    left = [(each.sample, each.turn, each.token_ids) for each in stored_answers(path, 0)]
    assert left == [(0, 2, (8,)), (1, 0, ()), (1, 1, (9,))]


def test_answers_go_with_the_second_checkpoint_after_their_group(tmp_path: Path) -> None:
    path = tmp_path / "run.sqlite"
    for version in (1, 2, 3):
        (tmp_path / "checkpoints" / f"step-{version}").mkdir(parents=True)
    first, second = closed(1, 0), closed(2, 0)
    gids = [first.gid, second.gid]
    told(path, *(answered(0, gid=gid) for gid in gids), first, update(1), written(1), second, update(2), written(2))
    assert [each.gid for each in stored_answers(path, 0)] == [gids[1]], "a run may go on from step 1 still"
    assert stored_answers(path, 2) == [], "those of groups that have ended are of no use"
    assert [each.gid for each in stored_answers(path, 1)] == [gids[1]]
    told(path, update(3), written(3), first_step=2)
    assert rows(path, "SELECT gid FROM answers") == []
