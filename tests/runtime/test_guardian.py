"""What the guardian decides and says, without a process."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from troupe.runtime import guardian
from troupe.runtime.guardian import QUIET_S, TELL_S, TICK_S, Call, Guardian, Page, Vigil, reason, stacks_of
from troupe.runtime.guarding import WrittenPage

STACKS = """Timeout (0:00:03)!
Thread 0x00007f0000000002 (most recent call first):
  File "/usr/lib/python3.11/re/__init__.py", line 166 in match
  File "/home/me/rewards.py", line 7 in kind
  File "/site/troupe/rewards/convention.py", line 240 in drive

Current thread 0x00007f0000000001 (most recent call first):
  File "/usr/lib/python3.11/selectors.py", line 468 in select
"""
LOOP, WORKER = 0x7F0000000001, 0x7F0000000002


def looked(vigil: Vigil, seconds: float, *, turned_s: float = 0.0, heeded: int = 0, waiting: int = 0) -> list[str]:
    """What it decides, look by look, other than nothing."""
    looks = [vigil.look(TICK_S, turned_s, heeded, waiting) for _ in range(round(seconds / TICK_S))]
    return [what for what in looks if what != "nothing"]


def test_who_turns_is_left_alone() -> None:
    vigil = Vigil(10.0)
    for moment in range(100):
        assert looked(vigil, TICK_S, turned_s=moment, waiting=3) == []


def test_the_third_signal_ends_who_does_not_turn() -> None:
    vigil = Vigil(0.0)
    assert looked(vigil, QUIET_S + 1, waiting=1) == ["tell"]
    assert looked(vigil, 1, waiting=2) == ["tell"]
    assert looked(vigil, TICK_S, waiting=3) == ["signal 3"]


def test_signals_that_were_heeded_before_count() -> None:
    assert looked(Vigil(0.0), QUIET_S + TICK_S, heeded=2, waiting=1) == ["signal 3"]
    assert looked(Vigil(0.0), 10 * TELL_S, heeded=3)[0] == "tell", "without another one nobody is ended"


def test_signals_that_came_before_the_silence_is_sure_are_not_forgotten() -> None:
    vigil = Vigil(0.0)
    assert looked(vigil, QUIET_S - 1, waiting=3) == []
    assert looked(vigil, 1.5, waiting=3)[0] == "signal 3"


def test_silence_has_a_limit() -> None:
    vigil = Vigil(30.0)
    assert looked(vigil, 29.5) == []
    assert looked(vigil, 1.0)[0] == "daemon.kill_after_s = 30"


def test_without_a_limit_it_is_told_now_and_then() -> None:
    assert looked(Vigil(0.0), 3.5 * TELL_S) == ["tell"] * 3


def test_a_pause_of_its_own_is_not_the_trainer_s() -> None:
    """A laptop that slept for an hour."""
    vigil = Vigil(60.0)
    looked(vigil, 1.0)
    assert vigil.look(3600.0, 0.0, 0, 0) == "nothing"
    assert vigil.silent_s < QUIET_S


def test_a_turn_begins_anew() -> None:
    vigil = Vigil(30.0)
    assert looked(vigil, 29.0, waiting=1) == ["tell"]
    assert looked(vigil, TICK_S, turned_s=1.0) == []
    assert looked(vigil, 29.0, turned_s=1.0, waiting=1) == ["tell"]


@pytest.fixture
def page(tmp_path: Path) -> Iterator[WrittenPage]:
    descriptor = os.open(tmp_path / "page", os.O_RDWR | os.O_CREAT)
    os.ftruncate(descriptor, Page.BYTES)
    yield WrittenPage(descriptor)
    os.close(descriptor)


def test_the_page_tells_what_was_written(page: WrittenPage) -> None:
    page.tell(1.5, 2.5, LOOP, 2)
    assert page.turns() == (1.5, 2.5, LOOP, 2)
    page.write("folder", "/runs/日本\udcff")
    assert page.read("folder") == "/runs/日本\udcff"
    page.write("folder", "x" * 5000)
    assert page.read("folder") == "/runs/日本\udcff", "too long: left out"
    assert page.read("threads") == ""


def test_the_page_knows_the_calls_under_way(page: WrittenPage) -> None:
    first = page.begin(Call(1.0, WORKER, 17, "kind", "/home/me/rewards.py", "kind"))
    page.begin(Call(2.0, 0, 0, "a" * 500, "/home/me/" + "x" * 5000, "b" * 500))
    newest, oldest = page.calls()
    assert (oldest.name, oldest.file, oldest.function, oldest.thread, oldest.native) == (
        "kind",
        "/home/me/rewards.py",
        "kind",
        WORKER,
        17,
    )
    assert (newest.name, newest.thread) == ("a" * 80, 0)
    page.end(first)
    assert [call.since_s for call in page.calls()] == [2.0]


def test_more_calls_than_there_are_places_for_are_left_out(page: WrittenPage) -> None:
    places = [page.begin(Call(0.0, 1, 1, "n", "f", "g")) for _ in range(1000)]
    assert None in places
    for place in places:
        page.end(place)
    assert page.calls() == []
    assert page.begin(Call(0.0, 1, 1, "n", "f", "g")) is not None


def test_stacks_are_read() -> None:
    stacks = stacks_of(STACKS)
    assert list(stacks) == [WORKER, LOOP]
    assert stacks[WORKER][1] == ("/home/me/rewards.py", 7, "kind")
    assert stacks_of("garbage\n  File x\n") == {}


def call(name: str, thread: int = 0, **more: Any) -> Call:
    return Call(0.0, thread, 0, name, more.get("file", "/home/me/rewards.py"), more.get("function", name))


HELD = "holds Python's lock, so that nothing else can run"


@pytest.mark.parametrize(
    ("calls", "busiest", "told"),
    [
        ([call("kind", WORKER)], WORKER, f"the reward kind (/home/me/rewards.py:7) {HELD}"),
        ([call("kind", WORKER)], None, f"the reward kind (/home/me/rewards.py:7) {HELD}"),
        ([call("kind", WORKER), call("other", 3)], WORKER, f"the reward kind (/home/me/rewards.py:7) {HELD}"),
        ([call("kind", WORKER), call("other", 3)], None, f"one of the rewards kind, other {HELD}"),
        ([call("other"), call("kind")], WORKER, f"the reward kind (/home/me/rewards.py:7) {HELD}"),
        ([], WORKER, f"/home/me/rewards.py:7 {HELD}"),
        ([], 99, f"something {HELD}"),
    ],
)
def test_who_holds_the_lock_is_named(calls: list[Call], busiest: int | None, told: str) -> None:
    name, sentence = reason(calls, stacks_of(STACKS), held=True, loop_thread=LOOP, busiest=busiest)
    assert sentence == told
    assert name == (next((c.name for c in calls if c.name == "kind"), "") if calls else "")


def test_who_blocks_the_event_loop_is_named() -> None:
    stacks = {LOOP: [("/lib/python3.11/x.py", 1, "f"), ("/home/me/rewards.py", 9, "judge")], WORKER: []}
    calls = [call("other", file="/home/me/others.py"), call("judge"), call("kind", WORKER)]
    told = reason(calls, stacks, held=False, loop_thread=LOOP, busiest=WORKER)
    assert told == ("judge", "the reward judge (/home/me/rewards.py:9) keeps the event loop from turning")


def test_files_of_ours_are_not_to_blame_however_deep_they_lie() -> None:
    ours = f"{Path(guardian.__file__).parents[1]}/rewards/processes/worker.py"
    stacks = {LOOP: [("/usr/lib/python3.11/x.py", 1, "f"), (ours, 2, "g"), ("/home/me/rewards.py", 9, "h")]}
    told = reason([], stacks, held=False, loop_thread=LOOP, busiest=None)
    assert told == ("", "/home/me/rewards.py:9 keeps the event loop from turning")


def test_a_page_is_no_larger_than_it_looks() -> None:
    assert struct.calcsize("<BdQQ") + 3 * 80 < 512


def test_what_it_says_does_not_act_on_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    said: Any = SimpleNamespace(_terminal=False)
    Guardian._say(said, "the reward a\x1b[2J\r\x07\x9b (rewards.py:7)\n\tand on")
    assert capfd.readouterr().err == "the reward a?[2J??? (rewards.py:7)\n\tand on\n"
