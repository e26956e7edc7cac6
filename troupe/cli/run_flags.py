"""The flags that commands which make a run have in common, each for `@` above the command."""

import click

model = click.option(
    "-m", "--model", metavar="MODEL_DIR", help="Policy to train: a Hugging Face folder, a hub id, or a run folder."
)
lora = click.option("--lora", type=int, metavar="RANK", help="Train a LoRA adapter of this rank beside the policy.")
adapter = click.option("--adapter", metavar="ADAPTER_DIR", help="Go on with an adapter: a run's, PEFT's or mlx-lm's.")
prompt_column = click.option(
    "--prompt-column", metavar="NAME", help="Column that holds the prompts.  [default: prompt]"
)
chat = click.option("--chat", is_flag=True, help="Take a prompt that is a text as a user's message.")
eval_data = click.option(
    "--eval-data",
    "--eval-dataset",
    "eval_data",
    metavar="PROMPTS",
    help="Held-out prompts, completed before and after the run, or as [evaluation] says.",
)
output = click.option("-o", "--output", metavar="OUT_DIR", help="Run folder; default: the next free runs/NAME-NNN.")
seed = click.option("--seed", type=int, help="Changes the run.  [default: 0]")
memory_limit = click.option("--memory-limit", type=float, metavar="GB", help="Most that the run's arrays may take.")
device = click.option(
    "--device", "devices", multiple=True, metavar="N:ROLES", help="What a card does; may be repeated."
)
resume = click.option("--resume", is_flag=True, help="Go on with the run in OUT_DIR from its newest whole checkpoint.")
allow_change = click.option(
    "--allow-change",
    "allow_changes",
    multiple=True,
    metavar="section.key",
    help="With --resume: a key that may differ from what the run was made with; may be repeated.",
)
settings = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="section.key=value",
    help="Any key that --dry-run lists; may be repeated.",
)
dry_run = click.option(
    "--dry-run", is_flag=True, help="Check everything, print plan and resolved config, train nothing."
)
