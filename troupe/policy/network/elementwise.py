"""Exponentials that are fast on a CPU, and what is made of them, SiLU above all.

MLX's own exponential takes 10–20 ns a number on a CPU, which made up a third of a decoding step. Here a polynomial,
fused into one loop by `mx.compile`, takes 2–4 ns. On other devices, in other types and where no compiler is installed,
MLX's own functions are used. Everything is differentiable.

Argument reduction after Cody and Waite, then Taylor's polynomial of degree 6: relative error below 4e-7.
"""

import math
import shutil
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, cast

import mlx.core as mx

WORTHWHILE = 2**14
"""Below so many numbers a call of a compiled function costs more than it saves."""

_TO_INTEGER = 1.5 * 2.0**23  # adding this rounds a float32 to the integer that its low bits then hold
_LN2_HIGH = 0.693359375  # few bits, so that its product with an integer is exact
_LN2_LOW = math.log(2.0) - _LN2_HIGH


@cache
def _has_compiler() -> bool:
    return shutil.which("g++") is not None


def is_on_cpu() -> bool:
    """Whether MLX computes on the processor."""
    return mx.default_device() == mx.Device(mx.cpu)


def is_fast_here(x: mx.array) -> bool:
    """Whether the polynomial beats MLX's own exponential: float32 on a CPU with g++."""
    return x.dtype == mx.float32 and is_on_cpu() and _has_compiler()


def _power(x: mx.array) -> mx.array:
    """e^x = 2^i · e^r, |r| ≤ ln 2 / 2; 0 below −87.7, infinite above 88.4."""
    x = mx.clip(x, -88.0, 89.0)
    shifted = x * (1.0 / math.log(2.0)) + _TO_INTEGER
    i = shifted - _TO_INTEGER
    r = (x - i * _LN2_HIGH) - i * _LN2_LOW
    p = mx.array(1.0 / math.factorial(6), mx.float32)
    for n in range(5, -1, -1):
        p = p * r + 1.0 / math.factorial(n)
    return p * mx.view((mx.view(shifted, mx.int32) + 127) << 23, mx.float32)


def exponential(x: mx.array) -> mx.array:
    """e^x, for functions that are compiled themselves: not differentiable."""
    return _power(x) if is_fast_here(x) else mx.exp(x)


@lru_cache(maxsize=256)
def compiled(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Callable[..., Any]:
    """`function` compiled for arguments of these shapes.

    MLX keeps what it compiled for every shape for as long as the compiled function lives, and looks through all of it
    at each call. One function a shape, the oldest forgotten, keeps a run of many lengths from growing without end.
    """
    return mx.compile(function)


@mx.custom_function
def _fast_exp(x: mx.array) -> Any:
    return compiled(_power, x.shape)(x)


@_fast_exp.vjp
def _fast_exp_vjp(x: mx.array, cotangent: mx.array, y: mx.array) -> mx.array:
    return cotangent * y


def exp(x: mx.array) -> mx.array:
    """e^x, elementwise."""
    return cast(mx.array, _fast_exp(x)) if is_fast_here(x) else mx.exp(x)


def _gated(gate: mx.array, up: mx.array) -> mx.array:
    return gate * up / (1.0 + _power(-gate))


def _gated_vjp(gate: mx.array, up: mx.array, cotangent: mx.array) -> tuple[mx.array, mx.array]:
    s = 1.0 / (1.0 + _power(-gate))
    return cotangent * up * s * (1.0 + gate * (1.0 - s)), cotangent * gate * s


@mx.custom_function
def _fast_swiglu(gate: mx.array, up: mx.array) -> Any:
    return compiled(_gated, gate.shape)(gate, up)


@_fast_swiglu.vjp
def _fast_swiglu_vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array) -> Any:
    return compiled(_gated_vjp, primals[0].shape)(*primals, cotangent)


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """gate · σ(gate) · up, elementwise (arXiv:2002.05202)."""
    if is_fast_here(gate):
        return cast(mx.array, _fast_swiglu(gate, up))
    fused = gate.size > WORTHWHILE and not is_on_cpu()
    return cast(mx.array, (compiled(_plain_gated, gate.shape) if fused else _plain_gated)(gate, up))


def swiglu_gradient(gate: mx.array, up: mx.array, cotangent: mx.array) -> tuple[mx.array, mx.array]:
    """The cotangents of `gate` and `up` from that of `swiglu`; not differentiable."""
    function = _gated_vjp if is_fast_here(gate) else _plain_gated_vjp
    return cast("tuple[mx.array, mx.array]", compiled(function, gate.shape)(gate, up, cotangent))


def _plain_gated(gate: mx.array, up: mx.array) -> mx.array:
    return gate * mx.sigmoid(gate) * up


def _plain_gated_vjp(gate: mx.array, up: mx.array, cotangent: mx.array) -> tuple[mx.array, mx.array]:
    s = mx.sigmoid(gate)
    return cotangent * up * s * (1.0 + gate * (1.0 - s)), cotangent * gate * s
