"""The program as it is started from a shell: signals, terminals, kills, questions from outside, the daemon."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import troupe
from tests.support.fakes import same_bits, tiny_config, write_prompts, write_ragged_model
from tests.support.runs import column, completions, lines, names_in, policy_of, summary
from troupe.checkpoint import list_checkpoints
from troupe.run.config import write_config

pytestmark = pytest.mark.slow
PATIENCE_S = 90.0
REWARD = """
import os, time

def paced(completion_ids, trainer_state, **_):
    gate = os.environ.get("GATE")
    while gate and trainer_state.global_step >= 3 and not os.path.exists(gate):
        time.sleep(0.01)
    return [sum(ids) % 13 / 13 for ids in completion_ids]
"""
"""Where a gate is named, the fourth step waits until it is there."""
Process = subprocess.Popen[str]


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(Path(troupe.__file__).parents[1]), "COLUMNS": "100"} | more


def start(*arguments: str | Path, cwd: Path, **more: str) -> Process:
    """`troupe …`, with pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "troupe", *map(str, arguments)],
        cwd=cwd,
        env=environment(**more),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding=more.get("PYTHONIOENCODING", "utf-8").replace("ascii", "utf-8"),  # as click takes it
    )


def ended(process: Process) -> tuple[int, str, str]:
    """Exit code, what was said, and what was complained of."""
    out, err = process.communicate(timeout=PATIENCE_S)
    return process.returncode, out, err


def said(*arguments: str | Path, cwd: Path, **more: str) -> str:
    code, out, err = ended(start(*arguments, cwd=cwd, **more))
    assert code == 0, err
    return out


def until(there: Callable[[], Any], process: Process | None = None) -> None:
    """Wait for what another process is about to do."""
    until_s = time.monotonic() + PATIENCE_S
    while not there():
        assert process is None or process.poll() is None, process and process.communicate()
        assert time.monotonic() < until_s
        time.sleep(0.01)


