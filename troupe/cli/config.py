"""What flags mean as a configuration, and which of them an error is about."""

import re
import shlex
from pathlib import Path
from typing import Any

from troupe.cli.checkpoints import checkpoint_named
from troupe.cli.demo import DEMO_CONFIG
from troupe.errors import InputError, ModelError
from troupe.policy.adapter.files import base_named_in, is_adapter_folder
from troupe.policy.model_files import ADAPTER_CONFIG
from troupe.records.layout import RUN_TOML
from troupe.run.config import (
    Layer,
    RunConfig,
    Task,
    config_table,
    layered,
    load_config,
    read_overrides,
    settings_layers,
)
from troupe.run.folder_names import policy_folder, run_folder_named
from troupe.runtime.files import expanded
from troupe.runtime.terminal import tell

TRAIN_KEYS = {
    "model": "model.path",
    "lora": "adapter.rank",
    "adapter": "adapter.resume_from",
    "dataset": "data.path",
    "prompt_column": "data.prompt_column",
    "chat": "data.chat",
    "eval_data": "data.eval_path",
    "output": "output",
    "lr": "learner.lr",
    "epochs": "learner.epochs",
    "batch_size": "learner.batch_size",
    "num_generations": "generation.num_generations",
    "max_completion_length": "generation.max_completion_length",
    "rewards": "rewards.functions",
    "environment": "environment.factory",
    "tools": "environment.tools",
    "max_steps": "learner.max_steps",
    "seed": "seed",
    "memory_limit": "memory_limit_gb",
    "serve": "cluster.serve",
    "devices": "schedule.devices",
}
"""Parameter of `troupe train` → the key that it sets."""
_NOT_IN_SFT = ("num_generations", "max_completion_length", "environment", "tools", "serve")
SFT_KEYS = {name: key for name, key in TRAIN_KEYS.items() if name not in _NOT_IN_SFT} | {
    name: f"sft.{name}" for name in ("max_length", "eval_dataset", "eval_steps")
}
"""The same of `troupe sft`."""
_KEYS = TRAIN_KEYS | SFT_KEYS
_PLAIN_WORDS = {"output", "seed"}
"""Keys that a message may have as a word of its own."""
_ABOUT = {"chat": "chat template"}
"""Parameter → what messages call that which it asks for."""
_SINGULAR = {"rewards": "--reward", "tools": "--tool", "devices": "--device"}
"""Those that may be repeated → the flag."""
_NAMING = {"model", "adapter", "dataset", "eval_data", "eval_dataset", "rewards", "environment", "tools", "devices"}
"""Those that name a file, a folder, a function or a card."""


def train_config(
    run_toml: Path | None,
    *,
    resume: bool,
    settings: tuple[str, ...] = (),
    output: str | None = None,
    task: Task = "grpo",
    **flags: Any,
) -> RunConfig:
    """The config that the flags of `troupe train` mean, by the names of its parameters; None means "not given".

    Of a run that is resumed all stays that neither `run_toml` nor a flag says.
    """
    said = {} if run_toml is None else read_overrides(run_toml)
    layers = [Layer(str(run_toml), said)]
    name = said.get("output") if output is None else output
    if resume and isinstance(name, str) and (stored := run_folder_named(name) / RUN_TOML).is_file():
        run_toml = stored
    else:
        layers = []  # which is read as it is
    named = {setting.partition("=")[0].strip() for setting in settings} & {"model.path", "data.path"}
    if run_toml is None and flags.get("adapter") and not flags.get("model") and "model.path" not in named:
        flags["model"] = _base_of(flags["adapter"])
    if run_toml is None and not (flags.get("model") or flags.get("dataset") or named):
        if resume and isinstance(name, str) and any(run_folder_named(name).glob("checkpoints/step-*")):
            raise InputError(
                f"{name}: there are checkpoints, but no {RUN_TOML}, which says what the run was made with; give it the "
                f"config that it began with: troupe train RUN.toml -o {shlex.quote(name)} --resume"
            )
        if resume and isinstance(name, str):  # a name that was mistyped must not begin the demo
            raise InputError(f"{name}: there is no run here to go on with; correct the name, or leave out --resume")
        run_toml = DEMO_CONFIG
    if run_toml is None:  # where only the model or only the data is named, the other is the demo's
        demo = config_table(load_config(DEMO_CONFIG))
        layers = [Layer("the demo", {section: {"path": demo[section]["path"]} for section in ("model", "data")})]
    layers += [Layer("the command", {"task": task})] if task != "grpo" else []
    layers += flag_layers({**flags, "output": output})
    return layered(run_toml, [*layers, *settings_layers(settings)])


