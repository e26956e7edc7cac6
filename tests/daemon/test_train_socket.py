"""`troupe train` answers on the same socket as the daemon."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.support.fakes import write_prompts, write_ragged_model
from troupe.cli.main import main
from troupe.daemon.control.place import Place
from troupe.daemon.control.protocol import NobodyThereError, Request, ask
from troupe.messages import Done, Drain, GetStatus, Reload, Set, Status

ARGUMENTS = ("-m", "m", "-d", "p.json", "--reward", "length", "-o", "o", "--num-generations", "2", "--batch-size", "2")
LONG = ("--max-steps", "100000", "--set", "generation.max_completion_length=4", "--set", 'metrics.sinks=["jsonl"]')
PATIENCE_S = 60.0


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_ragged_model(tmp_path / "m")
    write_prompts(tmp_path / "p.json")
    return tmp_path


def test_a_run_in_a_terminal_can_be_asked_and_drained(workplace: Path) -> None:
    heard: list[object] = []

    def speak() -> None:
        until_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < until_s:
            try:
                status = ask(workplace / "o", GetStatus())
            except NobodyThereError:
                time.sleep(0.01)
                continue
            if isinstance(status, Status) and status.step > 0:
                break
        requests: list[Request] = [GetStatus(), Set(key="learner.lr", value=1e-5), Reload(), Drain()]
        heard.extend(ask(workplace / "o", request) for request in requests)

    speaker = threading.Thread(target=speak)
    speaker.start()
    result = CliRunner().invoke(main, ["train", *ARGUMENTS, *LONG])
    speaker.join()
    assert result.exit_code == 0, result.output
    assert [type(reply).__name__ for reply in heard] == ["Status", "Done", "Refused", "Done"]
    assert isinstance(heard[-1], Done)
    assert not {path.name for path in (workplace / "o").iterdir()} & {"control.sock", "control.lock", "control.path"}


def test_a_folder_that_somebody_serves_is_refused(workplace: Path) -> None:
    (workplace / "o").mkdir()
    place = Place(workplace / "o")
    place.take()
    result = CliRunner().invoke(main, ["train", *ARGUMENTS, *LONG])
    place.leave()
    assert result.exit_code == 2
    assert "a daemon or another trainer is there already" in result.stderr


def test_a_run_that_a_daemon_is_about_to_start_again_is_not_touched(workplace: Path) -> None:
    """While a daemon waits to start its trainer again, the run's own lock is free."""
    assert CliRunner().invoke(main, ["train", *ARGUMENTS, *LONG[2:], "--max-steps", "1"]).exit_code == 0
    place = Place(workplace / "o")
    place.take()
    before = {path: path.stat().st_mtime_ns for path in (workplace / "o").rglob("*")}
    allowed = ["--resume", "--lr", "0.5", "--allow-change", "learner.lr"]
    result = CliRunner().invoke(main, ["train", "-o", "o", *allowed])
    after = {path: path.stat().st_mtime_ns for path in (workplace / "o").rglob("*")}
    place.leave()
    assert result.exit_code == 2
    assert "a daemon or another trainer is there already" in result.stderr
    assert after == before


def test_without_a_socket_the_run_goes_on(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(place: Place) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Place, "listen", refuse)
    result = CliRunner().invoke(main, ["train", *ARGUMENTS, *LONG[2:], "--max-steps", "1"])
    assert result.exit_code == 0, result.output
    assert "note: there is no control socket ([Errno 95] Operation not supported)" in result.stdout
