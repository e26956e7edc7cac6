"""PEFT's adapters: what `adapter_config.json` says, as far as its arithmetic is here, and the names of its tensors."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from troupe.errors import ModelError
from troupe.policy.adapter.modules import Adapted, Adapter, by_pattern
from troupe.policy.adapter.values import number_of, numbers_of
from troupe.policy.network.architecture import Qwen3Config
from troupe.policy.network.linear import MAGNITUDE, A, B
from troupe.policy.network.qwen3 import linear_shapes

WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_PLAIN = {
    "bias": ("none", None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "use_qalora": (False, None),
    "use_bdlora": (False, None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None, {}),
    "kasa_config": (None, {}),
    "velora_config": (None, {}),
    "monteclora_config": (None, {}),
}
"""Settings that change arithmetic, and the values that do not."""
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal", None)
"""Ways to begin after which the base is as it was."""


def our_name(stored: str) -> str | None:
    """PEFT's name of a tensor → ours; None where it is none of an adapter's."""
    bare = stored.removeprefix(_PREFIX)
    match = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.default)?(\.weight)?", bare)
    return None if match is None else f"{match[1]}.{match[2]}.weight"


def peft_name(name: str) -> str:
    """Our name of a tensor → PEFT's."""
    bare = name.removesuffix(".weight") if name.endswith(f"{MAGNITUDE}.weight") else name
    return f"{_PREFIX}{bare}"


def read_settings(file: Path, settings: Mapping[str, Any], stored: set[str], network: Qwen3Config) -> Adapter:
    """The adapter of a parsed `adapter_config.json` whose file of tensors has these, under our names.

    Which modules have an adapter is said by the tensors; where a module is targeted and has none, its name is among
    those of the result, so that what is missing is found. Raises ModelError, naming the file and the key.
    """
    if (kind := settings.get("peft_type")) != "LORA":
        raise ModelError(f"{file}: peft_type: {kind!r} is not supported; it must be 'LORA'")
    for key, plain in _PLAIN.items():
        if key in settings and settings[key] not in plain:
            raise ModelError(f"{file}: {key}: {settings[key]!r} is not supported; merge this adapter with PEFT first")
    if (init := settings.get("init_lora_weights", True)) not in _HARMLESS_INITS:
        raise ModelError(
            f"{file}: init_lora_weights: {init!r} has altered the base; convert the adapter to plain LoRA with PEFT "
            "(path_initial_model_for_weight_conversion) first"
        )
    rank, alpha = number_of(file, settings, "r", 8), number_of(file, settings, "lora_alpha", 8)
    ranks, alphas = numbers_of(file, settings, "rank_pattern"), numbers_of(file, settings, "alpha_pattern")
    rooted = bool(settings.get("use_rslora"))
    modules = {}
    for module in linear_shapes(network):
        if f"{module}{A}.weight" in stored or f"{module}{B}.weight" in stored or _is_targeted(settings, module):
            own = by_pattern(ranks, module, rank)
            if own != int(own) or own < 1:
                raise ModelError(f"{file}: the rank of {module} is {own}; it must be a whole number from 1")
            scale = by_pattern(alphas, module, alpha) / (math.sqrt(own) if rooted else own)
            modules[module] = Adapted(int(own), scale)
    dropout = number_of(file, settings, "lora_dropout", 0.0)
    return Adapter(kind="dora" if settings.get("use_dora") else "lora", modules=modules, dropout=dropout)


def _is_targeted(settings: Mapping[str, Any], module: str) -> bool:
    """Whether the settings ask for an adapter there, as far as they can be read."""
    target, excluded, layers = (
        settings.get(key) for key in ("target_modules", "exclude_modules", "layers_to_transform")
    )
    if excluded and _is_named(excluded, module):
        return False
    if isinstance(layers, int):
        layers = [layers]
    if isinstance(layers, list) and int(module.split(".")[2]) not in layers:
        return False
    return target == "all-linear" or (bool(target) and _is_named(target, module))


def _is_named(names: Any, module: str) -> bool:
    if isinstance(names, str):
        try:
            return re.fullmatch(names, module) is not None
        except re.error:
            return False
    return isinstance(names, list) and any(module == name or module.endswith(f".{name}") for name in names)


def settings_for(adapter: Adapter, layers: int, base_name: str) -> dict[str, Any]:
    """What PEFT's `LoraConfig` reads, for a network of so many layers. Each module is named by its whole name where the
    end of it would name others, too."""
    ranks, alphas = _most_common(adapter)
    names = sorted({module.rpartition(".")[2] for module in adapter.modules})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "r": ranks,
        "lora_alpha": alphas,
        "lora_dropout": adapter.dropout,
        "use_rslora": False,
        "use_dora": adapter.kind == "dora",
        "target_modules": names if _names_all(adapter, names, layers) else sorted(adapter.modules),
        "rank_pattern": {re.escape(m): a.rank for m, a in adapter.modules.items() if a.rank != ranks},
        "alpha_pattern": {
            re.escape(m): whole_number(a.scale * a.rank)
            for m, a in adapter.modules.items()
            if a.scale * a.rank != alphas
        },
    }


def _names_all(adapter: Adapter, names: list[str], layers: int) -> bool:
    """Whether every layer of the network has an adapter at each of these names."""
    return len(adapter.modules) == layers * len(names)


def _most_common(adapter: Adapter) -> tuple[int, float]:
    """Rank and alpha of most modules."""
    ranks = [adapted.rank for adapted in adapter.modules.values()]
    alphas = [adapted.scale * adapted.rank for adapted in adapter.modules.values()]
    return max(set(ranks), key=ranks.count), whole_number(max(sorted(set(alphas)), key=alphas.count))


def whole_number(value: float) -> float:
    """As an integer where it is one: PEFT declares alpha so."""
    return int(value) if value == int(value) else value
