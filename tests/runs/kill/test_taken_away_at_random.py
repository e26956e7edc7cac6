"""Real runs whose folder is moved, deleted, exchanged or linked elsewhere at random moments."""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from tests.support.fakes import same_bits
from tests.support.kills import STEPS, Trainer, newest_step, read_store, write_run
from troupe.checkpoint import list_checkpoints, load_checkpoint
from troupe.runtime.lock import read_owner

pytestmark = [pytest.mark.slow, pytest.mark.alone]

ROUNDS = 10


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def harm(dice: random.Random, out: Path, number: int) -> Path | None:
    """Do one → where the run's own folder is now, if it is anywhere."""
    away = out.with_name(f"away-{number}")
    match dice.choice(["move", "move and make anew", "exchange", "link elsewhere", "delete"]):
        case "move":
            return out.rename(away)
        case "move and make anew":
            out.rename(away)
            out.mkdir()
            return away
        case "exchange":
            other = out.with_name(f"other-{number}")
            (other / "checkpoints").mkdir(parents=True)
            out.rename(away)
            other.rename(out)
            out.with_name(f"exchanged-{number}").touch()
            return away
        case "link elsewhere":
            (empty := out.with_name(f"empty-{number}")).mkdir()
            out.rename(away)
            out.symlink_to(empty)
            return away
        case _:
            out.rename(away)
            while away.exists():
                shutil.rmtree(away, ignore_errors=True)
            return None


def is_running(trainer: Trainer, step: int) -> bool:
    """Whether it has the folder, and a checkpoint of some step or a later one."""
    owner = read_owner(trainer.out)
    return owner is not None and owner.pid == trainer.process.pid and newest_step(trainer.out) >= step


def clear(out: Path) -> None:
    if out.is_symlink():
        out.unlink()
    elif out.exists():
        shutil.rmtree(out)


def final_of(folder: Path) -> dict[str, object]:
    newest = load_checkpoint(list_checkpoints(folder)[0])
    assert newest.state.version == STEPS
    return dict(newest.weights)


@pytest.mark.parametrize("staleness", [pytest.param(0, marks=pytest.mark.soak), 1])
def test_no_run_ends_well_with_half_of_it_elsewhere(tmp_path: Path, staleness: int) -> None:
    """Nothing is written in its place, and its own folder goes on to the weights of the run that nobody harmed."""
    config = write_run(tmp_path / "inputs", schedule__max_staleness=staleness)
    assert Trainer(config, tmp_path / "whole").wait() == 0
    whole = final_of(tmp_path / "whole")
    dice = random.Random(staleness)
    out = tmp_path / "runs" / "out"
    out.parent.mkdir()
    harmed = 0
    for number in range(ROUNDS):
        before = newest_step(out)
        trainer = Trainer(config, out)
        is_there = trainer.wait_until(partial(is_running, trainer, before + dice.randrange(0, 3)))
        time.sleep(dice.random() * 0.2)
        if not is_there or trainer.process.poll() is not None:  # it was faster
            assert trainer.wait() == 0
            break
        now = harm(dice, out, number)
        code = trainer.wait()
        # 2: it had not begun, and found another folder there than a moment before
        assert code in (2, 3), (config.parent / "log.txt").read_text()[-4000:]
        left = [str(path.relative_to(out)) for path in out.rglob("*")]
        assert left == (["checkpoints"] if out.with_name(f"exchanged-{number}").exists() else [])
        harmed += 1
        clear(out)
        if now is not None:
            assert "final" not in names_in(now)
            now.rename(out)
    assert harmed >= 3
    assert Trainer(config, out).wait() == 0, (config.parent / "log.txt").read_text()[-4000:]
    assert read_store(out)["steps"] == list(range(1, STEPS + 1))
    assert same_bits(final_of(out), whole)  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform != "linux", reason="what is told of the machine is told of Linux")
def test_an_edited_config_and_a_shell_without_a_compiler_are_refused_by_name(tmp_path: Path) -> None:
    config = write_run(tmp_path / "inputs", learner__max_steps=2)
    out, log = tmp_path / "out", tmp_path / "inputs" / "log.txt"
    assert Trainer(config, out).wait() == 0
    text = (out / "run.toml").read_text()
    (out / "run.toml").write_text(
        text.replace("batch_size = 4", "batch_size = 2").replace("max_steps = 2", "max_steps = 3")
    )
    alone = tmp_path / "inputs" / "nothing.toml"
    alone.write_text("")
    assert Trainer(alone, out).wait() == 2
    assert "learner.batch_size: 4 → 2 (never" in log.read_text()
    assert "learner.max_steps: 2 → 3" in log.read_text()
    (out / "run.toml").write_text(text)
    (out / "metrics.jsonl").unlink()
    path, os.environ["PATH"] = os.environ["PATH"], str(tmp_path)
    try:
        code = Trainer(alone, out).wait()
    finally:
        os.environ["PATH"] = path
    if shutil.which("g++") is not None:
        assert code == 2
        assert "machine.compiler: 'g++' → 'none'" in log.read_text()
    assert Trainer(alone, out).wait() == 0
    assert f"note: {out / 'metrics.jsonl'}: of the 2 steps that are done it lacks 1-2" in log.read_text()
