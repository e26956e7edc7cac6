"""The command line: flags to config, the default rules, whole runs, signals, exit codes, what is printed, the plan."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import anyio
import msgspec
import pytest
from click.testing import CliRunner, Result

import troupe
from tests.support.fakes import same_bits, tiny_config, write_prompts, write_ragged_model
from troupe.checkpoint import list_checkpoints, load_checkpoint
from troupe.cli.config import train_config
from troupe.cli.demo import DEMO_CONFIG
from troupe.cli.evaluate import aloud
from troupe.cli.main import main
from troupe.cli.train import describe_plan, run_in_terminal, tell_result
from troupe.policy import load_policy
from troupe.run.config import config_table, load_config
from troupe.run.prepare import prepare
from troupe.run.result import RunResult
from troupe.run.status import Progress

RUN = ("-m", "m", "-d", "p.json", "--num-generations", "3", "--batch-size", "2", "--lr", "0.01")
SHORT = ("--set", "generation.max_completion_length=8")
LONGER = ("--allow-change", "learner.max_steps")


@pytest.fixture(scope="module")
def ragged_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ragged_model(tmp_path_factory.mktemp("models") / "ragged")


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, ragged_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model `m` and prompts `p.json`."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ragged_model, tmp_path / "m")
    write_prompts(tmp_path / "p.json")
    return tmp_path


def call(*arguments: str, text: str | None = None) -> Result:
    return CliRunner().invoke(main, arguments, input=text)


def done(*arguments: str, text: str | None = None) -> str:
    """What a call that must succeed prints."""
    result = call(*arguments, text=text)
    assert result.exit_code == 0, result.output
    return result.stdout


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_flags_become_config(workplace: Path) -> None:
    config = train_config(
        None,
        resume=False,
        model="m",
        dataset="p.json",
        output="o",
        rewards=("length", "r.py:f"),
        settings=("learner.beta=0.5", "generation.top_k=7"),
        seed=9,
        num_generations=5,
        lr=0.25,
        epochs=2,
        batch_size=3,
        max_steps=None,
    )
    assert (config.model.path, config.data.path) == (str(workplace / "m"), str(workplace / "p.json"))
    assert config.rewards.functions == ("length", f"{workplace / 'r.py'}:f")
    assert (config.output, config.seed) == ("o", 9)
    assert (config.generation.num_generations, config.generation.top_k) == (5, 7)
    learner = config.learner
    assert (learner.lr, learner.epochs, learner.batch_size, learner.max_steps, learner.beta) == (0.25, 2, 3, None, 0.5)


def test_flags_and_settings_overrule_the_file(workplace: Path) -> None:
    (workplace / "run.toml").write_text('seed = 3\n[learner]\nlr = 1e-3\nbeta = 0.1\n[model]\npath = "m"\n')
    config = train_config(workplace / "run.toml", resume=False, seed=4, settings=("learner.lr=1e-4",), lr=1e-2)
    assert (config.seed, config.learner.lr, config.learner.beta) == (4, 1e-4, 0.1)
    assert config.data.path is None, "a file that names no data does not get the demo's"


def test_a_file_may_leave_to_a_flag_what_its_keys_ask_for(workplace: Path) -> None:
    (workplace / "run.toml").write_text('[model]\npath = "m"\n[adapter]\nalpha = 3.0\nrank = 16\n')
    found = train_config(Path("run.toml"), resume=False, lora=8).adapter
    assert (found.kind, found.rank, found.alpha) == ("lora", 8, 3.0)
    told = call("train", "run.toml")
    assert (told.exit_code, told.stderr.count("run.toml: adapter")) == (2, 1)
    assert "adapter.alpha is given, but adapter.kind names no adapter" in told.stderr
    told = call("train", "-m", "m", "--lora", "16", "--adapter", "x")
    assert "--lora: adapter.rank is given beside adapter.resume_from" in told.stderr


def test_the_demo_rules_where_nothing_is_given() -> None:
    demo = load_config(DEMO_CONFIG)
    assert train_config(None, resume=False) == demo
    assert train_config(None, resume=False, max_steps=1).learner == msgspec.structs.replace(demo.learner, max_steps=1)


def test_otherwise_the_general_defaults_rule_with_the_demo_s_missing_part(workplace: Path) -> None:
    demo = load_config(DEMO_CONFIG)
    for given in ({"model": "m"}, {"settings": ("model.path=m",)}):
        config = train_config(None, resume=False, **given)
        assert (config.model.path, config.data.path) == (str(workplace / "m"), demo.data.path)
        assert config.learner.lr is None
        assert config.data.eval_path is None
    config = train_config(None, resume=False, dataset="p.json")
    assert (config.model.path, config.data.path) == (demo.model.path, str(workplace / "p.json"))
    assert (config.learner.lr, config.learner.batch_size, config.learner.epochs) == (None, 4, 3)
    assert config.rewards.functions == ()


def test_a_run_prints_plain_lines_and_what_became_of_it(workplace: Path) -> None:
    out = done("train", *RUN, *SHORT, "-o", "out", "--max-steps", "2", "--seed", "1", "--reward", "length")
    assert "\x1b" not in out
    assert "out: step 0 of 2, into " in out
    assert "step 2/2  reward " in out
    assert "2 of 2 steps in " in out
    assert "groups: 4 trained" in out
    assert f"policy: {workplace / 'out' / 'final'}" in out
    newest = load_checkpoint(list_checkpoints(workplace / "out")[0])
    assert same_bits(load_policy(workplace / "out" / "final").weights, newest.weights)
    stored = load_config(workplace / "out" / "run.toml")
    assert (stored.seed, stored.rewards.functions, stored.output) == (1, ("length",), str(workplace / "out"))


def test_without_output_runs_are_numbered(workplace: Path) -> None:
    for _ in range(2):
        done("train", *RUN, *SHORT, "--max-steps", "1")
    assert names_in(workplace / "runs") == {"p-001", "p-002"}


def test_dry_run_prints_the_plan_and_writes_nothing(workplace: Path) -> None:
    before = sorted(workplace.rglob("*"))
    out = done("train", *RUN, "--dry-run", "-o", "out")
    assert sorted(workplace.rglob("*")) == before
    assert "note: generation.max_completion_length lowered from 256 to 59" in out
    table = tomllib.loads("".join(line + "\n" for line in out.splitlines() if not line.startswith("note: ")))
    assert table["generation"]["max_completion_length"] == 59
    assert table["rewards"]["functions"] == ["exact_answer"]
    assert table["output"] == str(workplace / "out")
    assert "# 8 steps into" in out
    assert "# memory at the most, MB" in out
    assert table["learner"]["gradient_accumulation_steps"] == 1
    tight = done("train", *RUN, "--dry-run", "-o", "out", "--memory-limit", "0.01")
    assert "note: memory: at most 0.0 of 0.01 GB" in tight
    assert "memory_limit_gb = 0.01" in tight
    refused = call("train", *RUN, "--dry-run", "-o", "out", "--memory-limit", "0.0001")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("troupe: memory_limit_gb is 0.0001, of which 5%")


def test_resume_reads_the_stored_config_and_goes_on(workplace: Path) -> None:
    done("train", *RUN, *SHORT, "-o", "out", "--max-steps", "2", "--reward", "length")
    refused = call("train", *RUN, *SHORT, "-o", "out")
    assert refused.exit_code == 2
    assert "add --resume" in refused.stderr
    refused = call("train", "-o", "out", "--resume", "--max-steps", "3")
    assert refused.exit_code == 2
    assert "  learner.max_steps: 2 → 3\nleave them out" in refused.stderr
    out = done("train", "-o", "out", "--resume", "--max-steps", "3", *LONGER)
    assert "note: going on after step 2" in out
    assert "note: learner.max_steps: 2 → 3, as allowed" in out
    assert "note: the run now has 3 steps, 2 before; the linear learning rate counts the new number" in out
    assert "3 of 3 steps" in out
    assert "groups: 2 trained" in out
    summary = json.loads((workplace / "out" / "summary.json").read_text())
    assert (summary["steps"], summary["version"]) == (3, 3)
    stored = config_table(load_config(workplace / "out" / "run.toml"))
    assert (stored["learner"]["lr"], stored["learner"]["max_steps"]) == (0.01, 3)
    assert stored["rewards"]["functions"] == ("length",)


def test_what_a_run_file_does_not_say_stays_as_it_was_on_a_resume(workplace: Path) -> None:
    (workplace / "sub").mkdir()
    shutil.move("p.json", "sub/p.json")
    file = workplace / "sub" / "run.toml"
    file.write_text(
        'output = "out"\n[model]\npath = "../m"\n[data]\npath = "p.json"\n'
        "[generation]\nmax_completion_length = 500\n[learner]\nlr = 1e-2\nbatch_size = 2\n"
    )
    flags = ("--max-steps", "1", "--num-generations", "2", "--set", "learner.beta=0.1")
    done("train", str(file), *flags, "--lr", "1e-3", "--reward", "length")
    stored = load_config(workplace / "out" / "run.toml")
    assert (stored.generation.max_completion_length, stored.learner.lr, stored.learner.beta) == (59, 1e-3, 0.1)
    again = call("train", str(file), "--resume")
    assert again.exit_code == 2
    assert "  learner.lr: 0.001 → 0.01\nleave them out" in again.stderr, "the file says another one than the flag did"
    file.write_text(file.read_text().replace("lr = 1e-2\n", ""))
    assert "1 of 1 steps" in done("train", str(file), "--resume")
    assert load_config(workplace / "out" / "run.toml") == stored
    assert "1 of 1 steps" in done("train", str(file), "-o", str(workplace / "out"), "--resume")
    file.write_text(file.read_text() + "lr = 7\n")
    wrong = call("train", str(file), "--resume")
    assert wrong.stderr.startswith(f"troupe: {file}: learner.lr is 7")
    dry = done("train", "-o", "out", "--resume", "--lr", "0.5", "--allow-change", "learner.lr", "--dry-run")
    assert "note: learner.lr: 0.001 → 0.5, as allowed" in dry
    assert load_config(workplace / "out" / "run.toml") == stored


def test_resume_without_a_checkpoint_starts_from_the_beginning(workplace: Path) -> None:
    out = done("train", *RUN, *SHORT, "-o", "out", "--max-steps", "1", "--resume")
    assert "no whole checkpoint yet, so the run starts from the beginning" in out
    assert "1 of 1 steps" in out


def test_resume_of_a_name_that_is_mistyped_does_not_begin_the_demo(workplace: Path) -> None:
    refused = call("train", "-o", "uot", "--resume")
    assert refused.exit_code == 2
    assert (
        refused.stderr == "troupe: uot: there is no run here to go on with; correct the name, or leave out --resume\n"
    )
    assert not (workplace / "uot").exists()


def test_resume_without_the_config_asks_for_it(workplace: Path) -> None:
    (workplace / "o" / "checkpoints" / "step-00000001").mkdir(parents=True)
    refused = call("train", "-o", "o", "--resume")
    assert refused.exit_code == 2
    assert "there are checkpoints, but no run.toml" in refused.stderr
    assert "troupe train RUN.toml -o o --resume" in refused.stderr


def test_resume_falls_back_to_an_older_checkpoint(workplace: Path) -> None:
    settings = (*SHORT, "--set", "checkpoint.every=1", "--set", "checkpoint.keep=3", "--reward", "length")
    done("train", *RUN, *settings, "-o", "whole", "--max-steps", "3")
    shutil.copytree("whole", "out")
    damaged = workplace / "out" / "checkpoints" / "step-00000003" / "optimizer.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    out = done("train", "-o", "out", "--resume", "--set", f"output={workplace / 'out'}")
    assert "optimizer.safetensors: size or sha256 differs" in out
    assert "trying the one before" in out
    assert "going on after step 2" in out
    weights = [load_policy(workplace / run / "final").weights for run in ("whole", "out")]
    assert same_bits(*weights)


INTERRUPTING = """
import os, signal, time
calls = 0
def f(completions, completion_ids, **columns):
    global calls
    calls += 1
    if calls == 3:
        for number in ({signals}):
            os.kill(os.getpid(), number)
        time.sleep(0.5)  # in a thread: the signals are heeded before this step is learned
    return [sum(ids) % 7 for ids in completion_ids]
