"""A run with every sink, killed and resumed; what TensorBoard, wandb and trackio then have is read back.

Marked slow: real processes and the real packages, without any network.
"""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import troupe
from tests.records.sinks.oracles import package
from tests.records.sinks.test_tensorboard import curves

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

STEPS = 9
RUN_TOML = """
seed = 3
[model]
path = "{model}"
[data]
path = "prompts.json"
[generation]
num_generations = 4
max_completion_length = 6
[rewards]
functions = ["rewards.py:deadly", "length"]
timeout_s = 200.0
[learner]
lr = 1e-3
batch_size = 2
max_steps = 9
[checkpoint]
every = 3
[metrics]
sinks = ["console", "jsonl", "sqlite", "tensorboard", "wandb", "trackio"]
wandb_mode = "offline"
wandb_project = "sums"
trackio_project = "sums"
completions_every = 4
"""
REWARDS = """
import json, os, pathlib, signal, time

def deadly(completions, trainer_state, **_):
    tracked = pathlib.Path("out/wandb.json")
    step = trainer_state.global_step
    while not tracked.exists() or json.loads(tracked.read_bytes()).get("step", 0) < step:  # or it is over
        time.sleep(0.01)
    once = pathlib.Path(__file__).with_name("killed")
    if step == 5 and not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return [len(set(text)) / 6 for text in completions]
"""


class Killed(NamedTuple):
    out: Path
    trackio: Path
    printed: str


@pytest.fixture(scope="module")
def killed(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Killed:
    for name in ("tensorboardX", "wandb", "trackio"):
        package(name)
    folder = tmp_path_factory.mktemp("killed")
    (folder / "run.toml").write_text(RUN_TOML.format(model=tiny_model))
    (folder / "rewards.py").write_text(REWARDS)
    (folder / "prompts.json").write_text('[{"prompt": "Hello, w"}, {"prompt": "12+34="}, {"prompt": "abc"}]')
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "TRACKIO_", "HF_"))},
        "PYTHONPATH": str(Path(troupe.__file__).parents[1]),
        "HOME": str(folder),
        "TRACKIO_DIR": str(folder / "trackio"),
        "HF_HUB_OFFLINE": "1",
        "WANDB_ERROR_REPORTING": "false",
    }
    command = [sys.executable, "-m", "troupe", "train", "run.toml", "-o", "out"]
    first = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=240)
    assert first.returncode == -9, first.stderr
    second = subprocess.run(
        [*command, "--resume"], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert second.returncode == 0, second.stdout + second.stderr
    return Killed(folder / "out", folder / "trackio", second.stdout)


@pytest.fixture(scope="module")
def rewards(killed: Killed) -> dict[int, float]:
    """Step → reward, by metrics.jsonl."""
    lines = [json.loads(line) for line in (killed.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return {line["step"]: line["reward"] for line in lines}


def test_no_sink_was_switched_off(killed: Killed) -> None:
    assert "switched off" not in killed.printed
    assert "rackio" not in killed.printed  # it would print into the display
    assert json.loads((killed.out / "summary.json").read_bytes())["switched_off_sinks"] == {}
    with closing(sqlite3.connect(killed.out / "run.sqlite")) as store:
        assert store.execute("SELECT count(*) FROM steps").fetchone() == (STEPS,)


def test_tensorboard_has_each_step_once(killed: Killed, rewards: dict[int, float]) -> None:
    assert len(list((killed.out / "tensorboard").iterdir())) == 2
    assert curves(killed.out / "tensorboard")["reward"] == pytest.approx(rewards)


def records(path: Path) -> Iterator[Any]:
    """What wandb wrote into a log of an offline run: pieces in blocks of 32 KiB, as LevelDB writes them."""
    record, data, position, parts = package("wandb.proto.wandb_internal_pb2").Record, path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (left := 32768 - position % 32768) < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        position += 7 + length
        if not kind or position > len(data):
            return
        parts += data[position - length : position]
        if kind in (1, 4):  # whole, or the last of its pieces
            yield record.FromString(parts)
            parts = b""


def test_wandb_has_every_step_under_one_id(killed: Killed, rewards: dict[int, float]) -> None:
    tracked = json.loads((killed.out / "wandb.json").read_bytes())
    files = sorted((killed.out / "wandb").glob("offline-run-*/*.wandb"))
    assert {path.name for path in files} == {f"run-{tracked['id']}.wandb"}
    assert len(files) == 2
    told: dict[int, float] = {}
    by_start: list[list[int]] = []
    for path in files:
        by_start.append([])
        for record in records(path):
            if record.WhichOneof("record_type") == "run":
                assert (record.run.project, record.run.display_name) == ("sums", "out")
                configured = {item.key: item.value_json for item in record.run.config.update}
                assert json.loads(configured["learner"])["lr"] == 1e-3
            if record.WhichOneof("record_type") == "history":
                step = record.history.step.num
                by_start[-1].append(step)
                items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
                assert told.setdefault(step, json.loads(items["reward"])) == json.loads(items["reward"])
                if step > 5:  # those before may have been told anew, out of metrics.jsonl
                    assert ("completions/_type" in items) == (step == 8)
    assert told == pytest.approx(rewards)
    assert by_start[0] == list(range(1, len(by_start[0]) + 1)), "as much as its process wrote before the kill"
    assert by_start[1] == list(range(1, STEPS + 1)), "the killed start's steps are told anew"


def test_trackio_has_each_step_once_under_one_name(killed: Killed, rewards: dict[int, float]) -> None:
    name = json.loads((killed.out / "trackio.json").read_bytes())["id"]
    assert name.startswith("out-")
    told: dict[int, float] = {}
    with closing(sqlite3.connect(killed.trackio / "sums.db")) as store:
        for run, step, text in store.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step"):
            assert run == name
            assert step not in told
            told[step] = json.loads(text)["reward"]
    assert told == pytest.approx(rewards)
