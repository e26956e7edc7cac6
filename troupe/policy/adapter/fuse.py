"""An adapter put into its base, for tools that know no adapters: W + s·BA in float32, rounded to what the base is held
in."""

import mlx.core as mx
import msgspec

from troupe.policy.adapter.modules import Adapter
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.linear import MAGNITUDE, A, B, Linear
from troupe.policy.network.tensors import Weights, weights_dtype


def fuse(
    config: NetworkConfig, weights: dict[str, mx.array], adapter: Adapter, trained: Weights, *, dequantize: bool
) -> tuple[NetworkConfig, dict[str, mx.array]]:
    """A network with the adapter in it, evaluated; `weights` is used up, matrix by matrix.

    A matrix that is packed is packed again in the same way, which rounds it to other numbers; with `dequantize` all
    matrices become float numbers, and the config says so.
    """
    fused: dict[str, mx.array] = {}
    dtype = weights_dtype(weights)
    for name in [name for name in weights if not name.endswith((".weight", ".scales", ".biases"))]:
        fused[name] = weights.pop(name)
    for name in [name for name in weights if name.endswith(".weight")]:
        module = name.removesuffix(".weight")
        linear = Linear.of(config, weights, module)
        if module in adapter.modules:
            whole = _adapted(linear, adapter, trained, module).astype(dtype)
            fused |= _packed(module, whole, None if dequantize else linear)
        elif dequantize and linear.scales is not None:
            fused[name] = linear.expanded(dtype)
        else:
            kept = {f"{module}.{kind}": weights.get(f"{module}.{kind}") for kind in ("weight", "scales", "biases")}
            fused |= {name: array for name, array in kept.items() if array is not None}
        mx.eval(fused)
        for kind in ("weight", "scales", "biases"):
            weights.pop(f"{module}.{kind}", None)
    return msgspec.structs.replace(config, quantization=None) if dequantize else config, fused


def _adapted(linear: Linear, adapter: Adapter, trained: Weights, module: str) -> mx.array:
    """float32 (out, in)."""
    a, b = trained[f"{module}{A}.weight"], trained[f"{module}{B}.weight"]
    whole = mx.addmm(linear.expanded(mx.float32), b * adapter.modules[module].scale, a)
    if (magnitude := trained.get(f"{module}{MAGNITUDE}.weight")) is None:
        return whole
    return whole * (magnitude / mx.linalg.norm(whole, axis=1))[:, None]


def _packed(module: str, whole: mx.array, like: Linear | None) -> dict[str, mx.array]:
    """The tensors of a matrix, packed as another one is."""
    if like is None or like.packing is None:
        return {f"{module}.weight": whole}
    packing = like.packing
    parts = mx.quantize(whole, group_size=packing.group_size, bits=packing.bits, mode=packing.mode)
    return {f"{module}.{kind}": part for kind, part in zip(("weight", "scales", "biases"), parts, strict=False)}