def _base_of(adapter: str) -> str | None:
    """The base that an adapter names; None where it does not, or is none, which is told where it is read."""
    found = Path(find_adapter(adapter))
    return base_named_in(found) if (found / ADAPTER_CONFIG).is_file() else None


def flag_layers(flags: dict[str, Any]) -> list[Layer]:
    """What flags of `troupe train` say, each by itself."""
    layers = []
    for parameter, key in _KEYS.items():
        value = flags.get(parameter)
        if value is None or value is False or value == ():
            continue
        if parameter in _NAMING and "" in (value if isinstance(value, tuple) else (value,)):
            raise InputError(f"{_flag(parameter)}: its value is empty; give one, or leave the flag out")
        said: Any = "always" if parameter == "chat" else list(value) if isinstance(value, tuple) else value
        for part in reversed(key.split(".")):
            said = {part: said}
        if parameter == "lora":
            said["adapter"]["kind"] = "lora"
        layers.append(Layer(_flag(parameter), said))
    return layers


def _flag(parameter: str) -> str:
    return _SINGULAR.get(parameter) or f"--{parameter.replace('_', '-')}"


def with_flag(error: InputError, flags: dict[str, Any]) -> InputError:
    """The error; where it is about a key or a reward that a flag gave, and does not say so, with the flag."""
    message = str(error)
    if "\n" in message:  # a list of what differs, with its own remedies
        return error
    for parameter, key in _KEYS.items():
        value, flag = flags.get(parameter), _flag(parameter)
        if value is None or value is False or value == () or flag in message:
            continue
        if key not in _PLAIN_WORDS and (_mentions(message, key) or _ABOUT.get(parameter, "\n") in message):
            return type(error)(f"{message}; {key} was given by {flag}")
        if isinstance(value, tuple) and (named := [text for text in value if _mentions(message, text)]):
            return type(error)(f"{message}; {named[0]} was given by {flag}")
    return error


def _mentions(message: str, text: str) -> bool:
    return re.search(rf"(?<![\w.-]){re.escape(text)}(?![\w-]|\.\w)", message) is not None


def find_model(model: str | None) -> str:
    """What `-m` names: a model, that of a run or of its checkpoint (RUN@STEP, RUN@best), or without it the demo's."""
    if model is None:
        return str(load_config(DEMO_CONFIG).model.path)
    if (checkpoint := checkpoint_named(model)) is not None:
        return str(checkpoint)
    tell_policy_of_run(model)
    return str(policy_folder(expanded(model)))


def find_adapter(adapter: str) -> str:
    """What `--adapter` names: an adapter folder, or that of a run."""
    return str(policy_folder(expanded(adapter)))


def find_policy(model: str | None, adapter: str | None) -> tuple[str, Path | None]:
    """What `-m` and `--adapter` name: a model, or an adapter that names its base; and the adapter beside it, if any."""
    if adapter is None:
        return find_model(model), None
    found = Path(find_adapter(adapter))
    if model is not None:
        return find_model(model), found
    if not is_adapter_folder(found):
        raise ModelError(f"{found}: holds no adapter; give the folder of one, or a whole model by -m")
    return str(found), None


def tell_policy_of_run(model: str | None) -> None:
    """Tell whoever names the folder of a run which policy that is."""
    if model is not None and (found := policy_folder(expanded(model))) != expanded(model):
        tell(f"note: {model} is the folder of a run, so its policy is taken: {found}", error=True)
