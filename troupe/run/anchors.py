"""The paths of a configuration, counted from where it stands."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from troupe.dataset import anchored_source
from troupe.errors import ModelError
from troupe.policy import is_hub_id
from troupe.run.folder_names import moved_demo_file, policy_folder
from troupe.run.tables import anchored_environment, anchored_evaluation, anchored_reward, anchored_schedule
from troupe.runtime.files import expanded

_SOURCES = ("path", "eval_path")
"""Keys of [data] and [warm_start] that name rows."""


def anchor_paths(table: dict[str, Any], base: Path) -> None:
    """Make the input paths of a raw table absolute; values of a wrong type are left for the type check."""
    teacher, several = table.get("teacher"), list[Any]()
    if isinstance(teacher, dict) and isinstance(teacher.get("models"), list | tuple):
        several = [dict(model) if isinstance(model, Mapping) else model for model in teacher["models"]]
        teacher["models"] = several
    for key, model in (("", table.get("model")), ("teacher.path", teacher), *(("teacher.models", m) for m in several)):
        if not isinstance(model, dict) or not isinstance(model.get("path"), str):
            continue
        path = Path(moved_demo_file(str((base / expanded(model["path"])).absolute())))
        if path.exists() or not is_hub_id(model["path"]):
            try:
                model["path"] = str(policy_folder(path))
            except ModelError as error:
                raise ModelError(f"{key}: {error}" if key else str(error)) from None
    adapter = table.get("adapter")
    if isinstance(adapter, dict) and isinstance(adapter.get("resume_from"), str):
        adapter["resume_from"] = str(policy_folder((base / expanded(adapter["resume_from"])).absolute()))
    for section in ("data", "warm_start"):
        if isinstance(data := table.get(section), dict):
            named = {key: data[key] for key in _SOURCES if isinstance(data.get(key), str)}
            data |= {key: moved_demo_file(anchored_source(source, base)) for key, source in named.items()}
    sft = table.get("sft")
    if isinstance(sft, dict) and isinstance(sft.get("eval_dataset"), str):
        sft["eval_dataset"] = moved_demo_file(anchored_source(sft["eval_dataset"], base))
    rewards = table.get("rewards")
    if isinstance(rewards, dict) and isinstance(rewards.get("functions"), list | tuple):
        rewards["functions"] = [anchored_reward(spec, base) for spec in rewards["functions"]]
    for section, anchored in (
        ("environment", anchored_environment),
        ("evaluation", anchored_evaluation),
        ("schedule", anchored_schedule),
    ):
        if isinstance(table.get(section), dict):
            table[section] = anchored(table[section], base)
