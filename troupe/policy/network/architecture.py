"""What a Qwen3 network is made of: sizes and constants, as `config.json` names them, and the published sizes.

Settings that would change the arithmetic into one that is not here are refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from troupe.errors import ModelError
from troupe.policy.network.quantization import Quantization, quantization_table, read_quantization
from troupe.policy.network.rotary import DEFAULT_ROPE_THETA, YarnScaling, convert_by_key, rope_settings

ARCHITECTURE = "Qwen3ForCausalLM"
_ARCHITECTURES = ([ARCHITECTURE], ["Qwen3Model"])
"""What a config.json may name; the second is the same network as it is published without a head of its own."""


class NetworkConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes and constants of one Qwen3 network, under the names of `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 128
    max_position_embeddings: int = 32768
    """Most tokens of prompt and completion together, already stretched where `rope_scaling` stretches."""
    rope_theta: float = DEFAULT_ROPE_THETA
    rope_scaling: YarnScaling | None = None
    """None: rotary positions as they are."""
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    eos_token_id: tuple[int, ...] = ()
    """Ids that end a text, where the folder's generation_config.json names none."""
    quantization: Quantization | None = None
    """How matrices are packed; None: they are float numbers."""

    def __post_init__(self) -> None:
        """Refuse sizes that no network can have. Raises ModelError."""
        for key in _SIZES:
            if (value := getattr(self, key)) < 1:
                raise ModelError(f"{key}: {value} is too small; it must be at least 1")
            if value > (most := _MOST_LAYERS if key == "num_hidden_layers" else _MOST):
                raise ModelError(f"{key}: {value} is too large; it must be at most {most}")
        for key in ("rope_theta", "rms_norm_eps"):
            if not (value := getattr(self, key)) > 0 or not math.isfinite(value):
                raise ModelError(f"{key}: {value} is refused; it must be a finite number above 0")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(
                f"num_attention_heads: {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if self.rope_scaling is not None and self.rope_theta <= 1.0:
            raise ModelError(f"rope_theta: {self.rope_theta} is refused; YaRN needs a base above 1")
        if self.head_dim % 2:
            raise ModelError(f"head_dim: {self.head_dim} is odd; rotary positions turn pairs")

    @classmethod
    def preset(cls, name: str) -> NetworkConfig:
        """A published network by its name, such as "Qwen3-0.6B", for random weights. Raises ModelError."""
        wanted = name.lower().removeprefix("qwen/")
        for known, config in PRESETS.items():
            if known.lower() == wanted:
                return config
        raise ModelError(f"preset: {name!r} is not known; it must be one of {', '.join(PRESETS)}")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> NetworkConfig:
        """Read a parsed `config.json`. Unknown keys are passed over; what would change the arithmetic is refused.

        Raises ModelError, its message starting with the key at fault.
        """
        _refuse_unsupported(settings)
        known = {field: settings[field] for field in cls.__struct_fields__ if settings.get(field) is not None}
        known |= rope_settings(settings)
        quantization = read_quantization(settings)
        known.pop("quantization", None)
        eos = settings.get("eos_token_id")
        known["eos_token_id"] = [] if eos is None else eos if isinstance(eos, list) else [eos]
        for key in _REQUIRED:
            if key not in known:
                raise ModelError(f"{key}: missing; a Qwen3 config.json must name it")
        config = msgspec.structs.replace(convert_by_key(known, cls), quantization=quantization)
        if (scaling := config.rope_scaling) is None or scaling.max_positions <= config.max_position_embeddings:
            return config
        return msgspec.structs.replace(config, max_position_embeddings=scaling.max_positions)

    def to_dict(self) -> dict[str, Any]:
        """The settings as a `config.json` that transformers and mlx-lm read; `from_dict` gives the same config back."""
        settings: dict[str, Any] = msgspec.structs.asdict(self)
        settings["eos_token_id"] = list(self.eos_token_id) or None
        del settings["quantization"]
        packed = {} if self.quantization is None else quantization_table(self.quantization)
        rope: dict[str, Any] = {"rope_type": "default"}
        if self.rope_scaling is not None:
            given = msgspec.structs.asdict(self.rope_scaling)
            rope = {"rope_type": "yarn", **{key: value for key, value in given.items() if value is not None}}
        return {
            "architectures": [ARCHITECTURE],
            "model_type": "qwen3",
            "attention_bias": False,
            "hidden_act": "silu",
            "use_sliding_window": False,
            "sliding_window": None,
            **settings,
            "rope_scaling": None if self.rope_scaling is None else rope,
            "rope_parameters": {**rope, "rope_theta": self.rope_theta},
            **({"quantization": packed, "quantization_config": packed} if packed else {}),
        }


_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_REQUIRED = _SIZES[:6]
_MOST = 2**31 - 1
"""What MLX can count along one axis."""
_MOST_LAYERS = 4096
"""Far above every network there is: each layer has names of its own, which are all made before a file is looked at."""
_FULL = "full_attention"
_DEFAULT_WINDOW = 4096
"""Of `sliding_window` where a config.json leaves it out, as in transformers; null is none."""


def _refuse_unsupported(settings: Mapping[str, Any]) -> None:
    """Raise ModelError where a setting asks for arithmetic that is not here."""
    model_type, architectures = settings.get("model_type"), settings.get("architectures")
    if model_type != "qwen3":
        raise ModelError(f"model_type: {model_type!r} is not supported; Troupe trains 'qwen3' models")
    if architectures is not None and architectures not in _ARCHITECTURES:
        raise ModelError(f"architectures: {architectures!r} is not supported; it must be ['{ARCHITECTURE}']")
    if settings.get("attention_bias"):
        raise ModelError("attention_bias: true is not supported; Qwen3's projections have no bias")
    if (activation := settings.get("hidden_act", "silu")) != "silu":
        raise ModelError(f"hidden_act: {activation!r} is not supported; it must be 'silu'")
    layers, window = settings.get("layer_types"), settings.get("sliding_window", _DEFAULT_WINDOW)
    if layers is not None:
        _check_layer_types(layers, settings.get("num_hidden_layers"))
    elif settings.get("use_sliding_window") and window:
        raise ModelError(f"use_sliding_window: true (window {window}) is not supported")
    if settings.get("is_causal") is False or settings.get("use_bidirectional_attention"):
        key = "is_causal" if settings.get("is_causal") is False else "use_bidirectional_attention"
        raise ModelError(f"{key}: {settings[key]!r} is not supported; a token sees only those before it")


def _check_layer_types(layers: Any, count: Any) -> None:
    if not isinstance(layers, list) or not all(isinstance(kind, str) for kind in layers):
        raise ModelError(f"layer_types: {layers!r} is refused; it must be a list of names, one a layer")
    if any(kind != _FULL for kind in layers):
        raise ModelError(f"layer_types: {sorted(set(layers))} is not supported; every layer must be '{_FULL}'")
    if len(layers) != count:
        raise ModelError(f"layer_types: {len(layers)} entries are refused; num_hidden_layers is {count}")


Qwen3Config = NetworkConfig
"""The name from when there was one family."""


def _published(layers: int, hidden: int, intermediate: int, heads: int, *, tied: bool) -> NetworkConfig:
    return NetworkConfig(
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=40960,
        rope_theta=1e6,
        tie_word_embeddings=tied,
        eos_token_id=(151645, 151643),
    )


PRESETS: Mapping[str, NetworkConfig] = MappingProxyType(
    {
        "Qwen3-0.6B": _published(28, 1024, 3072, 16, tied=True),
        "Qwen3-1.7B": _published(28, 2048, 6144, 16, tied=True),
        "Qwen3-4B": _published(36, 2560, 9728, 32, tied=True),
        "Qwen3-8B": _published(36, 4096, 12288, 32, tied=False),
        "Qwen3-14B": _published(40, 5120, 17408, 40, tied=False),
        "Qwen3-32B": _published(64, 5120, 25600, 64, tied=False),
    }
)
"""The dense networks of the Qwen3 Technical Report (arXiv:2505.09388, table 1), by name."""