"""


@pytest.mark.parametrize("signal_name", ["SIGINT", pytest.param("SIGHUP", marks=pytest.mark.slow)])
def test_an_interrupt_or_a_closed_terminal_finishes_the_step_and_can_be_resumed(
    workplace: Path, signal_name: str
) -> None:
    (workplace / "r.py").write_text(INTERRUPTING.format(signals=f"signal.{signal_name},"))
    result = call("train", *RUN, *SHORT, "-o", "out", "--epochs", "99", "--reward", "r.py:f")
    assert result.exit_code == 130
    steps = json.loads((workplace / "out" / "summary.json").read_text())["steps"]
    assert 2 <= steps < 248
    assert f"interrupted; go on with: troupe train -o {workplace / 'out'} --resume" in result.stdout
    assert load_checkpoint(list_checkpoints(workplace / "out")[0]).state.version == steps
    assert "final" in names_in(workplace / "out")
    rest = done("train", "-o", "out", "--resume", "--max-steps", str(steps + 1), *LONGER)
    assert f"{steps + 1} of {steps + 1} steps" in rest


def test_a_second_signal_writes_only_the_checkpoint(workplace: Path) -> None:
    (workplace / "r.py").write_text(INTERRUPTING.format(signals="signal.SIGINT, signal.SIGTERM"))
    result = call("train", *RUN, *SHORT, "-o", "out", "--epochs", "99", "--reward", "r.py:f")
    assert result.exit_code == 130
    assert [path.name for path in list_checkpoints(workplace / "out")] == ["step-00000001"]
    assert "final" not in names_in(workplace / "out")
    assert "policy:" not in result.stdout


@pytest.mark.slow
def test_a_real_process_drains_on_sigint(workplace: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(troupe.__file__).parents[1])}
    command = [sys.executable, "-m", "troupe", "train", *RUN, *SHORT, "-o", "out", "--epochs", "9999"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stdout is not None
        told = []
        for line in run.stdout:
            told.append(line)
            if line.startswith("step "):
                run.send_signal(signal.SIGINT)
                break
        out, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert err == "interrupt: finishing the steps begun; a second signal ends at once with the last completed one\n"
    assert "\x1b" not in "".join(told) + out
    steps = load_checkpoint(list_checkpoints(workplace / "out")[0]).state.version
    assert f"{steps} of 24998 steps" in out
    rest = done("train", "-o", "out", "--resume", "--max-steps", str(steps + 1), *LONGER)
    assert f"{steps + 1} of {steps + 1} steps" in rest


def test_everything_worth_telling_of_a_result_is_told(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tell_result(
        RunResult(
            folder=str(workplace),
            steps=3,
            total_steps=4,
            version=3,
            wall_s=12.34,
            closed_groups={"trained": 5, "quarantined": 1},
            incidents={"reward_timeout": 2},
            switched_off_sinks={"jsonl": "OSError: disk full"},
            accuracy_before=0.25,
            accuracy_after=0.905,
            rewards_before={"r": 0.5},
            rewards_after={"r": 0.75},
            unevaluated=(2, 3),
        )
    )
    assert capsys.readouterr().out.splitlines() == [
        "3 of 4 steps in 12.3 s; groups: 1 quarantined, 5 trained",
        "incidents: 2 reward_timeout",
        "the sink jsonl was switched off: OSError: disk full",
        "held-out greedy accuracy: 25.0% before, 90.5% after",
        "held-out r: 0.500 before, 0.750 after",
        "not evaluated yet, which --resume makes up for: step 2, 3",
    ]


def test_generate(workplace: Path) -> None:
    flags = ("generate", "-m", "m", "--max-new-tokens", "12", "--seed", "5", "--top-k", "30")
    expected = load_policy("m").generate_text("abc", 12, 0.8, 0.95, 30, 5)
    assert done(*flags, "-p", "abc") == expected + "\n"
    assert done(*flags, "-p", "-", text="abc") == expected + "\n"
    assert call("generate", "-m", "gone", "-p", "abc").exit_code == 2
    assert call("generate", "-m", "m", "-p", "x" * 100).exit_code == 2
    assert call("generate", "-m", "m", "-p", "").exit_code == 2
    greedy = load_policy("m").generate_text("ab", 3, temperature=0.0)
    assert done("generate", "-m", "m", "-p", "ab", "--temperature", "0", "--max-new-tokens", "3") == greedy + "\n"


@pytest.mark.parametrize(
    "flag", [("--temperature", "nan"), ("--temperature", "inf"), ("--top-p", "nan"), ("--top-k", "-1")]
)
def test_generate_refuses_what_is_no_number_in_range(flag: tuple[str, str]) -> None:
    result = call("generate", "-m", "m", "-p", "ab", *flag)
    assert result.exit_code == 2
    assert f"Invalid value for '{flag[0]}'" in result.stderr


def test_eval_tells_why_scores_are_missing(workplace: Path) -> None:
    (workplace / "r.py").write_text("def f(completions, **columns):\n    raise OSError('no judge')\n")
    result = call("eval", "-m", "m", "-d", "p.json", "--max-new-tokens", "2", "--json", "--reward", "r.py:f")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["rewards"] == {"f": None}
    assert result.stderr.startswith("note: scores are missing, ")
    assert "the first: reward f: OSError: no judge" in result.stderr


def test_a_reader_who_leaves_changes_nothing_about_the_run(workplace: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(troupe.__file__).parents[1])}
    command = [sys.executable, "-m", "troupe", "train", *RUN, *SHORT, "-o", "out", "--max-steps", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as run:
        assert run.stdout is not None
        assert run.stderr is not None
        run.stdout.close()
        err = run.stderr.read()
    assert (run.returncode, err) == (0, "")
    assert "final" in names_in(workplace / "out")


def test_generate_speaks_with_the_demo_s_policy() -> None:
    assert done("generate", "-p", "1+1=", "--max-new-tokens", "4", "--temperature", "0").strip()


def test_eval(workplace: Path) -> None:
    flags = ("eval", "-m", "m", "-d", "p.json", "--max-new-tokens", "5")
    figures = json.loads(done(*flags, "--json", "--reward", "length"))
    assert figures.keys() == {"rows", "accuracy", "rewards", "figures", "wall_s"}
    assert (figures["rows"], figures["accuracy"], list(figures["rewards"])) == (5, 0.0, ["length_reward"])
    text = done(*flags).splitlines()
    assert text[0].startswith("5 rows in ")
    assert text[1:3] == ["accuracy 0.0% ± 0.0%", "exact_answer_reward 0.0000"]
    assert call("eval", "-m", "m", "-d", "gone.json").exit_code == 2


def test_doctor() -> None:
    report = json.loads(done("doctor", "--json"))
    assert report["python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert report["matmul_gflops"] > 0
    lines = done("doctor")
    assert "CPU matrix products" in lines
    assert f"mlx                  {report['mlx']}" in lines


def test_help_and_version() -> None:
    assert done("--version") == f"troupe, version {troupe.__version__}\n"
    for command in ("train", "generate", "eval", "doctor"):
        assert command in done("--help")
        assert done(command, "-h").startswith(f"Usage: main {command}")


def test_an_evaluation_that_takes_long_says_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """On stderr, so that what is printed stays what it is."""

    async def evaluate(progress: Progress) -> str:
        with progress.at("evaluating"):
            for done in range(1, 6):
                progress.done, progress.total = done, 100
                await anyio.sleep(0.05)
        return "found"

    assert anyio.run(aloud, evaluate, 0.01) == "found"
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert lines[0] == "evaluating 1 / 100"
    assert any(re.fullmatch(r"evaluating [2-5] / 100, about .+ left", line) for line in lines)


@pytest.mark.parametrize(("silent_s", "said"), [(0.0, True), (1000.0, False)])
def test_a_run_that_is_long_in_loading_says_so(capsys: pytest.CaptureFixture[str], silent_s: float, said: bool) -> None:
    config = load_config(None, ["model.path=m", "data.path=p.json", "learner.max_steps=1", "output=out"])
    run = functools.partial(run_in_terminal, config, resume=False, allow_changes=(), silent_s=silent_s)
    result, interrupted = anyio.run(run)
    assert (result.steps, interrupted) == (1, False)
    first = capsys.readouterr().out.splitlines()[0]
    assert (first == "loading the model m and the prompts p.json") == said


def test_the_plan_says_what_matters(tiny_model: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_model, tmp_path, rewards__functions=["length", "diversity"], rewards__weights=[1, 0.5])
    lines = describe_plan(prepare(config))
    assert lines[:2] == [
        f"4 steps into {tmp_path / 'run'}; nothing was written",
        f"model: {tiny_model}, {lines[1].split()[-4]} weights in float32",
    ]
    assert lines[2].startswith("5 prompts of ")
    assert lines[4:8] == [
        "a step: 2 prompts × 3 completions of at most 12 tokens, at temperature 1",
        "rewards: length_reward × 1, diversity_reward × 0.5",
        "learning: dapo, learning rate 0.01 (linear), beta 0",
        "schedule: pinned, max_staleness 0; a checkpoint every 50 steps",
    ]
    assert lines[8].startswith("memory at the most, MB")
    assert lines[-1] == "memory limit: none"
    limited = tiny_config(tiny_model, tmp_path, memory_limit_gb=0.5)
    assert describe_plan(prepare(limited))[-1] == "memory limit: 0.5 GB"


def test_of_a_resumed_run_it_says_what_is_done(tiny_model: Path, tmp_path: Path) -> None:
    troupe.train(tiny_config(tiny_model, tmp_path, learner__max_steps=1))
    longer = tiny_config(tiny_model, tmp_path)
    prepared = prepare(longer, resume=True, allow_changes=["learner.max_steps"])
    assert describe_plan(prepared)[0] == f"4 steps, 1 of them done, into {tmp_path / 'run'}; nothing was written"


def test_the_plan_comes_first_then_notes_then_the_config(workplace: Path) -> None:
    out = done("train", "-m", "m", "-d", "p.json", "-o", "out", "--dry-run")
    plan, _, config = out.partition("\n\n")
    kinds = ["plan" if line.startswith("# ") else "note" for line in plan.splitlines()]
    assert kinds == sorted(kinds, reverse=True)
    assert "note: generation.max_completion_length lowered from" in plan
    assert tomllib.loads(config)["output"] == str(workplace / "out")
    assert not (workplace / "out").exists()
