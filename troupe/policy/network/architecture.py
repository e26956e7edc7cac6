"""What a network is made of: its family, and sizes and constants, as `config.json` names them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import msgspec

from troupe.errors import ModelError
from troupe.policy.network.checks import DELTA_KEYS, MOST, check_layers
from troupe.policy.network.config_keys import fields_of
from troupe.policy.network.delta import DeltaSizes
from troupe.policy.network.families import (
    ACTIVATION_NAMES,
    FAMILIES,
    FULL,
    LINEAR,
    SLIDING,
    Family,
    family_of,
    layers_by_pattern,
)
from troupe.policy.network.presets import PUBLISHED
from troupe.policy.network.quantization import Quantization, quantization_table
from troupe.policy.network.rope_settings import convert_by_key, rope_table, stretched_positions
from troupe.policy.network.rotary import DEFAULT_ROPE_THETA, Rope, RopeScaling, YarnScaling


class Experts(NamedTuple):
    """The MLP of a layer that is a mixture of experts."""

    number: int
    per_token: int
    """How many of them a token goes to: those that the router finds likeliest."""
    size: int
    """F, numbers within one."""
    normalized: bool
    """Whether the shares of a token's experts add up to 1; else they are parts of all experts'."""


class LayerSpec(NamedTuple):
    """In what one layer may differ from another."""

    window: int | None
    """A token sees itself and so many less one before it; None: all before it."""
    rope: Rope
    is_delta: bool = False
    """Whether it is a gated delta net, without attention."""
    experts: Experts | None = None
    """None: its MLP is one for all tokens."""


@lru_cache
def _layer_spec(
    window: int | None, theta: float, scaling: RopeScaling | None, is_delta: bool, experts: Experts | None
) -> LayerSpec:
    """Made once: a decode asks at every token."""
    return LayerSpec(window, Rope(theta, scaling), is_delta, experts)


class NetworkConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The sizes and constants of one network, under the names of `config.json`."""

    model_type: str = "qwen3"
    """The family, of `FAMILIES`."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 128
    max_position_embeddings: int = 32768
    """Most tokens of prompt and completion together, already stretched where YaRN stretches."""
    rope_theta: float = DEFAULT_ROPE_THETA
    rope_scaling: RopeScaling | None = None
    """None: rotary positions as they are."""
    local_rope_theta: float | None = None
    """The base in layers with a window, whose positions are as they are; None: as in all others."""
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Whether attention's four matrices have biases, in a family that leaves it to this key."""
    query_pre_attn_scalar: float | None = None
    """Scores are divided by its root; None: by that of `head_dim`."""
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    """`FULL`, `SLIDING` or `LINEAR` for each layer; empty: all are full."""
    partial_rotary_factor: float = 1.0
    """Which part of a head is turned."""
    linear_conv_kernel_dim: int | None = None
    """Of gated delta nets, here and below; None where the family has none."""
    linear_key_head_dim: int | None = None
    linear_value_head_dim: int | None = None
    linear_num_key_heads: int | None = None
    linear_num_value_heads: int | None = None
    num_experts: int = 0
    """Experts of each layer that is a mixture of them; 0 in families that have none."""
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = False
    decoder_sparse_step: int = 1
    """Each so many-th layer is a mixture of experts, but for those of `mlp_only_layers`."""
    mlp_only_layers: tuple[int, ...] = ()
    eos_token_id: tuple[int, ...] = ()
    """Ids that end a text, where the folder's generation_config.json names none."""
    quantization: Quantization | None = None
    """How matrices are packed; None: they are float numbers."""

    def __post_init__(self) -> None:
        """Refuse what no network can have. Raises ModelError."""
        family_of(self.model_type)
        for key in _SIZES:
            if (value := getattr(self, key)) < 1:
                raise ModelError(f"{key}: {value} is too small; it must be at least 1")
            if value > (most := _MOST_LAYERS if key == "num_hidden_layers" else MOST):
                raise ModelError(f"{key}: {value} is too large; it must be at most {most}")
        for key in ("rope_theta", "local_rope_theta", "rms_norm_eps", "query_pre_attn_scalar"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise ModelError(f"{key}: {value} is refused; it must be a finite number above 0")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ModelError(
                f"num_attention_heads: {self.num_attention_heads} is not a multiple of num_key_value_heads "
                f"{self.num_key_value_heads}"
            )
        if isinstance(self.rope_scaling, YarnScaling) and self.rope_theta <= 1.0:
            raise ModelError(f"rope_theta: {self.rope_theta} is refused; YaRN needs a base above 1")
        if self.head_dim % 2:
            raise ModelError(f"head_dim: {self.head_dim} is odd; rotary positions turn pairs")
        check_layers(msgspec.structs.asdict(self), self.family)

    @property
    def delta(self) -> DeltaSizes:
        """The sizes of its gated delta nets, in a family that has them."""
        taps, a, b, K, H = (getattr(self, key) for key in DELTA_KEYS)
        return DeltaSizes(K, H, a, b, taps)

    @property
    def delta_layers(self) -> int:
        """How many layers are gated delta nets."""
        return self.layer_types.count(LINEAR)

    @property
    def attention_layers(self) -> int:
        """How many layers have attention."""
        return self.num_hidden_layers - self.delta_layers

    def place(self, index: int) -> int:
        """The number of a layer among those of its sort, that have attention or are gated delta nets."""
        if LINEAR not in self.layer_types:
            return index
        before = self.layer_types[:index].count(LINEAR)
        return before if self.layer_types[index] == LINEAR else index - before

    @property
    def rotary_dim(self) -> int:
        """How many numbers of a head are turned, its first ones."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def family(self) -> Family:
        """What all networks of its family have in common."""
        return FAMILIES[self.model_type]

    def layer(self, index: int) -> LayerSpec:
        """In what one layer may differ from another."""
        return self._spec(self.layer_types[index] if self.layer_types else FULL, self._experts(index))

    def _spec(self, kind: str, experts: Experts | None = None) -> LayerSpec:
        window = self.sliding_window if kind == SLIDING else None
        if kind != SLIDING or self.local_rope_theta is None:
            return _layer_spec(window, self.rope_theta, self.rope_scaling, kind == LINEAR, experts)
        return _layer_spec(window, self.local_rope_theta, None, False, experts)

    def _experts(self, index: int) -> Experts | None:
        if not self.family.experts or (index + 1) % self.decoder_sparse_step or index in self.mlp_only_layers:
            return None
        return Experts(self.num_experts, self.num_experts_per_tok, self.moe_intermediate_size, self.norm_topk_prob)

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers that are mixtures of experts."""
        if not self.family.experts:
            return ()
        return tuple(index for index in range(self.num_hidden_layers) if self.layer(index).experts)

    @property
    def ropes(self) -> frozenset[Rope]:
        """All ways in which positions turn in its layers."""
        return frozenset(self._spec(kind).rope for kind in set(self.layer_types) or {FULL})

    @property
    def has_windows(self) -> bool:
        """Whether a token of any layer does not see all before it."""
        return SLIDING in self.layer_types

    @property
    def attention_scale(self) -> float:
        """What scores are multiplied by."""
        scalar = self.head_dim if self.query_pre_attn_scalar is None else self.query_pre_attn_scalar
        return float(scalar**-0.5)

    @property
    def query_size(self) -> int:
        """Rows of the matrix of the queries, and of the gates beside them."""
        return self.num_attention_heads * self.head_dim * (2 if self.family.gates_attention else 1)

    @property
    def biased(self) -> str:
        """Which of attention's projections add a vector, such as "qkv"; "" is none."""
        if self.family.biases == "as_said":
            return "qkvo" if self.attention_bias else ""
        return "qkv" if self.family.biases == "qkv" else ""

    @classmethod
    def preset(cls, name: str) -> NetworkConfig:
        """A published network by its name, such as "Qwen3-0.6B", for random weights. Raises ModelError."""
        wanted = name.lower().rpartition("/")[2]
        for known, config in PRESETS.items():
            if known.lower() == wanted:
                return config
        raise ModelError(f"preset: {name!r} is not known; it must be one of {', '.join(PRESETS)}")

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> NetworkConfig:
        """Read a parsed `config.json`. Unknown keys are passed over; what would change the arithmetic is refused.

        Raises ModelError, its message starting with the key at fault.
        """
        fields = fields_of(settings, cls.__struct_fields__)
        quantization = fields.pop("quantization")
        config = msgspec.structs.replace(convert_by_key(fields, cls), quantization=quantization)
        positions = max(stretched_positions(config.rope_scaling), config.max_position_embeddings)
        return msgspec.structs.replace(config, max_position_embeddings=positions)

    def to_dict(self) -> dict[str, Any]:
        """The settings as a `config.json` that transformers and mlx-lm read; `from_dict` gives the same config back."""
        settings: dict[str, Any] = msgspec.structs.asdict(self)
        settings["eos_token_id"] = list(self.eos_token_id) or None
        for key in _TOLD_APART + (() if self.family.experts else _OF_EXPERTS):
            del settings[key]
        family, packed = self.family, {} if self.quantization is None else quantization_table(self.quantization)
        rope = {**rope_table(self.rope_scaling), "rope_theta": self.rope_theta}
        if self.partial_rotary_factor != 1.0 or "partial_rotary_factor" in family.rope_keys:
            rope["partial_rotary_factor"] = self.partial_rotary_factor
        bias = {} if family.biases == "qkv" else {"attention_bias": self.attention_bias}
        return {
            "architectures": [family.architecture],
            "model_type": self.model_type,
            **bias,
            family.activation_key: ACTIVATION_NAMES[family.activation][0],
            **self._windows_to_dict(),
            **self._delta_to_dict(),
            **settings,
            "rope_scaling": None if self.rope_scaling is None else rope_table(self.rope_scaling),
            **self._scalar_to_dict(),
            **({} if self.local_rope_theta is None else {"rope_local_base_freq": self.local_rope_theta}),
            "rope_parameters": rope
            if self.local_rope_theta is None
            else {FULL: rope, SLIDING: {**rope_table(None), "rope_theta": self.local_rope_theta}},
            **({"quantization": packed, "quantization_config": packed} if packed else {}),
        }

    def _scalar_to_dict(self) -> dict[str, Any]:
        if (scalar := self.query_pre_attn_scalar) is None:
            return {}
        return {"query_pre_attn_scalar": int(scalar) if scalar == int(scalar) else scalar}

    def _delta_to_dict(self) -> dict[str, Any]:
        if not self.family.has_delta:
            return {}
        kinds = list(self.layer_types) or [FULL] * self.num_hidden_layers
        every = next((n for n in range(1, len(kinds) + 2) if layers_by_pattern(n, len(kinds), LINEAR) == kinds), None)
        own = {key: getattr(self, key) for key in ("partial_rotary_factor", *DELTA_KEYS)}
        interval = {} if every is None else {"full_attention_interval": every}  # which mlx-lm goes by
        return {"layer_types": kinds, **interval, "attn_output_gate": True, **own}

    def _windows_to_dict(self) -> dict[str, Any]:
        if self.family.has_delta:
            return {}
        if self.family.windows == "none":
            return {"use_sliding_window": False, "sliding_window": None}
        if self.family.windows == "all":
            return {"sliding_window": self.sliding_window}
        kinds, count = list(self.layer_types) or [FULL] * self.num_hidden_layers, self.num_hidden_layers
        every = next((n for n in range(1, count + 2) if layers_by_pattern(n, count) == kinds), None)
        pattern = {} if every is None else {"sliding_window_pattern": every}
        return {"sliding_window": self.sliding_window, "layer_types": kinds, **pattern}


_TOLD_APART = (
    *DELTA_KEYS,
    "partial_rotary_factor",
    "model_type",
    "local_rope_theta",
    "attention_bias",
    "query_pre_attn_scalar",
    "sliding_window",
    "layer_types",
    "quantization",
)
_OF_EXPERTS = (
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
)
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
_MOST_LAYERS = 4096
"""Far above every network there is: each layer has names of its own, which are all made before a file is looked at."""

Qwen3Config = NetworkConfig
"""The name from when there was one family."""

PRESETS: Mapping[str, NetworkConfig] = MappingProxyType(
    {name: NetworkConfig(**settings) for name, settings in PUBLISHED.items()}
)
"""Networks as they are published, by name."""
