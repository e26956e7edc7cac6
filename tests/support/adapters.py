"""Whole runs that train an adapter beside a tiny model, and the folders that they begin with."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import mlx.core as mx

import troupe
from tests.support.fakes import tiny_config, weigh_ids
from tests.support.kills import processes
from tests.support.runs import STORED
from tests.support.tiny import write_tokenizer
from troupe import RunConfig
from troupe.checkpoint import Checkpoint, list_checkpoints, load_checkpoint
from troupe.rewards import Reward
from troupe.run.result import RunResult

VECTORS = Path(__file__).parents[1] / "data" / "adapters"
LORA: dict[str, Any] = {"adapter__kind": "lora", "adapter__rank": 4}
DORA: dict[str, Any] = {"adapter__kind": "dora", "adapter__rank": 3}
FILES = {"adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"}
"""Of an adapter folder."""


def adapter_config(model: Path, folder: Path, **settings: Any) -> RunConfig:
    """A run as `tests.support.runs.train` makes it, of a new LoRA adapter if no other is named."""
    named = {"adapter__kind", "adapter__resume_from"} & settings.keys()
    return tiny_config(model, folder, **STORED | ({} if named else LORA) | settings)


def train_adapter(model: Path, folder: Path, *rewards: Reward, resume: bool = False, **settings: Any) -> RunResult:
    """Such a run in `folder`/run, to the end."""
    return troupe.train(adapter_config(model, folder, **settings), rewards or (weigh_ids,), resume=resume)


def newest(run: Path | str) -> Checkpoint:
    """The newest checkpoint of a run."""
    return load_checkpoint(list_checkpoints(Path(run))[0])


def cut_back(whole: Path | str, version: int, folder: Path) -> Path:
    """The run as it was when the checkpoint of `version` was its newest, in `folder`/run."""
    name = f"checkpoints/step-{version:08d}"
    shutil.copytree(Path(whole) / name, folder / "run" / name)
    shutil.copy(Path(whole) / "run.toml", folder / "run")
    return folder


def write_base(folder: Path) -> Path:
    """The base of the vectors of PEFT and mlx-lm, with a tokenizer of bytes in the place of its own, of words."""
    shutil.copytree(VECTORS / "base", folder, copy_function=shutil.copyfile)
    folder.chmod(0o755)
    write_tokenizer(folder)
    return folder


def write_packed(model: Path, folder: Path, *, group_size: int = 32, bits: int = 4, mode: str = "affine") -> Path:
    """A model with all its matrices packed, as mlx-lm does it."""
    shutil.copytree(model, folder)
    how: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": mode}
    stored = mx.load(str(folder / "model.safetensors"))
    assert isinstance(stored, dict)
    packed: dict[str, mx.array] = {}
    for name, array in stored.items():
        if array.ndim == 1:
            packed[name] = array
        else:
            parts = zip(("weight", "scales", "biases"), mx.quantize(array, **how), strict=False)
            packed |= {f"{name.removesuffix('.weight')}.{kind}": part for kind, part in parts}
    mx.eval(packed)
    mx.save_safetensors(str(folder / "model.safetensors"), packed, metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(settings | {"quantization": how, "quantization_config": how}))
    return folder


def kill_generators() -> int:
    """Kill the processes of the generator that this process has started → how many."""
    killed = 0
    for line in processes():
        parent, pid, command = line.split(maxsplit=2)
        if int(parent) == os.getpid() and "troupe.actors.generator.process" in command:
            os.kill(int(pid), signal.SIGKILL)
            killed += 1
    return killed
