"""What lies between the products of the learner, in one CUDA kernel each where MLX has several (`cuda/*.cu`).

Heads normalized and turned, and the way back; the sums that a softmax needs; the gradient of SwiGLU. Inside they are
float32, and every sum has one order on every card. Elsewhere MLX's own operations do the same.

Shapes: N packed tokens, H heads of d numbers, F intermediate size, M tokens that are foretold, V columns of logits.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from troupe.policy.network.elementwise import is_on_cpu

_BLOCKS_BACK = 512
"""Sums for a scale's cotangent: a part a block, so the number is fixed."""
_SIZES = (64, 128, 256)
_TYPES = (mx.bfloat16, mx.float16)


def has_kernels() -> bool:
    """Whether there is an NVIDIA card for them."""
    return mx.cuda.is_available() and not is_on_cpu()


@cache
def _kernel(name: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> Callable[..., list[mx.array]]:
    source = (Path(__file__).parent / "cuda" / f"{name}.cu").read_text()
    make = cast(Callable[..., Any], mx.fast.cuda_kernel)
    found: Callable[..., list[mx.array]] = make(
        name=f"troupe_{name}", input_names=inputs, output_names=outputs, source=source, ensure_row_contiguous=False
    )
    return found


def turns_heads(x: mx.array, scale: mx.array | None, turned: int) -> bool:
    """Whether `turned_heads` takes x (1, N, H, d), of whose heads the first `turned` numbers turn."""
    known = x.dtype in _TYPES and x.shape[0] == 1 and x.shape[-1] in _SIZES and turned == x.shape[-1]
    return known and has_kernels() and (scale is None or scale.dtype == x.dtype)


def turned_heads(x: mx.array, scale: mx.array | None, eps: float, cosines: mx.array, sines: mx.array) -> mx.array:
    """(1, N, H, d) through the norm with `scale` (d,), None: no norm, turned by angles' cosines and sines, float32
    (N, d/2) → (1, N, H, d) in the type of x. Differentiable by x and `scale`."""

    @mx.custom_function
    def turned(x: mx.array, scale: mx.array) -> Any:
        (y,) = _kernel("turn_heads", ("x", "scale", "eps", "cosines", "sines"), ("y",))(
            inputs=[x, scale, mx.array([eps]), cosines, sines],
            output_shapes=[x.shape],
            output_dtypes=[x.dtype],
            grid=((x.shape[1] * x.shape[2] + 7) // 8 * 256, 1, 1),
            threadgroup=(256, 1, 1),
            template=[("T", x.dtype), ("SIZE", x.shape[3]), ("NORMALIZED", normalized)],
        )
        return y

    @turned.vjp
    def vjp(primals: tuple[mx.array, mx.array], cotangent: mx.array, output: mx.array) -> Any:
        x, scale = primals
        y_grad = mx.contiguous(cotangent)  # of a sum it is one number for all
        of_x, of_scale = turned_heads_gradient(x, scale if normalized else None, eps, cosines, sines, y_grad)
        return of_x, mx.zeros_like(scale) if of_scale is None else of_scale

    normalized = scale is not None
    return cast(mx.array, turned(x, mx.ones(1, x.dtype) if scale is None else scale))


def turned_heads_gradient(
    x: mx.array, scale: mx.array | None, eps: float, cosines: mx.array, sines: mx.array, y_grad: mx.array
) -> tuple[mx.array, mx.array | None]:
    """The cotangents of x and `scale` (None where there is none) from that of what `turned_heads` gives."""
    of_x, parts = _kernel(
        "turn_heads_back", ("x", "scale", "eps", "cosines", "sines", "y_grad"), ("x_grad", "scale_grads")
    )(
        inputs=[x, mx.ones(1, x.dtype) if scale is None else scale, mx.array([eps]), cosines, sines, y_grad],
        output_shapes=[x.shape, (_BLOCKS_BACK, x.shape[3])],
        output_dtypes=[x.dtype, mx.float32],
        grid=(_BLOCKS_BACK * 256, 1, 1),
        threadgroup=(256, 1, 1),
        template=[("T", x.dtype), ("SIZE", x.shape[3]), ("NORMALIZED", scale is not None)],
    )
    return of_x, None if scale is None else mx.sum(parts, axis=0).astype(scale.dtype)


def row_sums(logits: mx.array, scale: float) -> tuple[mx.array, mx.array, mx.array]:
    """Of each row of logits (M, V), contiguous: the peak of them times `scale`, Σ e^z and Σ e^z·z, where z is what is
    below the peak; float32 (M,) each."""
    (sums,) = _kernel("row_sums", ("logits", "scale"), ("sums",))(
        inputs=[mx.contiguous(logits), mx.array([scale])],
        output_shapes=[(logits.shape[0], 3)],
        output_dtypes=[mx.float32],
        grid=(logits.shape[0] * 256, 1, 1),
        threadgroup=(256, 1, 1),
        template=[("T", logits.dtype)],
    )
    return sums[:, 0], sums[:, 1], sums[:, 2]


def gates_back(gate: mx.array, *others: mx.array) -> bool:
    """Whether `swiglu_gradients` takes gates of that type and size, with `others` of the same type."""
    known = gate.dtype in _TYPES and gate.shape[-1] % 8 == 0 and all(x.dtype == gate.dtype for x in others)
    return known and has_kernels()


def swiglu_gradients(gate: mx.array, up: mx.array, z_grad: mx.array) -> mx.array:
    """The cotangents of gate and up (1, N, F) from that of SwiGLU, one behind the other: (1, N, 2·F)."""
    rows: Sequence[mx.array] = [x.squeeze(0) for x in (gate, up, z_grad)]
    N, F = rows[0].shape
    (grads,) = _kernel("gate_back", ("gate", "up", "z_grad"), ("grads",))(
        inputs=rows,
        output_shapes=[(N, 2 * F)],
        output_dtypes=[gate.dtype],
        grid=((N * F // 8 + 255) // 256 * 256, 1, 1),
        threadgroup=(256, 1, 1),
        template=[("T", gate.dtype)],
    )
    return grads[None]
