"""How often and how soon a failed run is started again."""

from __future__ import annotations

import pytest

from troupe.daemon.attempts import Attempts
from troupe.run.daemon_settings import DaemonConfig


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def attempts(clock: Clock | None = None, **config: float) -> Attempts:
    return Attempts(
        DaemonConfig(**config),  # type: ignore[arg-type]
        clock=clock or Clock(),
        jitter=lambda low, high: (low + high) / 2,
    )


def test_pauses_double_up_to_the_longest_and_then_it_is_given_up() -> None:
    tries = attempts(restarts=8)
    assert [tries.failed() for _ in range(9)] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, None]


def test_a_new_step_is_progress() -> None:
    tries = attempts(restarts=2)
    assert [tries.failed(), tries.failed()] == [1.0, 2.0]
    tries.reached(1)
    assert tries.in_vain == 0
    assert [tries.failed(), tries.failed(), tries.failed()] == [1.0, 2.0, None]


def test_a_step_that_was_made_before_is_none() -> None:
    tries = attempts(restarts=2)
    tries.begins_at(10)
    tries.reached(11)
    for pause_s in (1.0, 2.0):
        assert tries.failed() == pause_s
        tries.begins_at(10)
        tries.reached(11)
    assert tries.failed() is None


def test_going_on_from_a_checkpoint_is_none_either() -> None:
    tries = attempts(restarts=1)
    tries.begins_at(100)
    assert tries.failed() == 1.0
    tries.begins_at(100)
    tries.reached(100)
    assert tries.failed() is None


def test_failures_that_are_far_apart_are_forgiven_but_not_for_ever() -> None:
    clock = Clock()
    tries = attempts(clock, restarts=2, restart_window_s=600.0)
    pauses = []
    for _ in range(9):
        pauses.append(tries.failed())
        clock.now_s += 601
    assert pauses == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, None]


def test_no_restarts_at_all() -> None:
    assert attempts(restarts=0).failed() is None


@pytest.mark.parametrize("jitter", [0.75, 1.25])
def test_pauses_differ_by_a_quarter_and_never_pass_the_longest(jitter: float) -> None:
    tries = Attempts(DaemonConfig(restarts=20), clock=Clock(), jitter=lambda low, high: jitter)
    pauses = [tries.failed() or 0.0 for _ in range(8)]
    assert pauses[:3] == [jitter, 2 * jitter, 4 * jitter]
    assert max(pauses) == 60.0


def test_the_real_jitter_stays_within_it() -> None:
    for _ in range(50):
        pause_s = Attempts(DaemonConfig()).failed()
        assert pause_s is not None
        assert 0.75 <= pause_s <= 1.25


def test_what_hangs_twice_at_the_same_place_is_not_tried_again() -> None:
    tries = attempts()
    assert tries.failed(hung_in="kind") == 1.0
    assert tries.failed(hung_in="kind") is None


def test_a_hang_elsewhere_or_another_failure_or_a_step_in_between_is_another_matter() -> None:
    tries = attempts(restarts=20)
    assert tries.failed(hung_in="kind") is not None
    assert tries.failed(hung_in="judge") is not None
    assert tries.failed() is not None
    assert tries.failed(hung_in="judge") is not None
    tries.reached(1)
    assert tries.failed(hung_in="judge") is not None
    assert tries.failed(hung_in="judge") is None
