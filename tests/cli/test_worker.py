"""`troupe worker` from outside: what it refuses, what it shows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from troupe.cli.main import main
from troupe.cli.worker_lines import now_line
from troupe.cluster.bus import BusState
from troupe.cluster.wire import RunState
from troupe.errors import ConfigError
from troupe.run.worker.machine import chosen_device


def said(*arguments: str) -> str:
    """On bad input."""
    result = CliRunner().invoke(main, ["worker", *arguments])
    assert result.exit_code == 2
    return result.output


def test_a_join_file_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "there is no such join file" in said("--join", str(tmp_path / "worker.toml"))
    open_to_all = tmp_path / "open.toml"
    open_to_all.write_text("run = 'x'")
    open_to_all.chmod(0o644)
    assert "may be read by others" in said("--join", str(open_to_all))
    assert "Missing option '--join'" in said()


@pytest.mark.parametrize(
    ("visible", "device", "seen"),
    [("", "3", "3"), ("4,5", "1", "5"), ("GPU-aa,GPU-bb", "0", "GPU-aa")],
)
def test_a_card_is_counted_among_those_that_are_visible(
    monkeypatch: pytest.MonkeyPatch, visible: str, device: str, seen: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    here = chosen_device(device)
    assert (here.on_cpu, here.env) == (False, {"CUDA_VISIBLE_DEVICES": seen})


@pytest.mark.parametrize("device", ["2", "tpu", "-1", ""])
def test_a_device_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ConfigError, match=f"--device {device}"):
        chosen_device(device)


def line(
    *,
    connection: BusState = "connected",
    away_since_s: float | None = None,
    state: RunState | None = "running",
    **work: Any,
) -> str:
    nothing: dict[str, Any] = {"held": (), "tokens_per_second": None, "version": None, "doing": "", "summary": ""}
    link = SimpleNamespace(name="w", connection=connection, away_since_s=away_since_s)
    worker: Any = SimpleNamespace(link=link, state=state, works=[SimpleNamespace(**nothing | work)])
    return now_line(worker)


def test_the_line_of_now_says_what_the_worker_is_at() -> None:
    assert line(connection="lost") == "w: waiting for the run's server"
    assert line(connection="untrusted").startswith("w: what answers at the run's address has no certificate")
    assert line(away_since_s=0.0).startswith("w: waiting for the run, for ")
    assert line(state=None) == "w: asking to be taken"
    assert line(state="paused") == "w: the run is paused"
    assert line() == "w: waiting for work"
    assert line(doing="starting its generator") == "w: starting its generator"
    busy = line(held=("12.0.1", "12.0.3"), version=12, tokens_per_second=1234.5, summary="24 groups")
    assert busy == "w: working · 1,234 tokens/s · 24 groups · version 12 · part 12.0.1 and 1 more"
