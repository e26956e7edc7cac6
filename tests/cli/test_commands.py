"""Flags of the commands: those of every day, those of others, values that cannot be used, run folders as models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from tests.support.fakes import write_prompts
from troupe.cli.commands import report_errors
from troupe.cli.config import TRAIN_KEYS, train_config
from troupe.cli.main import main
from troupe.errors import ConfigError, RunError
from troupe.policy import load_policy
from troupe.runtime.terminal import tell, tell_json


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a model `m`, prompts `p.json` and a configuration."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, tmp_path / "m")
    write_prompts(tmp_path / "p.json")
    (tmp_path / "run.toml").write_text('[model]\npath = "m"\n[data]\npath = "p.json"\n')
    return tmp_path


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def refused(*arguments: str) -> str:
    """What a call that must exit with 2, and print nothing else, says."""
    result = call(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    return result.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("train", "--learning-rate", "1e-5"), "No such option '--learning-rate'; it is --lr here"),
        (("train", "--learning_rate=1e-5"), "No such option '--learning_rate'; it is --lr here"),
        (("train", "--iters", "3"), "it is --max-steps here"),
        (("train", "--model_name_or_path", "m"), "it is --model here (models of the families that are known)"),
        (("train", "--dataset_name", "x"), "it is --dataset here"),
        (("train", "--eval_dataset", "x"), "it is --eval-dataset here"),
        (("train", "--train-dataset", "x"), "it is --dataset here"),
        (("train", "--num_generations", "3"), "it is --num-generations here\n"),
        (("train", "--group-size", "3"), "it is --num-generations here"),
        (("train", "--per_device_train_batch_size", "3"), "it is --batch-size here (it counts prompts here, not "),
        (("train", "--adapter-path", "x"), "it is --adapter here (to use one, or to begin with it; what a run makes "),
        (("train", "--lora_r", "8"), "it is --lora here (the default is 16)"),
        (("train", "--lora-alpha", "8"), "it is --set adapter.alpha=8 here (the scale is alpha / rank; left out, "),
        (("train", "--lora_alpha=0.5"), "it is --set adapter.alpha=0.5 here"),
        (("train", "--lora_alpha", "much"), "it is --set adapter.alpha=VALUE here"),
        (("train", "--lora_dropout", "0.1"), "it is --set adapter.dropout=0.1 here (0 unless it is named)"),
        (("train", "--init_lora_weights", "gaussian"), "it is --set adapter.init=gaussian here"),
        (("train", "--scale", "20"), "it is --set adapter.alpha=VALUE here (scale × rank; the scale is 2"),
        (("train", "--exclude-modules", "q_proj"), "it is --set adapter.target_modules=VALUE here (name the others"),
        (("train", "--lora_target_modules", "q_proj", "v_proj"), """--set 'adapter.target_modules=["q_proj"]' here"""),
        (("train", "--lora_target_modules", "all-linear"), "it is --set adapter.target_modules=all-linear here"),
        (("train", "--lora_target_modules", ".*_proj"), "it is --set 'adapter.target_modules=.*_proj' here"),
        (("train", "--use_dora"), "it is --set adapter.kind=VALUE here"),
        (("train", "--use_peft"), "it is --set adapter.kind=VALUE here (--lora RANK says both)"),
        (("train", "--fine-tune-type", "dora"), "it is --set adapter.kind=dora here"),
        (("train", "--num-layers", "8"), "it is --set adapter.layers=8 here"),
        (("train", "--lora-bias"), "there is none here: of each matrix A and B are trained, nothing else"),
        (("train", "--load_in_4bit"), "it is --model here (a folder that mlx_lm.convert -q has made; see adapters)"),
        (("train", "--set", "lora_rank=8"), "unknown key lora_rank; it is adapter.rank here"),
        (("generate", "-p", "x", "--adapter-path", "x"), "it is --adapter here\n"),
        (("eval", "--adapter-path", "x"), "it is --adapter here\n"),
        (("fuse", "--adapter-path", "x"), "it is --adapter here\n"),
        (("fuse", "--save-path", "x"), "it is --output here\n"),
        (("merge",), "it is troupe fuse here"),
        (("train", "--resume_from_checkpoint", "x"), "it is --resume here"),
        (("train", "--max-new-tokens", "3"), "it is --max-completion-length here"),
        (("train", "--beta", "0.04"), "it is --set learner.beta=0.04 here"),
        (("train", "--beta=0.04"), "it is --set learner.beta=0.04 here"),
        (("train", "--learner.lr", "1"), "it is --lr here"),
        (("train", "--shuffle"), "it is --set data.shuffle=VALUE here"),
        (("train", "-lr", "3"), "No such option '-lr'; it is --lr here"),
        (("train", "--report-to", "wandb"), """it is --set 'metrics.sinks=["wandb"]' here"""),
        (("train", "--logging_steps", "5"), "it is --set metrics.sinks=VALUE here"),
        (("train", "--lerning-rate", "1"), "did you mean learning_rate? it is --lr here"),
        (("train", "--wired-limit", "3"), "did you mean wired_limit_gb? it is --set wired_limit_gb=3 here"),
        (("train", "--max-step", "3"), "did you mean --max-steps?"),
        (("train", "--rewards", "length"), "did you mean --reward?"),
        (("train", "--use_vllm"), "there is none here: Troupe generates itself"),
        (("train", "--config", "x.yaml"), "the file is given without a flag: troupe train RUN.toml"),
        (("train", "--zzz"), "what there is: troupe train --help"),
        (("generate", "-p", "x", "--max-tokens", "3"), "it is --max-new-tokens here\n"),
        (("generate", "-p", "x", "--max-completion-length", "3"), "it is --max-new-tokens here\n"),
        (("generate", "-p", "x", "--temp", "1"), "it is --temperature here"),
        (("generate", "-p", "x", "--system-prompt", "x"), "it is --system here"),
        (("generate", "-p", "x", "--lr", "1"), "it is learner.lr in the configuration of a run"),
        (("eval", "--max-tokens", "3"), "it is --max-new-tokens here"),
        (("eval", "--answer-column", "x"), "it is --set data.answer_column=x here"),
        (("eval", "--learning-rate", "1"), "it is learner.lr in the configuration of a run"),
        (("daemon", "run.toml", "--learning-rate", "1"), "it is --set learner.lr=1 here"),
        (("grpo",), "No such command 'grpo'; it is troupe train here"),
        (("trian",), "No such command 'trian'; it is troupe train here"),
        (("run.toml",), "it is troupe train run.toml here"),
        (("foo",), "No such command 'foo'; there are checkpoint, cluster, compare, daemon, "),
        (("train", "--set", "lr=1"), "--set lr=1: unknown key lr; it is learner.lr here"),
        (("train", "--set", "learner.learning_rate=1"), "unknown key learner.learning_rate; it is learner.lr here"),
        (("train", "--set", "use_vllm=true"), "unknown key use_vllm; there is none here: Troupe generates itself"),
        (("train", "--set", "model=m"), "model is 'm': expected a table, got str; it is model.path here"),
        (("eval", "--set", "prompt_column=x"), "write data.key=value; it is data.prompt_column here"),
    ],
)
def test_other_people_s_words_are_answered_with_ours(arguments: tuple[str, ...], told: str) -> None:
    assert told in refused(*arguments)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lr = 1", "unknown key lr; it is learner.lr here"),
        ("[learner]\nlearning_rate = 1", "unknown key learner.learning_rate; it is learner.lr here"),
        (
            "[learner]\nnum_generations = 2",
            "unknown key learner.num_generations; it is generation.num_generations here",
        ),
        (
            "[training]\nlearning_rate = 1",
            "unknown key training; of what stands there, learning_rate: it is learner.lr",
        ),
        ("[lerner]\nlr = 1", "unknown key lerner; did you mean learner?"),
        ("[learner]\nlerning_rate = 1", "did you mean learning_rate? it is learner.lr here"),
        ("[generation]\nuse_vllm = true", "unknown key generation.use_vllm; there is none here"),
    ],
)
def test_so_are_keys_of_a_file_which_is_named(text: str, told: str, workplace: Path) -> None:
    (workplace / "run.toml").write_text(text)
    message = refused("train", "run.toml")
    assert message.startswith("troupe: run.toml: unknown key ")
    assert told in message


BAD = {
    "INT": ("0", "-1", "x", "1.5", "nan"),
    "FLOAT": ("-1", "x", "nan", "inf"),
    "TEXT": ("",),
}
CASES = [
    (param, value)
    for param in main.load_all()["train"].params
    if param.name in TRAIN_KEYS and isinstance(param, click.Option) and not param.is_flag
    for value in BAD[{"INTEGER": "INT"}.get(param.type.name.upper(), param.type.name.upper())]
    if (param.name, value) not in {("seed", "0"), ("output", "")}
]


@pytest.mark.parametrize("file", [(), ("run.toml",)], ids=["demo", "file"])
@pytest.mark.parametrize(("param", "value"), CASES, ids=lambda part: getattr(part, "name", part) or "empty")
def test_a_value_that_cannot_be_used_is_told_of_its_flag(
    param: click.Option, value: str, file: tuple[str, ...]
) -> None:
    flag = param.opts[0] if param.opts[0].startswith("--") else param.opts[1]
    message = refused("train", *file, flag, value)
    assert f"{flag}:" in message or f"'{flag}'" in message
    assert ".toml" not in message.replace("RUN_TOML", "")


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        (("--num-generations", "1"), "--num-generations"),
        (("--set", "learner.gradient_accumulation_steps=99"), "--set learner.gradient_accumulation_steps=99"),
        (
            ("--batch-size", "1", "--num-generations", "2", "--set", "rewards.min_scored=3"),
            "--set rewards.min_scored=3",
        ),
        (("--set", "rewards.weights=[1]", "--reward", "length", "--reward", "diversity"), "--set rewards.weights=[1]"),
        (("--set", "schedule.generator_processes=2", "--set", "schedule.generator=thread"), "--set schedule.generator"),
        (("--set", "rewards.functions=[3]"), "--set rewards.functions=[3]"),
        (("--set", "learner.lr=nan"), "--set learner.lr=nan"),
        (("--lr", "1e-3", "--set", "learner.lr=3"), "--set learner.lr=3"),
    ],
)
def test_what_does_not_go_together_is_told_of_who_said_it(arguments: tuple[str, ...], flag: str) -> None:
    message = refused("train", "run.toml", *arguments)
    assert message.startswith(f"troupe: {flag}")
    assert ".toml" not in message


def test_what_a_file_says_is_told_of_the_file(workplace: Path) -> None:
    (workplace / "run.toml").write_text("[learner]\nlr = 3\nbatch_size = 2\n[generation]\nnum_generations = 2\n")
    assert refused("train", "run.toml", "--seed", "1").startswith("troupe: run.toml: learner.lr is 3")
    (workplace / "run.toml").write_text("[learner]\nbatch_size = 2\n[generation]\nnum_generations = 2\n")
    message = refused("train", "run.toml", "--set", "learner.gradient_accumulation_steps=5")
    assert message.startswith(
        "troupe: --set learner.gradient_accumulation_steps=5: learner.gradient_accumulation_steps"
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--reward", "nosuch"), "nosuch was given by --reward"),
        (("--chat",), "data.chat was given by --chat"),
        (("--prompt-column", "q"), "data.prompt_column was given by --prompt-column"),
        (("--memory-limit", "0.0001"), "memory_limit_gb was given by --memory-limit"),
    ],
)
def test_what_is_found_out_later_names_the_flag_too(arguments: tuple[str, ...], told: str) -> None:
    assert refused("train", *arguments, "--dry-run").rstrip().endswith(told)


def test_the_flags_of_every_day(workplace: Path) -> None:
    config = train_config(
        None,
        resume=False,
        model="m",
        dataset="p.json",
        prompt_column="question",
        chat=True,
        eval_data="held.json",
        max_completion_length=7,
    )
    assert (config.data.prompt_column, config.data.chat) == ("question", "always")
    assert config.data.eval_path == str(workplace / "held.json")
    assert config.generation.max_completion_length == 7
    assert train_config(None, resume=False, chat=False).data.chat == "auto"
    (workplace / "run.toml").write_text('[data]\nchat = "always"\n')
    assert train_config(workplace / "run.toml", resume=False, chat=False).data.chat == "always"


def test_train_takes_a_prompt_column_and_held_out_prompts(workplace: Path) -> None:
    rows = '[{{"{0}": "1+1=", "answer": "2"}}, {{"{0}": "2+2=", "answer": "4"}}]'
    (workplace / "q.json").write_text(rows.format("question"))
    flags = ("--prompt-column", "question", "--eval-dataset", "q.json", "--max-completion-length", "4")
    result = call("train", "-m", "m", "-d", "q.json", *flags, "--dry-run", "-o", "out")
    assert result.exit_code == 0, result.output
    for line in ('prompt_column = "question"', "max_completion_length = 4", f'eval_path = "{workplace / "q.json"}"'):
        assert line in result.stdout
    figures = call("eval", "-m", "m", "-d", "q.json", "--prompt-column", "question", "--max-new-tokens", "2")
    assert figures.stdout.startswith("2 rows in ")


def run_folder(workplace: Path, *, final: bool) -> Path:
    out = workplace / "runs" / "a"
    out.mkdir(parents=True)
    (out / "run.toml").write_text("")
    (out / "metrics.jsonl").write_text("")
    if final:
        shutil.copytree(workplace / "m", out / "final")
    return out


def test_a_run_folder_is_the_policy_that_its_run_ended_with(workplace: Path) -> None:
    out = run_folder(workplace, final=True)
    told = "note: runs/a is the folder of a run, so its policy is taken: runs/a/final\n"
    flags = ("-p", "ab", "--temperature", "0", "--max-new-tokens", "3")
    result = call("generate", "-m", "runs/a", *flags)
    assert (result.exit_code, result.stderr) == (0, told)
    assert result.stdout == load_policy("m").generate_text("ab", 3, temperature=0.0) + "\n"
    result = call("eval", "-m", "runs/a", "-d", "p.json", "--max-new-tokens", "2")
    assert (result.exit_code, result.stderr) == (0, told)
    result = call("train", "-m", "runs/a", "-d", "p.json", "--dry-run")
    assert (result.exit_code, result.stderr) == (0, told)
    assert f'path = "{out / "final"}"' in result.stdout
    assert call("generate", "-m", "runs/a/final", *flags).stderr == ""
    (workplace / "run.toml").write_text('[model]\npath = "runs/a"\n')
    assert train_config(workplace / "run.toml", resume=False).model.path == str(out / "final")


def test_a_run_without_a_final_policy_names_its_newest_checkpoint(workplace: Path) -> None:
    out = run_folder(workplace, final=False)
    message = refused("generate", "-m", "runs/a", "-p", "ab")
    assert message == (
        "troupe: runs/a: the run in this folder has no final policy yet; nor a checkpoint; what it does: "
        "troupe status runs/a\n"
    )
    for step in (2, 10):
        shutil.copytree(workplace / "m", out / "checkpoints" / f"step-{step:08d}")
        (out / "checkpoints" / f"step-{step:08d}" / "MANIFEST.json").write_text("{}")
    (out / "checkpoints" / "step-00000011").mkdir()  # no manifest: it is not whole
    (workplace / "x" / "checkpoints").mkdir(parents=True)
    assert "no config.json, so it is no model folder" in refused("generate", "-p", "ab", "-m", "x"), "no run.toml"
    assert "no config.json, so it is no model folder" in refused("generate", "-p", "ab", "-m", "."), "only a run.toml"
    for command in (("generate", "-p", "ab"), ("eval", "-d", "p.json"), ("train", "-d", "p.json")):
        message = refused(*command, "-m", "runs/a")
        assert message.endswith("its newest checkpoint is a model folder, too: runs/a/checkpoints/step-00000010\n")


# How every command ends


@pytest.mark.parametrize(
    ("fault", "code", "told"),
    [
        (None, 0, ""),
        (ConfigError("no such key"), 2, "troupe: no such key\n"),
        (RunError("it hangs"), 3, "troupe: it hangs\n"),
        (KeyboardInterrupt(), 130, ""),
        (ZeroDivisionError("a bug"), 3, "ZeroDivisionError: a bug\n"),
    ],
)
def test_errors_become_messages_and_exit_codes(
    fault: BaseException | None, code: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    @report_errors
    def command() -> None:
        if fault is not None:
            raise fault

    ended = 0
    try:
        command()
    except SystemExit as end:
        ended = int(end.code or 0)
    assert ended == code
    assert capsys.readouterr().err.endswith(told)


def test_a_reader_who_has_gone_is_no_fault() -> None:
    read, write = os.pipe()
    os.close(read)
    program = "from troupe.runtime.terminal import tell\nfor _ in range(3): tell('x' * 100_000)\n"
    ended = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_lines_and_beginnings_of_lines(capsys: pytest.CaptureFixture[str]) -> None:
    tell("a", newline=False)
    tell("b")
    tell("c", error=True)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("ab\n", "c\n")


def test_what_is_told_does_not_act_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    tell("a\x1b[2J\x07\nb")
    tell_json('{"name": "\x9b\u202e"}')
    tell("as\x07 it is", as_it_is=True)
    assert capsys.readouterr().out == 'a\\x1b[2J\\x07\nb\n{"name": "\\u009b\\u202e"}\nas\x07 it is\n'

    @report_errors
    def command() -> None:
        raise ConfigError("no key \x1b]0;mine\x07")

    @report_errors
    def broken() -> None:
        raise ZeroDivisionError("a bug \x1b[2J")

    for call in (command, broken):
        with pytest.raises(SystemExit):
            call()
        assert "\x1b" not in capsys.readouterr().err
