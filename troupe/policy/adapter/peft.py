"""PEFT's adapters: what `adapter_config.json` says, as far as its arithmetic is here, and the names of its tensors."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from troupe.errors import ModelError, sayable
from troupe.policy.adapter.modules import Adapted, Adapter, by_pattern, is_named, layer_of
from troupe.policy.adapter.settings import end_pattern
from troupe.policy.adapter.values import check_expression, dropout_of, names_of, number_of, numbers_of
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.linear import MAGNITUDE, A, B
from troupe.policy.network.tensors import linear_shapes

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
_HARMLESS_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica", None)
"""Ways to begin after which the base is as it was."""


def our_name(stored: str) -> str | None:
    """PEFT's name of a tensor → ours; None where it is none of an adapter's."""
    bare = stored.removeprefix(_PREFIX)
    match = re.fullmatch(r"(.+)\.(lora_A|lora_B|lora_magnitude_vector)(\.default)?(\.weight)?", bare)
    return None if match is None else f"{match[1]}.{match[2]}.weight"


def their_name(name: str) -> str:
    """Our name of a tensor → PEFT's."""
    bare = name.removesuffix(".weight") if name.endswith(f"{MAGNITUDE}.weight") else name
    return f"{_PREFIX}{bare}"


def read_settings(file: Path, settings: Mapping[str, Any], stored: set[str], network: NetworkConfig) -> Adapter:
    """The adapter of a parsed `adapter_config.json` whose file of tensors has these, under our names.

    The modules are those that PEFT would look for: it passes over tensors of any other. Raises ModelError, naming the
    file and the key.
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
    ranks, alphas = _patterns(file, settings, "rank_pattern"), _patterns(file, settings, "alpha_pattern")
    rooted = bool(settings.get("use_rslora"))
    modules = {}
    for module in _targeted(file, settings, stored, network):
        own, own_alpha = by_pattern(ranks, module, rank), by_pattern(alphas, module, alpha)
        if own != int(own) or own < 1:
            raise ModelError(f"{file}: the rank of {module} is {own}; it must be a whole number from 1")
        if own_alpha == 0.0:
            raise ModelError(f"{file}: lora_alpha of {module} is 0, so that its adapter does nothing; correct it")
        modules[module] = Adapted(int(own), own_alpha / (math.sqrt(own) if rooted else own))
    dropout = dropout_of(file, settings, "lora_dropout")
    return Adapter(kind="dora" if settings.get("use_dora") else "lora", modules=modules, dropout=dropout)


def _patterns(file: Path, settings: Mapping[str, Any], key: str) -> dict[str, float]:
    table = numbers_of(file, settings, key)
    for pattern in table:
        check_expression(file, key, pattern)
        check_expression(file, key, end_pattern(pattern))
    return table


def _targeted(file: Path, settings: Mapping[str, Any], stored: set[str], network: NetworkConfig) -> list[str]:
    """The modules of the network that the settings name; where they name none at all, those that have tensors."""
    target, excluded = names_of(file, settings, "target_modules"), names_of(file, settings, "exclude_modules")
    layers = settings.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers or None
    if layers is not None and not (isinstance(layers, list) and all(isinstance(layer, int) for layer in layers)):
        raise ModelError(f"{file}: layers_to_transform: {layers!r} is refused; it must be a list of numbers of layers")
    modules = [module for module in linear_shapes(network) if not (excluded and _is_meant(excluded, module))]
    if target is None:
        return [module for module in modules if f"{module}{A}.weight" in stored or f"{module}{B}.weight" in stored]
    if target == "all-linear":
        return modules
    return [
        module
        for module in modules
        if _is_meant(target, module) and (layers is None or module in target or layer_of(module) in layers)
    ]


def _is_meant(names: str | list[str], module: str) -> bool:
    return re.fullmatch(names, module) is not None if isinstance(names, str) else is_named(module, names)


def settings_for(adapter: Adapter, layers: int, base_name: str) -> dict[str, Any]:
    """What PEFT's `LoraConfig` reads, for a network of so many layers. Each module is named by its whole name where the
    end of it would name others, too."""
    ranks, alphas = _most_common(adapter)
    names = sorted({module.rpartition(".")[2] for module in adapter.modules})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": sayable(base_name),
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
        "alpha_pattern": {re.escape(m): alpha for m, a in adapter.modules.items() if (alpha := _alpha_of(a)) != alphas},
    }


def _names_all(adapter: Adapter, names: list[str], layers: int) -> bool:
    """Whether every layer of the network has an adapter at each of these names."""
    return len(adapter.modules) == layers * len(names)


def _most_common(adapter: Adapter) -> tuple[int, float]:
    """Rank and alpha of most modules."""
    ranks = [adapted.rank for adapted in adapter.modules.values()]
    alphas = [_alpha_of(adapted) for adapted in adapter.modules.values()]
    return max(sorted(set(ranks)), key=ranks.count), max(sorted(set(alphas)), key=alphas.count)


def _alpha_of(adapted: Adapted) -> float:
    """What gives this scale; an integer where one does: PEFT declares alpha so."""
    alpha = adapted.scale * adapted.rank
    return round(alpha) if round(alpha) / adapted.rank == adapted.scale else alpha
