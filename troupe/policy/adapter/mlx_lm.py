"""mlx-lm's adapters: what its `adapter_config.json` says, and its tensors, which are PEFT's transposed.

It has one rank and one scale for all modules. Where ours differ, smaller ones are filled up with zeros to the largest
rank, and the ratio of the scales is in B.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from troupe.errors import ModelError
from troupe.policy.adapter.modules import Adapted, Adapter, Kind, layer_of, name_in_layer
from troupe.policy.adapter.values import dropout_of, names_of, number_of
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.linear import MAGNITUDE, A, B
from troupe.policy.network.tensors import linear_shapes

WEIGHTS_FILE = "adapters.safetensors"
PARTIAL = "partial"
"""Key of the metadata of a file in which modules are missing that the settings name: they have no adapter."""
_KINDS: Mapping[str, Kind] = {"lora": "lora", "dora": "dora"}
_SUFFIXES = {A: ".lora_a", B: ".lora_b", MAGNITUDE: ".m"}


def our_name(stored: str) -> str | None:
    """mlx-lm's name of a tensor → ours; None where it is none of an adapter's."""
    for ours, theirs in _SUFFIXES.items():
        if stored.endswith(theirs):
            return f"{stored.removesuffix(theirs)}{ours}.weight"
    return None


def their_name(name: str) -> str:
    """Our name of a tensor → mlx-lm's."""
    module, _, kind = name.removesuffix(".weight").rpartition(".")
    return f"{module}{_SUFFIXES[f'.{kind}']}"


def read_settings(
    file: Path, settings: Mapping[str, Any], stored: set[str], network: NetworkConfig, *, partial: bool
) -> Adapter:
    """The adapter of a parsed `adapter_config.json` whose file of tensors has these, under our names: the modules that
    mlx-lm would give one; of a `partial` file those of them that have tensors. Raises ModelError, naming the file and
    the key."""
    kind = settings.get("fine_tune_type", "lora")
    if kind == "full":
        raise ModelError(
            f"{file}: fine_tune_type: 'full': these are weights of the network itself, no adapter; make a model folder "
            "of them with mlx_lm.fuse, and give that"
        )
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ModelError(f"{file}: fine_tune_type: {kind!r} is not supported; it must be 'lora' or 'dora'")
    parameters = settings.get("lora_parameters")
    if not isinstance(parameters, dict):
        raise ModelError(f"{file}: lora_parameters: missing; it must say rank and scale")
    if "scale" not in parameters and "alpha" in parameters:
        raise ModelError(
            f"{file}: lora_parameters.scale: missing, and alpha {parameters['alpha']!r} does not say it: mlx-lm "
            "multiplies by scale itself, others by alpha / rank; add the scale that the adapter was trained with"
        )
    scale = number_of(file, parameters, "scale", None, within="lora_parameters.")
    rank = number_of(file, parameters, "rank", None, within="lora_parameters.")
    if scale == 0.0:
        raise ModelError(f"{file}: lora_parameters.scale: 0, so that the adapter does nothing; correct it")
    if rank != int(rank) or rank < 1:
        raise ModelError(f"{file}: lora_parameters.rank: {rank} is refused; it must be a whole number from 1")
    layers = number_of(file, settings, "num_layers", -1)
    if layers != int(layers):
        raise ModelError(f"{file}: num_layers: {layers} is refused; it must be a whole number")
    first = network.num_hidden_layers - int(layers) if layers > 0 else 0
    keys = names_of(file, parameters, "keys")
    if isinstance(keys, str):
        raise ModelError(f"{file}: lora_parameters.keys: {keys!r} is refused; it must be a list of names")
    modules = {}
    for module in linear_shapes(network):
        is_meant = keys is None or name_in_layer(module) in keys
        is_meant = (is_meant and layer_of(module) >= first) or (keys is not None and module in keys)
        has_tensors = f"{module}{A}.weight" in stored or f"{module}{B}.weight" in stored
        if is_meant and (has_tensors or not partial):
            modules[module] = Adapted(int(rank), scale)
    dropout = dropout_of(file, parameters, "dropout")
    return Adapter(kind=_KINDS[kind], modules=modules, dropout=dropout)


def settings_for(network: NetworkConfig, adapter: Adapter) -> dict[str, Any]:
    """What mlx-lm reads."""
    rank, scale = _common(adapter)
    lowest = min(map(layer_of, adapter.modules))
    return {
        "fine_tune_type": adapter.kind,
        "num_layers": network.num_hidden_layers - lowest if lowest else -1,
        "lora_parameters": {
            "rank": rank,
            "scale": scale,
            "dropout": adapter.dropout,
            "keys": sorted({name_in_layer(module) for module in adapter.modules}),
        },
    }


def is_partial(network: NetworkConfig, adapter: Adapter) -> bool:
    """Whether `settings_for` names modules that have no adapter."""
    names = {name_in_layer(module) for module in adapter.modules}
    return len(adapter.modules) < len(names) * (network.num_hidden_layers - min(map(layer_of, adapter.modules)))


def tensors_for(adapter: Adapter, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Ours → mlx-lm's, lazily."""
    rank, scale = _common(adapter)
    tensors = {}
    for module, adapted in adapter.modules.items():
        more = rank - adapted.rank
        a, b = weights[f"{module}{A}.weight"].T, weights[f"{module}{B}.weight"].T
        if adapted.scale != scale:
            b = b * (adapted.scale / scale)
        tensors[module + _SUFFIXES[A]] = mx.contiguous(mx.pad(a, [(0, 0), (0, more)]) if more else a)
        tensors[module + _SUFFIXES[B]] = mx.contiguous(mx.pad(b, [(0, more), (0, 0)]) if more else b)
        if adapter.kind == "dora":
            tensors[module + _SUFFIXES[MAGNITUDE]] = weights[f"{module}{MAGNITUDE}.weight"]
    return tensors


def _common(adapter: Adapter) -> tuple[int, float]:
    """The largest rank, and the scale of most modules."""
    scales = [adapted.scale for adapted in adapter.modules.values()]
    return max(adapted.rank for adapted in adapter.modules.values()), max(sorted(set(scales)), key=scales.count)
