"""What layers of a network cannot be: refused by the key of `config.json`, among the fields of a `NetworkConfig`."""

from collections.abc import Mapping
from typing import Any

from troupe.errors import ModelError
from troupe.policy.network.families import FULL, LINEAR, SLIDING, Family

MOST = 2**31 - 1
"""What MLX can count along one axis."""
MOST_EXPERTS = 1024
"""What MLX multiplies at a time on NVIDIA cards."""
MOST_TAPS = 8
"""Of the convolution of a gated delta net: no more than its shortest chunk has tokens."""
DELTA_KEYS = (
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
)


def check_layers(fields: Mapping[str, Any], family: Family) -> None:
    """Raise ModelError for what no layers can have; `fields` are those of a `NetworkConfig`, its sizes checked."""
    factor, head = fields["partial_rotary_factor"], fields["head_dim"]
    if factor != 1.0 and not (0.0 < factor < 1.0 and int(head * factor) > 0 and int(head * factor) % 2 == 0):
        raise ModelError(
            f"partial_rotary_factor: {factor} is refused; of {head} numbers of a head it must leave an even number "
            "that is turned"
        )
    _check_windows(fields)
    if family.has_delta:
        _check_delta(fields)
    if family.experts:
        _check_experts(fields)


def _check_windows(fields: Mapping[str, Any]) -> None:
    kinds, count, window = fields["layer_types"], fields["num_hidden_layers"], fields["sliding_window"]
    if kinds and len(kinds) != count:
        raise ModelError(f"layer_types: {len(kinds)} entries are refused; num_hidden_layers is {count}")
    if SLIDING in kinds and (window or 0) < 1:
        raise ModelError(f"sliding_window: {window} is refused; layers with a window need one of at least 1 token")


def _check_delta(fields: Mapping[str, Any]) -> None:
    for key in DELTA_KEYS:
        value, least, most = fields[key], 1, MOST
        if key == "linear_conv_kernel_dim":
            least, most = 2, MOST_TAPS
        if value is None or not least <= value <= most:
            raise ModelError(f"{key}: {value} is refused; it must be from {least} to {most}")
    keys, values = fields["linear_num_key_heads"], fields["linear_num_value_heads"]
    if values % keys:
        raise ModelError(f"linear_num_value_heads: {values} is not a multiple of linear_num_key_heads {keys}")
    if fields["layer_types"] and set(fields["layer_types"]) <= {LINEAR}:
        raise ModelError(f"layer_types: at least one layer must be {FULL!r}")


def _check_experts(fields: Mapping[str, Any]) -> None:
    for key in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step"):
        if (value := fields[key]) < 1:
            raise ModelError(f"{key}: {value} is too small; it must be at least 1")
        if value > (most := MOST_EXPERTS if key == "num_experts" else MOST):
            raise ModelError(f"{key}: {value} is too large; it must be at most {most}")
    chosen, number, count = fields["num_experts_per_tok"], fields["num_experts"], fields["num_hidden_layers"]
    if chosen > number:
        raise ModelError(f"num_experts_per_tok: {chosen} is refused; there are {number} experts (num_experts)")
    if beyond := [index for index in fields["mlp_only_layers"] if not 0 <= index < count]:
        raise ModelError(
            f"mlp_only_layers: {beyond[0]} is refused; layers are counted from 0 and num_hidden_layers is {count}"
        )
