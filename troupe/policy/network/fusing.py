"""A network laid out for decoding: matrices with the same input joined into one."""

from collections.abc import Sequence

import mlx.core as mx

from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.elementwise import is_on_cpu
from troupe.policy.network.forward import GATE_UP, QK_NORM, QKV
from troupe.policy.network.linear import BIAS, JOINED, by_columns
from troupe.policy.network.tensors import Weights, norm_scale


def fuse_projections(config: NetworkConfig, weights: Weights, *, uses_up: bool = False) -> dict[str, mx.array]:
    """The same network for decoding: q, k, v as one matrix and gate, up as one, which takes fewer and larger products.

    On a CPU gate and up stay apart, since halves of a product's rows are not contiguous, and these matrices lie column
    by column. Those of gated delta nets stay as they are, and those of experts. Matrices that are packed in different
    ways stay apart, too. Copies those matrices, layer by layer (evaluated); shares the others. With `uses_up` it takes
    them out of `weights`, a dict, so that nothing is there twice. `hidden_states`, `project` and gradients take the
    result.
    """
    fused = dict(weights)
    if uses_up:
        assert isinstance(weights, dict)
        weights.clear()
    on_cpu = is_on_cpu()
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}."
        made: dict[str, mx.array] = {}
        has_attention = not config.layer(index).is_delta
        for whole, parts in JOINED.items():
            if (whole == GATE_UP and config.layer(index).experts is not None) or (whole == QKV and not has_attention):
                continue
            if on_cpu and whole == GATE_UP:
                made |= {f"{layer}{part}.weight": by_columns(fused[f"{layer}{part}.weight"]) for part in parts}
            elif config.quantization is None or _are_packed_alike(config, [layer + part for part in parts]):
                made |= _joined(fused, layer + whole, [layer + part for part in parts], on_cpu=on_cpu)
        if config.family.qk_norm and has_attention and not config.family.gates_attention:
            made[f"{layer}{QK_NORM}.weight"] = _both_norms(config, fused, f"{layer}self_attn.")
        mx.eval(made)
        fused |= made
    return fused


def _are_packed_alike(config: NetworkConfig, modules: Sequence[str]) -> bool:
    assert config.quantization is not None
    return len({config.quantization.of(module) for module in modules}) == 1


def _joined(weights: dict[str, mx.array], whole: str, parts: Sequence[str], *, on_cpu: bool) -> dict[str, mx.array]:
    """Some matrices as one, out of the dict that has them."""
    made = {}
    for kind in (".weight", ".scales", ".biases", BIAS):
        if parts[0] + kind in weights:
            joined = mx.concatenate([weights.pop(part + kind) for part in parts])
            made[whole + kind] = by_columns(joined) if on_cpu and joined.ndim == 2 else joined
    return made


def _both_norms(config: NetworkConfig, weights: dict[str, mx.array], prefix: str) -> mx.array:
    """What the norms of queries and keys multiply by, one row a head (H + K, d)."""
    norms = [(config.num_attention_heads, "q_norm"), (config.num_key_value_heads, "k_norm")]
    scales = [(heads, norm_scale(config, weights[f"{prefix}{name}.weight"])) for heads, name in norms]
    return mx.concatenate([mx.tile(scale, (heads, 1)) for heads, scale in scales])
