"""`troupe sft`: a run all of whose steps are supervised."""

from pathlib import Path
from typing import Any

import click

from troupe.cli.commands import Command, report_errors
from troupe.cli.config import SFT_KEYS, tell_policy_of_run, train_config
from troupe.cli.train import carry_out
from troupe.errors import InputError
from troupe.runtime.outlets import unhurried


@click.command(cls=Command, keys=SFT_KEYS, short_help="Learn the completions that rows have.")
@click.argument("run_toml", type=click.Path(path_type=Path), required=False)
@click.option(
    "-m", "--model", metavar="MODEL_DIR", help="Policy to train: a Hugging Face folder, a hub id, or a run folder."
)
@click.option("--lora", type=int, metavar="RANK", help="Train a LoRA adapter of this rank beside the policy.")
@click.option("--adapter", metavar="ADAPTER_DIR", help="Go on with an adapter: a run's, PEFT's or mlx-lm's.")
@click.option("-d", "--dataset", metavar="ROWS", help="Rows with prompt and completion, or messages: a file or hf:….")
@click.option("--prompt-column", metavar="NAME", help="Column that holds the prompts.  [default: prompt]")
@click.option("--chat", is_flag=True, help="Take a prompt that is a text as a user's message.")
@click.option("--max-length", type=int, metavar="N", help="Cut rows that have more tokens.")
@click.option(
    "--eval-data",
    "--eval-dataset",
    "eval_data",
    metavar="PROMPTS",
    help="Held-out prompts, completed before and after the run, or as [evaluation] says.",
)
@click.option("--reward", "rewards", multiple=True, metavar="NAME|FILE.py:FUNC", help="What scores these completions.")
@click.option("-o", "--output", metavar="OUT_DIR", help="Run folder; default: the next free runs/NAME-NNN.")
@click.option("--lr", type=float, help="Peak learning rate.  [default: 2e-5; of an adapter 2e-4]")
@click.option("--epochs", type=int, help="Passes over the rows.  [default: 3]")
@click.option("--batch-size", type=int, help="Rows a step.  [default: 4]")
@click.option("--max-steps", type=int, help="Stop after so many steps.")
@click.option("--seed", type=int, help="Changes the run.  [default: 0]")
@click.option("--memory-limit", type=float, metavar="GB", help="Most that the run's arrays may take.")
@click.option("--device", "devices", multiple=True, metavar="N:ROLES", help="What a card does; may be repeated.")
@click.option("--resume", is_flag=True, help="Go on with the run in OUT_DIR from its newest whole checkpoint.")
@click.option(
    "--allow-change",
    "allow_changes",
    multiple=True,
    metavar="section.key",
    help="With --resume: a key that may differ from what the run was made with; may be repeated.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="section.key=value",
    help="Any key that --dry-run lists; may be repeated.",
)
@click.option("--dry-run", is_flag=True, help="Check everything, print plan and resolved config, train nothing.")
@unhurried()
@report_errors
def sft(run_toml: Path | None, *, resume: bool, dry_run: bool, allow_changes: tuple[str, ...], **flags: Any) -> None:
    """Supervised fine-tuning: teach a policy the completions that rows have.

    A row has `prompt` and `completion`, or `messages`, of which what the assistant says is learned. All else is as in
    `troupe train`: optimizer, adapters, checkpoints, resume, metrics, report.
    """
    named = any(setting.partition("=")[0].strip() == "data.path" for setting in flags["settings"])
    if run_toml is None and not (flags["dataset"] or named or resume):
        raise InputError("there is nothing to learn from; name a file of rows: troupe sft -m MODEL_DIR -d ROWS.jsonl")
    tell_policy_of_run(flags["model"])
    config = train_config(run_toml, resume=resume, task="sft", **flags)
    carry_out(config, flags, resume=resume, dry_run=dry_run, allow_changes=allow_changes)