@contextmanager
def started(*arguments: str | Path, cwd: Path, **more: str) -> Iterator[Process]:
    """A process that is gone afterwards, whatever happens."""
    process = start(*arguments, cwd=cwd, **more)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def steps_in(run: Path) -> int:
    try:
        return len(lines(run))
    except (OSError, ValueError):
        return 0


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, prompts, a reward that takes its time, and run files of 6 and of 5000 steps."""
    folder = tmp_path_factory.mktemp("bench")
    write_ragged_model(folder / "m")
    write_prompts(folder / "p.json")
    (folder / "r.py").write_text(REWARD)
    for name, steps in (("run.toml", 6), ("long.toml", 5000)):
        settings: dict[str, Any] = {
            "data__path": str(folder / "p.json"),
            "rewards__functions": [f"{folder / 'r.py'}:paced"],
            "learner__max_steps": steps,
            "checkpoint__every": 1,
            "checkpoint__keep": 3,
            "metrics__sinks": ["console", "jsonl", "sqlite"],
            "schedule__blas_threads": 1,
            "daemon__first_pause_s": 0.05,
            "daemon__longest_pause_s": 0.05,
        }
        write_config(tiny_config(folder / "m", folder, **settings), folder / name)
    return folder


@pytest.fixture(scope="module")
def whole(bench: Path) -> Path:
    """The run of 6 steps that nothing happened to."""
    said("train", "run.toml", "-o", "whole", cwd=bench)
    return bench / "whole"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_interrupted_saves_and_resume_goes_on_as_if_nothing_had_been(
    bench: Path, whole: Path, number: signal.Signals
) -> None:
    out, gate = bench / number.name, bench / f"{number.name}.gate"
    with started("train", "run.toml", "-o", out, cwd=bench, GATE=str(gate)) as run:
        until(lambda: steps_in(out) >= 2, run)
        run.send_signal(number)
        assert run.stderr is not None
        heard = run.stderr.readline()
        gate.touch()
        code, told, complaint = ended(run)
    assert (code, complaint) == (130, "")
    assert heard == "interrupt: finishing the steps begun; a second signal ends at once with the last completed one\n"
    assert f"interrupted; go on with: troupe train -o {out} --resume" in told
    assert 2 <= summary(out).steps < 6
    said("train", "-o", out, "--resume", cwd=bench)
    assert same_bits(policy_of(out), policy_of(whole))
    assert completions(out) == completions(whole)


def test_a_run_that_is_killed_loses_nothing_that_it_had_told(bench: Path, whole: Path) -> None:
    out, gate = bench / "killed", bench / "never.gate"
    for steps in (1, 2, 3):
        with started("train", "run.toml", "-o", out, "--resume", cwd=bench, GATE=str(gate)) as run:
            until(lambda steps=steps: steps_in(out) >= steps and list_checkpoints(out), run)  # type: ignore[misc]
            run.kill()
    assert "killed" in said("status", out, cwd=bench)
    said("train", "run.toml", "-o", out, "--resume", cwd=bench)
    assert same_bits(policy_of(out), policy_of(whole))
    assert completions(out) == completions(whole)
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4, 5, 6]


def test_three_impatient_interrupts_leave_at_once_and_what_was_saved_is_whole(bench: Path, whole: Path) -> None:
    out = bench / "impatient"
    with started("train", "run.toml", "-o", out, cwd=bench) as run:
        until(lambda: list_checkpoints(out), run)
        for _ in range(3):
            run.send_signal(signal.SIGINT)
            time.sleep(0.02)
        code, _, complaint = ended(run)
    # by the signal itself, where Python is about to end anyway; rarely by C++, which MLX's threads are still at work in
    assert code in (130, -signal.SIGINT, -signal.SIGABRT), complaint
    assert "Traceback" not in complaint
    said("train", "run.toml", "-o", out, "--resume", cwd=bench)
    assert same_bits(policy_of(out), policy_of(whole))


def test_ctrl_c_in_a_terminal_ends_a_run_and_gives_the_terminal_back(bench: Path) -> None:
    out = bench / "terminal"
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 110, 0, 0))
    before = termios.tcgetattr(slave)
    process = subprocess.Popen(
        [sys.executable, "-m", "troupe", "train", "long.toml", "-o", str(out)],
        cwd=bench,
        env=environment(TERM="xterm-256color"),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(slave, termios.TIOCSCTTY, 0),
    )
    shown, pressed, until_s = b"", False, time.monotonic() + PATIENCE_S
    try:
        while process.poll() is None:
            assert time.monotonic() < until_s, shown[-2000:]
            if select.select([master], [], [], 0.05)[0]:
                shown += os.read(master, 1 << 16)
            if not pressed and steps_in(out) >= 2:
                os.write(master, b"\x03")
                pressed = True
        while select.select([master], [], [], 0.2)[0]:
            shown += os.read(master, 1 << 16)
        after = termios.tcgetattr(slave)
    finally:
        if process.poll() is None:
            process.kill()
        os.close(slave)
        os.close(master)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode(errors="replace"))
    assert process.returncode == 130
    assert "interrupt: finishing the steps begun" in text
    assert "reward" in text
    assert "Traceback" not in text
    assert after == before
    assert shown.count(b"\x1b[?25l") == shown.count(b"\x1b[?25h"), "the cursor is there again"


def test_a_run_in_a_shell_answers_every_question_from_another(bench: Path) -> None:
    out = bench / "asked"
    with started("train", "long.toml", "-o", out, "--set", "learner.lr_scheduler=constant", cwd=bench) as run:
        until(lambda: steps_in(out) >= 1, run)

        def status() -> dict[str, Any]:
            found: dict[str, Any] = json.loads(said("status", out, "--json", cwd=bench))
            return found

        def ask(*arguments: str) -> str:
            return said(arguments[0], str(out), *arguments[1:], cwd=bench)

        assert status()["phase"] == "running"
        ask("pause")
        until(lambda: status()["phase"] == "paused" and not status()["groups"], run)
        stood = status()["step"]
        assert "paused" in said("status", out, cwd=bench)
        ask("set", "learner.lr=0.125")
        ask("step", "-n", "2")
        until(lambda: status()["step"] == stood + 2, run)
        until(lambda: steps_in(out) == stood + 2, run)
        assert column(out, "learning_rate")[-1] == pytest.approx(0.125)
        ask("checkpoint")
        refused = start("set", out, "learner.batch_size=8", cwd=bench)
        code, _, complaint = ended(refused)
        assert (code, "cannot change while a run is live" in complaint) == (3, True)
        ask("resume")
        until(lambda: status()["step"] > stood + 2, run)
        ask("drain")
        code, told, _ = ended(run)
    assert code == 0, "it was asked to end, and did"
    assert "of 5000 steps" in told
    assert names_in(out) >= {"final", "changes.jsonl", "summary.json"}
    code, _, complaint = ended(start("pause", out, cwd=bench))
    assert code == 2
    assert str(out) in complaint


def test_stop_from_another_shell_ends_at_once_and_resume_goes_on(bench: Path, whole: Path) -> None:
    out, gate = bench / "stopped", bench / "stopped.gate"
    with started("train", "run.toml", "-o", out, cwd=bench, GATE=str(gate)) as run:
        until(lambda: steps_in(out) >= 1, run)
        said("stop", out, cwd=bench)
        gate.touch()
        ended(run)
    assert summary(out).steps < 6
    assert "final" not in names_in(out)
    said("train", "-o", out, "--resume", cwd=bench)
    assert same_bits(policy_of(out), policy_of(whole))


def test_the_daemon_brings_a_killed_trainer_back_and_the_policy_is_the_one_of_a_plain_run(
    bench: Path, whole: Path
) -> None:
    out, gate = bench / "kept", bench / "kept.gate"
    with started("daemon", "run.toml", "-o", out, cwd=bench, GATE=str(gate)) as daemon:
        until(lambda: steps_in(out) >= 2, daemon)
        listed = subprocess.run(["ps", "-axo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        children = [int(pid) for pid, parent in map(str.split, listed.splitlines()) if int(parent) == daemon.pid]
        assert children
        os.kill(children[0], signal.SIGKILL)
        gate.touch()
        code, _, log = ended(daemon)
    assert code == 0, log
    assert "SIGKILL" in log
    assert "the run is complete: 6 of 6 steps" in log
    assert same_bits(policy_of(out), policy_of(whole))
    assert completions(out) == completions(whole)


def test_two_runs_without_a_named_folder_get_two(bench: Path) -> None:
    first = start("train", "run.toml", "--set", "output=runs/a", "--max-steps", "1", cwd=bench)
    flags = ("-m", "m", "-d", "p.json", "--num-generations", "2", "--batch-size", "2", "--max-steps", "1")
    others = [start("train", *flags, "--reward", "length", cwd=bench) for _ in range(2)]
    for process in (first, *others):
        code, _, complaint = ended(process)
        assert code == 0, complaint
    assert names_in(bench / "runs") == {"a", "p-001", "p-002"}
    assert all(summary(bench / "runs" / name).complete for name in ("a", "p-001", "p-002"))


def test_a_reward_in_a_process_may_print_crash_and_hang_and_costs_only_its_own_scores(bench: Path) -> None:
    (bench / "wild.py").write_text(
        "import os, sys, time\n"
        "def wild(completions, completion_ids, **_):\n"
        "    print('printed by the reward')\n"
        "    print('and complained', file=sys.stderr)\n"
        "    for ids in completion_ids:\n"
        "        if sum(ids) % 11 == 0:\n            os._exit(3)\n"
        "        if sum(ids) % 11 == 1:\n            time.sleep(3600)\n"
        "    return [sum(ids) % 13 / 13 for ids in completion_ids]\n"
    )
    settings = ('rewards.functions=["wild.py:wild"]', 'rewards.run=["process"]', "rewards.timeout_s=4")
    flags = [flag for setting in settings for flag in ("--set", setting)]
    said("train", "run.toml", *flags, "--max-steps", "2", "-o", "wild", cwd=bench)
    result = summary(bench / "wild")
    assert result.complete
    stored = completions(bench / "wild")
    for c in stored:
        assert (c.scores["wild"] is None) == (sum(c.token_ids) % 11 in (0, 1))
    assert any(c.scores["wild"] is None for c in stored)
    assert result.incidents


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_knows_few_letters_is_told_what_it_can_show(bench: Path, encoding: str) -> None:
    (bench / "fox.json").write_text(json.dumps([{"prompt": "🦊 日本 é", "answer": "ß"}]), encoding="utf-8")
    flags = ("-m", "m", "-d", "fox.json", "--num-generations", "2", "--batch-size", "1", "--max-steps", "2")
    out = f"fox-{encoding}"
    more = {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    told = said("train", *flags, "--reward", "length", "-o", out, cwd=bench, **more)
    assert "2 of 2 steps" in told
    assert "prompt" in said("inspect", out, cwd=bench, **more)
    assert said("inspect", out, "--step", "all", "--json", cwd=bench, **more).count("\n") == 4
    assert said("generate", "-m", "m", "-p", "ab", "--seed", "3", "--max-new-tokens", "20", cwd=bench, **more)


def test_the_installed_program_and_the_module_are_one(bench: Path) -> None:
    script = Path(sys.executable).with_name("troupe")
    if not script.exists():
        pytest.skip("troupe is not installed beside this Python")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True, env=environment())
    assert done.stdout == said("--version", cwd=bench)


def test_without_a_home_and_with_little_in_the_environment_a_run_is_a_run(bench: Path, whole: Path) -> None:
    kept = "PATH", "TMPDIR", "OPENBLAS_"  # the last choose its kernels, of which each has bits of its own
    few = {name: value for name, value in os.environ.items() if name.startswith(kept)}
    few["PYTHONPATH"] = str(Path(troupe.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-m", "troupe", "train", "run.toml", "-o", "bare"],
        cwd=bench,
        env=few,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert same_bits(policy_of(bench / "bare"), policy_of(whole))
