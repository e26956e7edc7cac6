"""Real runs of a tiny model with the sinks that are off by default."""

from __future__ import annotations

import socket
import sys
import urllib.request
from contextlib import closing
from pathlib import Path

import anyio
import pytest

from tests.records.sinks.oracles import package
from tests.records.sinks.test_tensorboard import curves
from tests.support.fakes import tiny_config
from troupe import Supervisor
from troupe.errors import ConfigError
from troupe.run.prepare import prepare

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore")]


def free_port() -> int:
    with closing(socket.socket()) as trial:
        trial.bind(("127.0.0.1", 0))
        port: int = trial.getsockname()[1]
        return port


def scraped(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
        text: str = response.read().decode()
        return text


async def test_prometheus_sees_what_the_run_is_doing(tiny_model: Path, tmp_path: Path) -> None:
    port = free_port()
    config = tiny_config(tiny_model, tmp_path, metrics__sinks=["prometheus"], metrics__prometheus_port=port)

    async def until(line: str) -> str:
        while True:
            try:
                page = await anyio.to_thread.run_sync(scraped, port)
            except OSError:  # not open yet
                page = ""
            if line in page:
                return page
            await anyio.sleep(0.02)

    with anyio.fail_after(120):
        run = Supervisor(config)
        run.pause()
        async with run:
            page = await until('troupe_phase{phase="paused"} 1.0')
            assert "troupe_total_steps 4.0" in page
            run.step(2)
            page = await until("troupe_step 2.0")
            page = await until("troupe_completions_mean_length ")
            assert 'troupe_queue_depth{queue="scored"}' in page
            run.resume()
    assert run.result.steps == 4
    assert run.result.switched_off_sinks == {}
    with pytest.raises(OSError, match="refused"):
        scraped(port)


async def test_tensorboard_has_every_metric_of_every_step(tiny_model: Path, tmp_path: Path) -> None:
    package("tensorboardX")
    config = tiny_config(tiny_model, tmp_path, metrics__sinks=["tensorboard"])
    async with Supervisor(config) as run:
        told = {update.step: update.metrics async for update in run.updates()}
    assert sorted(told) == [1, 2, 3, 4]
    shown = curves(tmp_path / "run" / "tensorboard")
    for metric in ("reward", "loss", "completions/mean_length", "queue/scored/depth"):
        assert shown[metric] == pytest.approx({step: metrics[metric] for step, metrics in told.items()}), metric


async def test_what_is_missing_is_told_before_anything_is_written(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    config = tiny_config(tiny_model, tmp_path, metrics__sinks=["jsonl", "trackio"])
    with pytest.raises(ConfigError, match=r"pip install -e '\.\[trackio\]'"):
        prepare(config)
    with pytest.raises(ConfigError, match="trackio"):
        async with Supervisor(config):
            pass
    assert not (tmp_path / "run").exists()
