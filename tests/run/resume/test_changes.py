"""What of a run may change: the rules for a resume, what may be set while it runs, and the file that keeps it."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from troupe import RunConfig, load_config
from troupe.errors import ConfigError
from troupe.records.layout import CHANGES
from troupe.records.standing import Change
from troupe.run.config import known_keys
from troupe.run.resume.changes import (
    LIVE_KEYS,
    RULES,
    ChangesLog,
    Difference,
    Live,
    check_allowed,
    check_change,
    differences,
    in_force,
    rule_of,
    value_of,
)

CONFIG = load_config(None, [{"learner": {"lr": 1e-4}, "checkpoint": {"every": 9}, "schedule": {"watchdog_s": 5.0}}])


# The rules


def test_every_key_has_one_rule_and_every_rule_a_key() -> None:
    keys = known_keys()
    assert len(keys) == len(set(keys)) > 100
    assert {"seed", "learner.lr", "learner.beta", "generation.top_k", "data.chat_template_kwargs"} <= set(keys)
    for key in keys:
        section = f"{key.partition('.')[0]}.*"
        assert key in RULES or section in RULES, f"{key} has no rule in changes.RULES"
    for rule in RULES:
        matching = [key for key in keys if key == rule or (rule.endswith(".*") and key.startswith(rule[:-1]))]
        assert matching, f"{rule} is no key of the config"


def test_keys_can_be_read_by_name() -> None:
    for key in known_keys():
        value_of(CONFIG, key)
    assert value_of(CONFIG, "learner.lr") == 1e-4


@pytest.mark.parametrize(
    ("rule", "keys"),
    [
        ("never", "seed model.path model.dtype data.path data.shuffle learner.batch_size schedule.mode"),
        ("by name", "learner.lr learner.epochs learner.max_steps generation.top_p rewards.functions data.chat"),
        ("by name", "schedule.max_staleness schedule.blas_threads learner.gradient_accumulation_steps"),
        ("free", "output memory_limit_gb checkpoint.every checkpoint.keep metrics.sinks schedule.watchdog_s"),
        ("free", "schedule.generator rewards.concurrency data.eval_path daemon.restarts"),
        ("by name", "learner.something_new section.something_new"),
    ],
)
def test_which_rule_a_key_has(rule: str, keys: str) -> None:
    assert {key: rule_of(key) for key in keys.split()} == dict.fromkeys(keys.split(), rule)


def test_differences_are_told_in_words() -> None:
    new = load_config(
        None, [{"seed": 3, "learner": {"lr": 1e-3, "max_steps": 7}, "rewards": {"functions": ["length"]}}]
    )
    found = differences(RunConfig(), new)
    assert [difference.key for difference in found] == ["seed", "rewards.functions", "learner.lr", "learner.max_steps"]
    assert [str(difference) for difference in found] == [
        "seed: 0 → 3 (never: all that is drawn follows from it)",
        "rewards.functions: [] → ['length']",
        "learner.lr: (none) → 0.001",
        "learner.max_steps: (none) → 7",
    ]
    assert str(Difference(key="model.path", old="/a", new="/b")).startswith(
        "model.path: '/a' → '/b' (never: a run goes"
    )


def test_every_key_that_never_changes_says_why() -> None:
    for key in known_keys():
        difference = Difference(key=key, old=1, new=2)
        assert (difference.rule == "never") == ("(never: " in str(difference))


def test_what_may_be_allowed() -> None:
    assert check_allowed(["learner.lr", "output"]) == {"learner.lr", "output"}
    with pytest.raises(
        ConfigError, match=r"--allow-change learner.lrr: there is no such key; did you mean learner.lr\?"
    ):
        check_allowed(["learner.lr", "learner.lrr"])
    with pytest.raises(ConfigError, match=r"--allow-change learning_rate: there is no such key; it is learner.lr here"):
        check_allowed(["learning_rate"])
    with pytest.raises(ConfigError, match=r"--allow-change zzz: there is no such key; name it as section.key"):
        check_allowed(["zzz"])
    with pytest.raises(ConfigError, match=r"seed: this can never change \(all that is drawn .* start a new run"):
        check_allowed(["seed"])


# While it runs


def test_what_may_be_set() -> None:
    assert check_change(CONFIG, "learner.lr", 1, ["r"]) == 1.0
    assert check_change(CONFIG, "checkpoint.every", 3, ["r"]) == 3
    assert check_change(CONFIG, "schedule.watchdog_s", 0, None) == 0.0
    assert check_change(CONFIG, "rewards.r", "length", ["r"]) == "length"
    assert check_change(CONFIG, "rewards.r", "a.py:f", ["r"]) == f"{Path.cwd() / 'a.py'}:f"
    assert check_change(CONFIG, "rewards.r", "length", None) == "length", "names are not known before the start"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learner.lr", 1.5, r"set learner.lr: learner.lr is 1.5: expected float <= 1.0"),
        ("learner.lr", -1e-9, r"learner.lr is -1e-09"),
        ("learner.lr", float("nan"), r"learner.lr is nan; give a finite number"),
        ("learner.lr", "1e-4", r"learner.lr is '1e-4': expected float, got str"),
        ("learner.lr", None, r"set learner.lr: None is no value"),
        ("checkpoint.every", 0, r"checkpoint.every is 0: expected int >= 1"),
        ("schedule.watchdog_s", -1, r"schedule.watchdog_s is -1"),
        (
            "learner.beta",
            0.1,
            r"set learner.beta: cannot change while a run is live; what can: learner.lr, rewards.NAME, ",
        ),
        ("learner.beta", 0.1, r"resume it with --allow-change learner.beta"),
        ("seed", 1, r"set seed: cannot change while a run is live; what can: .*log.level$"),
        ("learner.lrr", 1, r"set learner.lrr: there is no such key to be set; what can: learner.lr"),
        ("lr", 1, r"set lr: there is no such key to be set: it is learner.lr here; what can: learner.lr"),
        ("learning_rate", 1, r"there is no such key to be set: it is learner.lr here \(the same default, 1e-6\); what"),
        ("rewards.q", "length", r"set rewards.q: there is no such key to be set; what can: rewards.r, rewards.s$"),
        ("rewards.timeout_s", 3, r"set rewards.timeout_s: cannot change while a run is live; what can: rewards.r, "),
        ("rewards.NAME", "length", r"set rewards.NAME: there is no such key"),
        ("rewards.r", 5, r"set rewards.r: 5 is no text; name a reward as the config does"),
        ("log.level", "debug", r"set log.level: only a daemon keeps a log of its own"),
    ],
)
def test_what_may_not_be_set(key: str, value: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_change(CONFIG, key, value, ["r", "s"])


def test_live_keys_are_keys_that_a_resume_may_change_too() -> None:
    for key in LIVE_KEYS:
        assert key in ("rewards.NAME", "log.level") or rule_of(key) in ("free", "by name")


# The file


def test_changes_are_read_as_they_were_written(tmp_path: Path) -> None:
    log = ChangesLog(tmp_path)
    assert log.read() == ()
    made = (
        Change(step=3, key="learner.lr", value=1e-3),
        Change(step=5, key="rewards.r", value="é.py:f"),
        Change(step=5, key="checkpoint.every", value=2),
    )
    for number, change in enumerate(made, 1):
        log.add(change)
        assert log.read() == made[:number]
    assert (tmp_path / CHANGES).read_text() == (
        '{"step":3,"key":"learner.lr","value":0.001}\n'
        '{"step":5,"key":"rewards.r","value":"é.py:f"}\n'
        '{"step":5,"key":"checkpoint.every","value":2}\n'
    )


def test_half_a_line_was_never_in_force_and_gives_way_to_the_next(tmp_path: Path) -> None:
    log, first, second = ChangesLog(tmp_path), Change(step=1, key="learner.lr", value=0.5), None
    log.add(first)
    with (tmp_path / CHANGES).open("a") as file:
        file.write('{"step":2,"key":"learner.lr","val')
    assert log.read() == (first,)
    second = Change(step=4, key="learner.lr", value=0.25)
    log.add(second)
    assert log.read() == (first, second)


@pytest.mark.parametrize("line", ["{}", "7", '{"step":"x","key":"k","value":1}', "\xff", '{"step":1,"key":"k","v":1}'])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    ChangesLog(tmp_path).add(Change(step=1, key="learner.lr", value=0.5))
    with (tmp_path / CHANGES).open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    with pytest.raises(ConfigError, match=rf"{CHANGES}:2: this is no change of a setting"):
        ChangesLog(tmp_path).read()


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / CHANGES).mkdir()
    with pytest.raises(ConfigError, match="the changes made while the run was live cannot be read"):
        ChangesLog(tmp_path).read()


@pytest.mark.parametrize("place", ["pwrite", "fsync"])
def test_what_cannot_be_written_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    log, first = ChangesLog(tmp_path), Change(step=1, key="learner.lr", value=0.5)
    log.add(first)
    pwrite, fsync = os.pwrite, os.fsync

    def half(descriptor: int, data: bytes, start: int) -> int:
        return pwrite(descriptor, data[:5], start)

    def no_disk(descriptor: int) -> None:
        raise OSError("Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, place, half if place == "pwrite" else no_disk)
        with pytest.raises(OSError, match=r"room for a part|Input/output"):
            log.add(Change(step=2, key="learner.lr", value=0.25))
    assert os.fsync is fsync
    assert log.read() == (first,)
    assert (tmp_path / CHANGES).read_bytes().count(b"\n") == 1


def test_many_threads_and_logs_of_one_file_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meeting, real = threading.Barrier(2), os.pread

    def read_together(descriptor: int, size: int, start: int) -> bytes:
        data = real(descriptor, size, start)
        with suppress(threading.BrokenBarrierError):  # nobody else comes this far where one waits for the other
            meeting.wait(0.2)
        return data

    monkeypatch.setattr(os, "pread", read_together)
    changes = [Change(step=step, key="learner.lr", value=0.5) for step in range(2)]
    threads = [threading.Thread(target=ChangesLog(tmp_path).add, args=(change,)) for change in changes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(change.step for change in ChangesLog(tmp_path).read()) == [0, 1]


def test_changes_that_cannot_be_made_any_more(tmp_path: Path) -> None:
    log = ChangesLog(tmp_path)
    log.add(Change(step=1, key="learner.lr", value=1))
    log.add(Change(step=2, key="rewards.gone", value="length"))
    assert log.checked(CONFIG, ["r"]) == (Change(step=1, key="learner.lr", value=1.0),)
    log.add(Change(step=2, key="learner.lr", value=7))
    with pytest.raises(ConfigError, match=rf"{CHANGES}: set learner.lr: learner.lr is 7"):
        log.checked(CONFIG, ["r"])


def change(step: int, value: Any, key: str = "learner.lr") -> Change:
    return Change(step=step, key=key, value=value)


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ([], []),
        ([change(3, 1), change(5, 2)], [(3, 1), (5, 2)]),
        ([change(3, 1), change(3, 2)], [(3, 2)]),
        ([change(3, 1), change(7, 2), change(5, 3)], [(3, 1), (5, 3)]),  # made after a resume from before step 7
        ([change(7, 2), change(0, 3)], [(0, 3)]),
        ([change(3, 1, "checkpoint.every"), change(4, 2)], [(4, 2)]),
    ],
)
def test_a_later_change_takes_the_place_of_those_for_later_steps(made: list[Change], expected: list[Any]) -> None:
    assert in_force(made, "learner.lr") == expected


def test_what_a_start_begins_with() -> None:
    assert Live.of(CONFIG) == Live(checkpoint_every=9, watchdog_s=5.0)
    made = [
        change(3, 1e-3),
        change(2, 4, "checkpoint.every"),
        change(9, 6, "checkpoint.every"),
        change(1, 0.0, "schedule.watchdog_s"),
        change(8, "x", "rewards.b"),
        change(4, "y", "rewards.a"),
        change(5, "z", "rewards.gone"),
    ]
    assert Live.of(CONFIG, made, ["a", "b"]) == Live(
        rates=((3, 1e-3),), checkpoint_every=6, watchdog_s=0.0, exchanges=((4, "a", "y"), (8, "b", "x"))
    )
