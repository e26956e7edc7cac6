"""Whole free runs whose prompts a real `mlx_lm.server` completes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.support.fakes import weigh_ids
from tests.support.mlx_lm_server import mlx_lm_server
from tests.support.runs import column, distance, in_store, incidents, names_in, policy_of, train
from tests.support.tiny import write_tiny_model
from troupe.policy import load_policy

pytestmark = [pytest.mark.slow, pytest.mark.alone]

WAYS: dict[str, dict[str, Any]] = {"whole": {}, "adapter": {"adapter__kind": "lora", "adapter__rank": 4}}


AWAY_S = {3: 5.0, 9: 0.5}
"""Call of the reward at which the server is killed → seconds until it is started again: longer than an engine is asked
again before it counts as lost, and so short that it may not be missed."""


def settings_of(url: str, weights: Path, **engine: Any) -> dict[str, Any]:
    weights.mkdir(exist_ok=True)
    engine |= {"url": url, "kind": "mlx-lm", "weights_folder": str(weights)}
    return {
        "schedule__mode": "free",
        "schedule__generator": "auto",
        "schedule__engines": [engine],
    }


@pytest.mark.parametrize("way", WAYS)
def test_a_run_trains_on_its_completions_and_every_version_reaches_it(
    tmp_path: Path, ragged_model: Path, way: str
) -> None:
    with mlx_lm_server(ragged_model, tmp_path) as server:
        settings = settings_of(server.url, tmp_path / "weights") | WAYS[way] | {"learner__max_steps": 5}
        run = train(ragged_model, tmp_path, weigh_ids, **settings).folder
    # with max_staleness 0 a step's tokens are of the version that learns from them: the same network in two programs
    assert max(column(run, "sampling/sampling_logp_difference/max")) < 2e-5
    assert max(abs(ratio - 1) for ratio in column(run, "sampling/importance_sampling_ratio/mean")) < 1e-5
    assert column(run, "staleness/max") == [0.0] * 5
    assert column(run, "tokens/stale_fraction") == [0.0] * 5
    assert all(length > 1 for length in column(run, "completions/mean_length"))
    states = Counter(state for (state,) in in_store(run, "select state from groups"))
    assert states == {"trained": 10}
    assert incidents(run) == []
    if way == "whole":
        assert distance(policy_of(run), load_policy(ragged_model).weights) > 1e-3
    assert names_in(tmp_path / "weights") == set()


def test_a_server_that_is_killed_comes_back_and_no_prompt_is_lost(tmp_path: Path, ragged_model: Path) -> None:
    with mlx_lm_server(ragged_model, tmp_path) as server:
        calls = count(1)  # of two threads at a time

        def weigh(completion_ids: list[list[int]], **_: Any) -> list[float]:
            if (away_s := AWAY_S.get(next(calls))) is not None:
                server.kill()
                threading.Timer(away_s, server.start).start()
            return weigh_ids(completion_ids)

        settings = settings_of(server.url, tmp_path / "weights", most=2) | {
            "learner__max_steps": 8,
            "schedule__max_staleness": 1,
        }
        result = train(ragged_model, tmp_path, weigh, **settings)
    assert result.steps == 8
    kinds = [kind for kind, _ in incidents(result.folder)]
    assert kinds[:2] == ["engine_lost", "engine_back"]
    assert kinds.count("engine_lost") == kinds.count("engine_back")
    gids = [gid for (gid,) in in_store(result.folder, "select gid from groups")]
    assert len(gids) == len(set(gids))
    places = Counter(in_store(result.folder, "select step, place from groups where state = 'trained'"))
    assert set(places.values()) == {1}


@pytest.mark.soak
def test_an_engine_and_a_process_of_ours_share_the_prompts(tmp_path: Path, ragged_model: Path) -> None:
    with mlx_lm_server(ragged_model, tmp_path) as server:
        beside = {"schedule__generator": "process", "schedule__max_staleness": 1, "learner__max_steps": 12}
        beside |= {"schedule__on_stale": "correct"}
        settings = settings_of(server.url, tmp_path / "weights", most=1) | beside
        run = train(ragged_model, tmp_path, weigh_ids, **settings, metrics__sinks=["jsonl", "sqlite", "trace"]).folder
    trace = json.loads((Path(run) / "trace.json").read_text())
    tracks = {event["args"]["name"] for event in trace if event.get("name") == "process_name"}
    assert any(f"127.0.0.1:{server.port}" in track for track in tracks), tracks
    assert Counter(state for (state,) in in_store(run, "select state from groups"))["trained"] == 24
    assert incidents(run) == []


def test_another_model_is_refused_with_the_reason(tmp_path: Path, ragged_model: Path) -> None:
    other = write_tiny_model(tmp_path / "other", seed=3)
    with mlx_lm_server(other, tmp_path) as server:
        # which the server is told to serve as if it were the run's
        settings = settings_of(server.url, tmp_path / "weights", model=str(other)) | WAYS["adapter"]
        with pytest.raises(Exception, match="nats a token") as caught:
            train(ragged_model, tmp_path, weigh_ids, **settings)
    assert "cannot be used" in str(caught.value)


@pytest.mark.soak
def test_a_run_that_is_killed_leaves_nothing_for_long(tmp_path: Path, ragged_model: Path) -> None:
    with mlx_lm_server(ragged_model, tmp_path) as server:
        script, weights = tmp_path / "run.py", tmp_path / "weights"
        script.write_text(
            "import sys, time\nfrom pathlib import Path\nfrom tests.support.runs import train\n"
            "def weigh(completion_ids, **_):\n    time.sleep(0.2)\n"
            "    return [float(len(ids)) for ids in completion_ids]\n"
            f"train(Path({str(ragged_model)!r}), Path({str(tmp_path)!r}), weigh, learner__max_steps=500, "
            f"**{settings_of(server.url, weights)!r})\n"
        )
        child = subprocess.Popen([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": str(Path.cwd())})
        try:
            end_s = time.monotonic() + 60
            while not names_in(weights) and time.monotonic() < end_s:
                time.sleep(0.05)
            time.sleep(1.0)
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait()
        assert len(names_in(weights)) == 1
        again = settings_of(server.url, weights) | {"learner__max_steps": 1}
        train(ragged_model, tmp_path / "next", weigh_ids, **again)
    assert names_in(weights) == set()
