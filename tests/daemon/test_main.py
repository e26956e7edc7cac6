"""Whole daemons with trainers in processes of their own: scripted ones, and the real one on a small model."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from tests.daemon.fake_trainer import TOTAL
from tests.support.fakes import write_prompts, write_ragged_model
from troupe.checkpoint import list_checkpoints
from troupe.daemon.control.place import Place
from troupe.daemon.control.protocol import NobodyThereError, Reply, Request, ask
from troupe.daemon.main import keep_alive
from troupe.daemon.orders import Order
from troupe.errors import ConfigError, OutputError, RunError
from troupe.messages import Done, Drain, GetStatus, Pause, Refused, Resume, Set, Status, Step
from troupe.records.layout import LOG, PAGE
from troupe.records.standing import describe_standing, read_standing
from troupe.runtime.lock import read_owner

pytestmark = pytest.mark.alone

FAKE = "tests.daemon.fake_trainer"
PATIENCE_S = 60.0
QUICK = "[daemon]\nfirst_pause_s = 0.01\nlongest_pause_s = 0.01\n"


def an_order(folder: Path, script: list[list[list[Any]]], text: str = QUICK) -> Order:
    """An order in whose run folder a script lies for the fake trainer."""
    run_toml = folder / "RUN.toml"
    run_toml.write_text(text)
    (folder / "out").mkdir()
    (folder / "out" / "script.json").write_text(json.dumps(script))
    return Order.given(run_toml, str(folder / "out"))


def log_of(order: Order) -> str:
    return (order.output / LOG).read_text(encoding="utf-8")


def starts(order: Order) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (order.output / "starts.jsonl").read_text().splitlines()]


def test_a_run_that_fails_in_every_way_and_goes_on(tmp_path: Path) -> None:
    order = an_order(
        tmp_path,
        [
            [["start", 0], ["step", 1], ["say", "about to go"], ["kill", signal.SIGKILL]],
            [["start", 0], ["step", 2], ["exit", 7]],
            [["start", 0], ["step", 3], ["raise", "no memory"]],
            [["start", 0], ["step", 4], ["kill", signal.SIGSEGV]],
            [["start", 0], ["step", 5], ["garbage"]],
            [["start", 0], ["step", 6], ["fail", "the disk is full"]],
            [["start", 6], ["finish", TOTAL]],
        ],
    )
    assert anyio.run(lambda: keep_alive(order, trainer=FAKE)) == 0
    log = log_of(order)
    for line in (
        "| about to go",
        "ended by SIGKILL: about to go",
        "ended with exit code 7",
        "RuntimeError: no memory",
        "ended by SIGSEGV",
        "the disk is full",
        f"the run is complete: {TOTAL} of {TOTAL} steps",
    ):
        assert line in log
    assert len(starts(order)) == 7
    assert {path.name for path in order.output.iterdir()} == {LOG, "run.toml", "script.json", "starts.jsonl"}


def test_it_gives_up_with_the_last_lines(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    order = an_order(tmp_path, [[["start", 0], ["say", "the last words"], ["exit", 9]]], QUICK + "restarts = 1\n")
    assert anyio.run(lambda: keep_alive(order, trainer=FAKE)) == 3
    assert len(starts(order)) == 2
    told = capfd.readouterr().err
    assert "given up: 2 failures without a new step" in told
    assert told.rstrip().endswith("the last words")


def test_what_cannot_be_used_leaves_nothing_behind(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run_toml = tmp_path / "RUN.toml"
    run_toml.write_text('[model]\npath = "nowhere"\n[data]\npath = "nowhere.json"\n')
    order = Order.given(run_toml, str(tmp_path / "a" / "b"))
    assert anyio.run(lambda: keep_alive(order)) == 2
    assert "nowhere" in capfd.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"RUN.toml"}


def test_files_of_others_stay_as_they_are(tmp_path: Path) -> None:
    order = an_order(tmp_path, [[["reject", "not a run"]]])
    assert anyio.run(lambda: keep_alive(order, trainer=FAKE)) == 2
    assert {path.name for path in order.output.iterdir()} == {"script.json", "starts.jsonl"}


@pytest.mark.parametrize(("number", "kind"), [(errno.ENOSPC, RunError), (errno.EACCES, OutputError)])
def test_a_disk_that_is_full_today_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    order = an_order(tmp_path, [])

    def mkdir(path: Path, **_: Any) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with pytest.raises(kind, match="the output folder cannot be written"):
        anyio.run(keep_alive, order)


def test_a_page_while_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    late = {"actor": "scorer", "kind": "odd", "message": "the judge is late"}
    script: list[list[list[Any]]] = [
        [["start", 0], ["step", 1], ["tell", late], ["tell page"], ["finish", TOTAL]],
    ]
    order = an_order(tmp_path, script, QUICK + "page = true\n")
    (order.output / PAGE).write_text("http://127.0.0.1:1/?token=of-one-who-was-killed\n")
    assert anyio.run(lambda: keep_alive(order, trainer=FAKE)) == 0
    assert starts(order)[0]["completions"] is True
    told = (order.output / "page-seen").read_text()
    assert told.startswith("http://127.0.0.1:")
    assert "killed" not in told
    assert capsys.readouterr().out == f"live page: {told}"
    assert not (order.output / PAGE).exists()
    token = told.strip().partition("token=")[2]
    assert token not in log_of(order), "others may read the log"
    assert "incident in scorer: the judge is late" in log_of(order)


def test_without_a_page_none_is_told_of(tmp_path: Path) -> None:
    order = an_order(tmp_path, [[["start", 0], ["finish", TOTAL]]])
    (order.output / PAGE).write_text("left by one who was killed")
    assert anyio.run(lambda: keep_alive(order, trainer=FAKE)) == 0
    assert starts(order)[0]["completions"] is False
    assert not (order.output / PAGE).exists()


def test_a_page_whose_port_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        order = an_order(tmp_path, [], QUICK + f"page = {taken.getsockname()[1]}\n")
        with pytest.raises(ConfigError, match=r"daemon\.page: port"):
            anyio.run(lambda: keep_alive(order, trainer=FAKE))
    assert not (order.output / "starts.jsonl").exists()


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "RUN.toml").write_text("")
    order = Order.given(tmp_path / "RUN.toml", str(tmp_path / "RUN.toml" / "out"))
    with pytest.raises(OutputError, match="cannot be written"):
        anyio.run(keep_alive, order)


@contextmanager
def a_daemon(order: Order, *, trainer: str | None = FAKE) -> Iterator[subprocess.Popen[str]]:
    """A daemon in a process, killed at the end."""
    program = (
        "import anyio, sys, functools; from pathlib import Path; from troupe.daemon.main import keep_alive; "
        "from troupe.daemon.orders import Order; order = Order.given(Path(sys.argv[1]), sys.argv[2]); "
        "sys.exit(anyio.run(functools.partial(keep_alive, order, trainer=sys.argv[3])))"
    )
    arguments = ["-c", program, str(order.run_toml), str(order.output), trainer or "troupe.daemon.trainer.process"]
    daemon = subprocess.Popen(
        [sys.executable, *arguments],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": os.fspath(Path(__file__).parents[2])},
    )
    try:
        yield daemon
    finally:
        daemon.kill()
        print(daemon.communicate()[1])


def until(found: Callable[[], object], order: Order) -> Any:
    """What is found, as soon as there is something."""
    until_s = time.monotonic() + PATIENCE_S
    while not (value := found()):
        assert time.monotonic() < until_s, log_of(order)
        time.sleep(0.02)
    return value


def asked(order: Order, request: Request) -> Reply:
    """The answer, as soon as somebody is there."""

    def answer() -> Reply | None:
        with suppress(NobodyThereError):
            return ask(order.output, request)
        return None

    reply: Reply = until(answer, order)
    return reply


def status_when(order: Order, holds: Callable[[Status], bool] = lambda status: True, **figures: Any) -> Status:
    """The status, as soon as it has these figures."""

    def status() -> Status | None:
        status = asked(order, GetStatus())
        assert isinstance(status, Status)
        told = all(getattr(status, name) == value for name, value in figures.items())
        return status if told and holds(status) else None

    found: Status = until(status, order)
    return found


def step_reached(order: Order, step: int) -> Status:
    return status_when(order, lambda status: status.step >= step, phase="running")


@pytest.mark.slow
def test_a_daemon_is_paused_killed_within_and_comes_back_paused(tmp_path: Path) -> None:
    order = an_order(tmp_path, [[["start", 0], ["step", 1], ["wait"], ["finish", 1]]])
    with a_daemon(order) as daemon:
        status_when(order, phase="running", step=1)
        assert isinstance(asked(order, Pause()), Done)
        status_when(order, phase="paused")
        trainer = _child_of(order, daemon.pid)
        os.kill(trainer, signal.SIGKILL)
        status = status_when(order, phase="paused")
        assert _child_of(order, daemon.pid) != trainer
        assert status.restarting is not None
        assert "SIGKILL" in status.restarting.reason
        assert isinstance(asked(order, Step(steps=2)), Done)
        assert status_when(order, held=("step 2",))
        assert isinstance(asked(order, Resume()), Done)
        assert isinstance(asked(order, Set(key="learner.lr", value=0.5)), Done)
        assert isinstance(asked(order, Set(key="seed", value=3)), Refused)
        assert isinstance(asked(order, Drain()), Done)
        assert daemon.wait(PATIENCE_S) == 0


def _child_of(order: Order, pid: int) -> int:
    def child() -> int | None:
        told = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
        return int(told.stdout.split()[0]) if told.stdout.split() else None

    found: int = until(child, order)
    return found


def _is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):  # gone before, or while it was read
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_trainer_does_not_outlive_a_killed_daemon(tmp_path: Path) -> None:
    order = an_order(tmp_path, [[["start", 0], ["deaf"]]])
    with a_daemon(order) as daemon:
        _started(order, 1)
        trainer = _child_of(order, daemon.pid)
        daemon.kill()
        daemon.wait(PATIENCE_S)
        until(lambda: not _is_alive(trainer), order)
    with a_daemon(order):
        _started(order, 2)


def _started(order: Order, times: int) -> None:
    until(lambda: (order.output / "starts.jsonl").exists() and len(starts(order)) >= times, order)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_daemon_is_light(tmp_path: Path) -> None:
    order = an_order(tmp_path, [[["start", 0], ["wait"], ["finish", 1]]])
    with a_daemon(order) as daemon:
        status_when(order, phase="running")
        status = Path(f"/proc/{daemon.pid}/status").read_text()
        resident_kb = int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])
        assert resident_kb < 80_000
        assert "libmlx" not in Path(f"/proc/{daemon.pid}/maps").read_text()
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(PATIENCE_S) == 0


@pytest.mark.slow
def test_a_trainer_that_hangs_is_killed_and_the_next_one_finishes(tmp_path: Path) -> None:
    script: list[list[list[Any]]] = [[["start", 0], ["step", 1], ["deaf"]], [["start", 1], ["finish", TOTAL]]]
    order = an_order(tmp_path, script, QUICK + "kill_after_s = 10\n")
    assert anyio.run(lambda: keep_alive(order, trainer=FAKE)) == 0
    assert len(starts(order)) == 2
    assert "gave no sign of life for 10 s (daemon.kill_after_s is 10) and was killed" in log_of(order)


@pytest.fixture
def real_order(tmp_path: Path) -> Order:
    """A run of 400 steps that takes a second for a few of them."""
    write_ragged_model(tmp_path / "m")
    write_prompts(tmp_path / "p.json")
    (tmp_path / "r.py").write_text(
        "import time\n"
        "def slow(completions, **_):\n    time.sleep(0.02)\n    return [len(c) % 5 / 5 for c in completions]\n"
    )
    (tmp_path / "RUN.toml").write_text(
        '[model]\npath = "m"\n[data]\npath = "p.json"\n[rewards]\nfunctions = ["r.py:slow"]\n'
        "[generation]\nnum_generations = 2\nmax_completion_length = 4\n[schedule]\nmax_staleness = 0\n"
        '[learner]\nbatch_size = 2\nmax_steps = 400\n[checkpoint]\nevery = 5\n[metrics]\nsinks = ["jsonl"]\n' + QUICK
    )
    return Order.given(tmp_path / "RUN.toml", str(tmp_path / "out"))


@pytest.mark.slow
def test_the_real_trainer_is_killed_paused_and_drained(real_order: Order) -> None:
    order = real_order
    with a_daemon(order, trainer=None) as daemon:
        step_reached(order, 7)
        os.kill(_child_of(order, daemon.pid), signal.SIGKILL)
        status = step_reached(order, 12)
        assert status.total_steps == 400
        assert isinstance(asked(order, Set(key="learner.lr", value=-1)), Refused)
        assert isinstance(asked(order, Set(key="learner.lr", value=1e-5)), Done)
        assert isinstance(asked(order, Pause()), Done)
        paused = status_when(order, phase="paused", groups=())
        assert isinstance(asked(order, Step()), Done)
        status_when(order, phase="paused", step=paused.step + 1)
        order.run_toml.write_text(order.run_toml.read_text().replace("[learner]", "[learner]\nlr = 3e-5"))
        daemon.send_signal(signal.SIGHUP)
        until(lambda: "0.00003" in (order.output / "changes.jsonl").read_text(), order)
        daemon.send_signal(signal.SIGTERM)
        assert daemon.wait(PATIENCE_S) == 0
    log = log_of(order)
    assert "ended by SIGKILL" in log
    assert "learner.lr is now 3e-05" in log
    assert f"ended after {paused.step + 1} of 400 steps" in log
    assert list_checkpoints(order.output)[0].name == f"step-{paused.step + 1:08d}"
    assert read_owner(order.output) is None
    with a_daemon(order, trainer=None) as daemon:
        step_reached(order, paused.step + 3)
        daemon.send_signal(signal.SIGTERM)
        daemon.send_signal(signal.SIGINT)
        assert daemon.wait(PATIENCE_S) == 0


@pytest.mark.slow
def test_a_drained_run_is_gone_on_with_by_its_folder_alone(real_order: Order) -> None:
    with a_daemon(real_order, trainer=None) as daemon:
        step_reached(real_order, 3)
        assert isinstance(asked(real_order, Drain()), Done)
        assert daemon.wait(PATIENCE_S) == 0
    real_order.run_toml.unlink()
    told = describe_standing(read_standing(real_order.output))
    assert told.endswith(f"of 400; go on with: troupe daemon {real_order.output}")
    again = Order.given(Path(told.split()[-1]), None)
    assert again.output == real_order.output
    with a_daemon(again, trainer=None) as daemon:
        step_reached(again, 6)
        assert isinstance(asked(again, Drain()), Done)
        assert daemon.wait(PATIENCE_S) == 0
    assert "running from step 0" not in log_of(again).partition("ended after")[2]


@pytest.mark.slow
def test_a_second_daemon_is_refused(tmp_path: Path) -> None:
    order = an_order(tmp_path, [[["start", 0], ["wait"], ["finish", 1]]])
    with a_daemon(order):
        status_when(order, phase="running")
        with pytest.raises(OutputError, match="there already"):
            anyio.run(lambda: keep_alive(order, trainer=FAKE))
        assert status_when(order, phase="running")


def test_a_folder_that_somebody_serves_is_left_to_them(tmp_path: Path) -> None:
    order = an_order(tmp_path, [[["finish", TOTAL]]])
    place = Place(order.output)
    place.take()
    with pytest.raises(OutputError, match="there already"):
        anyio.run(lambda: keep_alive(order, trainer=FAKE))
    place.leave()
    assert not (order.output / "starts.jsonl").exists()


def test_without_a_socket_it_trains_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(place: Place) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Place, "listen", refuse)
    order = an_order(tmp_path, [[["start", 9], ["finish", TOTAL]]])
    assert anyio.run(lambda: keep_alive(order, trainer=FAKE)) == 0
    assert "there is no control socket ([Errno 95] Operation not supported)" in log_of(order)


@pytest.mark.parametrize("acts", [[["move", "moved"]], [["move", "moved"], ["make", "out"]]], ids=["gone", "another"])
def test_a_folder_that_is_moved_ends_the_daemon_and_no_run_begins_in_its_place(
    tmp_path: Path, acts: list[list[Any]]
) -> None:
    """With the code on which systemd, too, begins no new one."""
    order = an_order(tmp_path, [[["start", 0], ["step", 1], *acts, ["fail", "the folder is gone"]]])
    assert anyio.run(lambda: keep_alive(order, trainer=FAKE)) == 2
    moved = tmp_path / "moved"
    log = (moved / LOG).read_text(encoding="utf-8")
    assert f"the run's own is now {moved}" in log
    assert {path.name for path in moved.iterdir()} == {LOG, "run.toml", "script.json", "starts.jsonl"}
    assert len((moved / "starts.jsonl").read_text().splitlines()) == 1
    assert not order.output.exists() or list(order.output.iterdir()) == []


def test_a_restart_keeps_to_what_was_allowed_of_the_machine(tmp_path: Path) -> None:
    order = an_order(tmp_path, [[["start", 0], ["exit", 7]], [["start", 0], ["finish", TOTAL]]])
    order = msgspec.structs.replace(order, allow_changes=("learner.lr", "machine.compiler", "machine"))
    assert anyio.run(lambda: keep_alive(order, trainer=FAKE)) == 0
    first, second = starts(order)
    assert first["allow_changes"] == ["learner.lr", "machine.compiler", "machine"]
    assert second["allow_changes"] == ["machine.compiler", "machine"]
    assert first["identity"] == second["identity"] == [order.output.stat().st_dev, order.output.stat().st_ino]
