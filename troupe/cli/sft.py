"""`troupe sft`: a run all of whose steps are supervised."""

from pathlib import Path
from typing import Any

import click

from troupe.cli import run_flags
from troupe.cli.commands import Command, report_errors
from troupe.cli.config import SFT_KEYS, tell_policy_of_run, train_config
from troupe.cli.train import carry_out
from troupe.errors import InputError
from troupe.runtime.outlets import unhurried


@click.command(cls=Command, keys=SFT_KEYS, short_help="Learn the completions that rows have.")
@click.argument("run_toml", type=click.Path(path_type=Path), required=False)
@run_flags.model
@run_flags.lora
@run_flags.adapter
@click.option("-d", "--dataset", metavar="ROWS", help="Rows with prompt and completion, or messages: a file or hf:….")
@run_flags.prompt_column
@run_flags.chat
@click.option("--max-length", type=int, metavar="N", help="Cut rows that have more tokens.")
@click.option("--eval-dataset", metavar="ROWS", help="Held-out rows, of which loss and token accuracy are measured.")
@click.option("--eval-steps", type=int, metavar="N", help="Measure them every N steps; else after the last alone.")
@click.option("--eval-data", metavar="PROMPTS", help="Held-out prompts, completed and scored as [evaluation] says.")
@click.option("--reward", "rewards", multiple=True, metavar="NAME|FILE.py:FUNC", help="What scores these completions.")
@run_flags.output
@click.option("--lr", type=float, help="Peak learning rate.  [default: 2e-5; of an adapter 2e-4]")
@click.option("--epochs", type=int, help="Passes over the rows.  [default: 3]")
@click.option("--batch-size", type=int, help="Rows a step.  [default: 4]")
@click.option("--max-steps", type=int, help="Stop after so many steps.")
@run_flags.seed
@run_flags.memory_limit
@run_flags.device
@run_flags.resume
@run_flags.allow_change
@run_flags.settings
@run_flags.dry_run
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
