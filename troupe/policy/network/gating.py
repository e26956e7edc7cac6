"""What gates an MLP: an activation of one product times another, and its gradient. Elementwise."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import mlx.core as mx

from troupe.policy.network.elementwise import compiled, exponential, swiglu, swiglu_gradient
from troupe.policy.network.families import Activation

_CUBE, _ROOT = 0.044715, math.sqrt(8.0 / math.pi)


class _Gate(NamedTuple):
    forward: Callable[[mx.array, mx.array], mx.array]
    backward: Callable[[mx.array, mx.array, mx.array], tuple[mx.array, mx.array]]


def gated(activation: Activation, gate: mx.array, up: mx.array) -> mx.array:
    """activation(gate) · up."""
    return _GATES[activation].forward(gate, up)


def gated_gradient(
    activation: Activation, gate: mx.array, up: mx.array, cotangent: mx.array
) -> tuple[mx.array, mx.array]:
    """The cotangents of `gate` and `up` from that of `gated`; not differentiable."""
    return _GATES[activation].backward(gate, up, cotangent)


def _geglu(gate: mx.array, up: mx.array) -> mx.array:
    """g · σ(√(8/π)·(g + 0.044715·g³)) · up, which is GELU's tanh formula (arXiv:1606.08415); in float32."""
    g = gate.astype(mx.float32)
    s = 1.0 / (1.0 + exponential(-_ROOT * (g + _CUBE * g * g * g)))
    return (g * s).astype(gate.dtype) * up


def _geglu_vjp(gate: mx.array, up: mx.array, cotangent: mx.array) -> tuple[mx.array, mx.array]:
    g, c = gate.astype(mx.float32), cotangent.astype(mx.float32)
    s = 1.0 / (1.0 + exponential(-_ROOT * (g + _CUBE * g * g * g)))
    slope = s * (1.0 + g * (1.0 - s) * _ROOT * (1.0 + 3.0 * _CUBE * g * g))
    return (c * up * slope).astype(gate.dtype), (c * g * s).astype(gate.dtype)


@mx.custom_function
def _differentiable_geglu(gate: mx.array, up: mx.array) -> Any:
    return compiled(_geglu, gate.shape)(gate, up)


@_differentiable_geglu.vjp
def _differentiable_geglu_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array) -> Any:
    return _geglu_gradient(*primals, cotangent)


def _geglu_forward(gate: mx.array, up: mx.array) -> mx.array:
    return cast(mx.array, _differentiable_geglu(gate, up))


def _geglu_gradient(gate: mx.array, up: mx.array, cotangent: mx.array) -> tuple[mx.array, mx.array]:
    return cast("tuple[mx.array, mx.array]", compiled(_geglu_vjp, gate.shape)(gate, up, cotangent))


_GATES: Mapping[Activation, _Gate] = {
    "silu": _Gate(swiglu, swiglu_gradient),
    "gelu_tanh": _Gate(_geglu_forward, _geglu_gradient),
}
