"""Packed model folders as mlx-lm writes them, made by MLX alone, and what their numbers are by the formats' rules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from troupe.policy import NetworkConfig, random_policy

CONFIG = NetworkConfig(
    vocab_size=64,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    tie_word_embeddings=True,
    initializer_range=0.2,
)
"""Rows that every group divides."""

Packing = dict[str, Any]
AFFINE: Packing = {"group_size": 64, "bits": 4, "mode": "affine"}
FLOAT_KINDS: list[Packing] = [
    {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    {"group_size": 32, "bits": 8, "mode": "mxfp8"},
    {"group_size": 16, "bits": 4, "mode": "nvfp4"},
]
KINDS: list[Packing] = [
    *({"group_size": group, "bits": bits, "mode": "affine"} for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)),
    *FLOAT_KINDS,
]


def write_packed_model(
    folder: Path,
    packing: Packing = AFFINE,
    modules: Mapping[str, Packing | bool] = {},
    *,
    config: NetworkConfig = CONFIG,
    dtype: str = "float32",
    prefix: str = "",
) -> dict[str, mx.array]:
    """Write config.json and the weights → the tensors as stored, evaluated. `modules`: those that differ; false is not
    packed. Rows that no group divides are not, either, as with mlx-lm. `prefix`: before all names."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, mx.array] = {}
    for name, array in random_policy(config, dtype=dtype).weights.items():
        module = name.removesuffix(".weight")
        kind = modules.get(module, True)
        how = packing if kind is True else kind
        if array.ndim == 1 or not isinstance(how, dict) or array.shape[1] % how["group_size"]:
            tensors[prefix + name] = array
        else:
            parts = mx.quantize(array, **how)
            tensors |= {f"{prefix}{module}.{k}": x for k, x in zip(("weight", "scales", "biases"), parts, strict=False)}
    mx.eval(tensors)
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    table = packing | {prefix + name: kind for name, kind in modules.items()}
    settings = config.to_dict() | {"quantization": table, "quantization_config": table}
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    return tensors


def numbers_of(tensors: Mapping[str, mx.array], module: str, packing: Packing) -> np.ndarray:
    """What a packed matrix stands for, float64 (out, in), read bit by bit."""
    words = np.array(tensors[f"{module}.weight"])
    scales = tensors[f"{module}.scales"]
    bits, group = packing["bits"], packing["group_size"]
    stream = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little").reshape(len(words), -1, bits)
    codes = (stream.astype(np.int64) << np.arange(bits)).sum(axis=2)
    if packing["mode"] == "affine":
        offsets = np.array(tensors[f"{module}.biases"].astype(mx.float32)).astype(np.float64)
        factors = np.array(scales.astype(mx.float32)).astype(np.float64)
        affine: np.ndarray = codes * factors.repeat(group, axis=1) + offsets.repeat(group, axis=1)
        return affine
    stored = np.array(scales).astype(np.int64)
    powers: np.ndarray = _floats(stored, 4, 3) if packing["mode"] == "nvfp4" else np.ldexp(1.0, stored - 127)
    numbers = _floats(codes, 2, 1) if bits == 4 else _floats(codes, 4, 3)
    scaled: np.ndarray = numbers * powers.repeat(group, axis=1)
    return scaled


def _floats(codes: np.ndarray, exponent_bits: int, mantissa_bits: int) -> np.ndarray:
    """Small floats by their bits: sign, exponent, mantissa (E2M1, E4M3)."""
    mantissa = codes & ((1 << mantissa_bits) - 1)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    sign = np.where(codes >> (exponent_bits + mantissa_bits), -1.0, 1.0)
    bias = (1 << (exponent_bits - 1)) - 1
    size = np.where(exponent > 0, mantissa + (1 << mantissa_bits), mantissa)
    number: np.ndarray = np.ldexp(sign * size, np.maximum(exponent, 1) - bias - mantissa_bits)
    return number
