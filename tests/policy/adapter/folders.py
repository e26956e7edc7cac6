"""The network of `tests/data/adapters/base`, adapters of it, and folders of theirs that a test may spoil."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec

from troupe.policy.adapter.files import AdapterFiles, adapter_files
from troupe.policy.adapter.modules import Adapter, adapter_shapes, resolve_adapter
from troupe.policy.adapter.settings import AdapterConfig
from troupe.policy.model_files import read_json
from troupe.policy.network.architecture import NetworkConfig

VECTORS = Path(__file__).parents[2] / "data" / "adapters"
BASE = VECTORS / "base"
NETWORK = NetworkConfig.from_dict(read_json(BASE / "config.json"))
SETTINGS, OF_PEFT, OF_MLX = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors"


def resolved(network: NetworkConfig = NETWORK, **table: Any) -> Adapter:
    """An adapter of rank 16 on everything, but for what is given: keys of `[adapter]`; None leaves one out."""
    given = {key: value for key, value in ({"kind": "lora"} | table).items() if value is not None}
    return resolve_adapter(msgspec.convert(given, AdapterConfig), network)


ADAPTERS = {
    "all": resolved(rank=8),
    "dora": resolved(kind="dora", rank=4, alpha=6.0, target_modules=["q_proj", "down_proj"]),
    "rslora": resolved(rank=7, alpha=6.0, use_rslora=True, target_modules=["k_proj", "mlp.up_proj"]),
    "last": resolved(rank=2, layers=1, dropout=0.25),
    "holes": resolved(rank=3, layers=[0, 2], target_modules=["v_proj"]),
    "one": resolved(target_modules=["model.layers.1.mlp.up_proj"]),
    "patterns": resolved(
        rank=4,
        alpha=8.0,
        rank_pattern={"layers.1.self_attn.q_proj": 2, "down_proj": 8},
        alpha_pattern={"down_proj": 4.0, "layers.2.mlp.up_proj": 3.0},
    ),
    "patterns-dora": resolved(kind="dora", rank=4, layers=[1], rank_pattern={"o_proj": 1}, alpha_pattern={"k_proj": 1}),
}
"""One of each kind that the two formats tell otherwise."""


def random_weights(adapter: Adapter, seed: int = 0) -> dict[str, mx.array]:
    """Of which none is 0."""
    shapes = adapter_shapes(NETWORK, adapter)
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    return {name: mx.random.normal(shape, key=key) for (name, shape), key in zip(shapes.items(), keys, strict=True)}


def files_of(adapter: Adapter, weights: dict[str, mx.array]) -> AdapterFiles:
    return adapter_files(NETWORK, adapter, weights, base_name=str(BASE), base_fingerprint="f" * 64)


def copied(name: str, to: Path) -> Path:
    """An adapter folder of the vectors, such as "peft/qv", whose files may be changed."""
    folder = Path(shutil.copytree(VECTORS / name, to / Path(name).name, copy_function=shutil.copyfile))
    folder.chmod(0o755)
    return folder


def edit_settings(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    change(settings)
    (folder / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")


def edit_tensors(
    folder: Path, change: Callable[[dict[str, mx.array]], object], metadata: dict[str, str] | None = None
) -> None:
    """Of the one file of tensors that is there."""
    (file,) = folder.glob("*.safetensors")
    tensors = mx.load(str(file))
    assert isinstance(tensors, dict)
    mx.eval(tensors)
    change(tensors)
    mx.save_safetensors(str(file), tensors, metadata=metadata or {})
