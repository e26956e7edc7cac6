"""Through what mixes the tokens of a layer, and back by hand: attention, or a gated delta net.

Shapes: N packed tokens, D hidden size, H query heads, d head size.
"""

from functools import partial
from typing import NamedTuple

import mlx.core as mx

from troupe.policy.gradient.parts import Back
from troupe.policy.network.delta import gated_norm, rates
from troupe.policy.network.forward import (
    DELTA,
    DELTA_KERNEL,
    DELTA_NORM,
    DELTA_OUT,
    DELTA_PARTS,
    QKV,
    Layer,
    gated_heads,
)
from troupe.policy.network.packing import Attended, Packing
from troupe.policy.network.rotation import Rotations


class Attending(NamedTuple):
    """What the gradient of attention needs besides the layer's input."""

    q: mx.array
    k: mx.array
    v: mx.array
    gate: mx.array | None
    attended: Attended


class Recurring(NamedTuple):
    """The same of a gated delta net: the results of its products, and of its rule."""

    mixed: mx.array
    z: mx.array
    b: mx.array
    a: mx.array
    o: mx.array


Mixed = Attending | Recurring


def through(layer: Layer, x: mx.array, packing: Packing, rotations: Rotations) -> tuple[Mixed, mx.array]:
    """A layer's input (1, N, D) → what its gradient needs, and what is added to it (1, N, D)."""
    config, spec = layer.config, layer.spec
    if spec.is_delta:
        mixed, z, b, a = layer.delta_products(x)
        o = packing.rows.through(layer.delta_inputs(mixed, a, b), config.delta, paced=True).astype(mixed.dtype)
        y = gated_norm(o, z, layer.delta_tensor(DELTA_NORM), config.rms_norm_eps)
        return Recurring(mixed, z, b, a, o), layer.linear(DELTA_OUT)(y)
    q, k, v, *gate = layer.attention_inputs(x)
    turned = layer.turned(q, k, rotations.of(spec.rope))
    attended = packing.attend_keeping(*turned, v.swapaxes(1, 2), config.attention_scale, spec.window)
    inside = Attending(q, k, v, gate[0] if gate else None, attended)
    return inside, layer.linear("self_attn.o_proj")(_joined_heads(inside))


def _joined_heads(inside: Attending) -> mx.array:
    """What attention gives, gated: (1, H, N, d) → (1, N, H·d)."""
    o = inside.attended.o.swapaxes(1, 2)
    o = o if inside.gate is None else gated_heads(o, inside.gate)
    return o.reshape(*o.shape[:2], -1)


def back_through(
    back: Back, packing: Packing, rotations: Rotations, x: mx.array, inside: Mixed, o_grad: mx.array
) -> mx.array:
    """The cotangent of what is added to a layer's input x → that of x, as far as it comes through here."""
    if isinstance(inside, Recurring):
        return _back_through_delta(back, packing, x, inside, o_grad)
    layer, rotation = back.layer, rotations.of(back.layer.spec.rope)
    o_grad = back.product("self_attn.o_proj", _joined_heads(inside), o_grad).reshape(inside.q.shape)
    gate_grads = []
    if inside.gate is not None:
        arguments = [inside.attended.o.swapaxes(1, 2), inside.gate]
        o_grad, *gate_grads = mx.vjp(gated_heads, arguments, [o_grad])[1]
    turned = (*layer.turned(inside.q, inside.k, rotation), inside.v.swapaxes(1, 2))
    q_grad, k_grad, v_grad = packing.attend_gradient(
        *turned, layer.config.attention_scale, o_grad.swapaxes(1, 2), inside.attended, layer.spec.window
    )
    has_norms = layer.family.qk_norm
    q_grad, k_grad = (
        back.turned(f"self_attn.{name}_norm" if has_norms else None, y, rotation, grad.swapaxes(1, 2))
        for y, name, grad in ((inside.q, "q", q_grad), (inside.k, "k", k_grad))
    )
    if gate_grads:
        q_grad = mx.concatenate([q_grad, *gate_grads], axis=-1)  # a head of each after the other
    h = layer.normalized("input_layernorm", x)
    y_grads = [grad.reshape(*h.shape[:2], -1) for grad in (q_grad, k_grad, v_grad.swapaxes(1, 2))]
    return back.norm("input_layernorm", x, back.products(QKV, h, y_grads))


def _back_through_delta(back: Back, packing: Packing, x: mx.array, inside: Recurring, y_grad: mx.array) -> mx.array:
    layer = back.layer
    mixed, z, b, a, o = inside
    scale, vectors = layer.delta_tensor(DELTA_NORM), [layer.delta_tensor(name) for name in ("A_log", "dt_bias")]
    norm = partial(gated_norm, eps=layer.config.rms_norm_eps)
    y_grad = back.product(DELTA_OUT, norm(o, z, scale), y_grad)
    o_grad, z_grad, scale_grad = mx.vjp(norm, [o, z, scale], [y_grad])[1]
    inputs = layer.delta_inputs(mixed, a, b)
    grads = packing.rows.back(inputs, layer.config.delta, o_grad)
    a_grad, b_grad, *of_vectors = mx.vjp(rates, [a, b, *vectors], [grads.decay, grads.rate])[1]
    if back.of_base:
        names = ("A_log", "dt_bias", DELTA_NORM)
        back.grads |= {f"{DELTA}{name}": grad for name, grad in zip(names, (*of_vectors, scale_grad), strict=True)}
        back.grads[f"{DELTA}{DELTA_KERNEL}"] = grads.kernel[:, None]
    h = layer.normalized("input_layernorm", x)
    return back.norm("input_layernorm", x, back.each(DELTA_PARTS, h, (grads.mixed, z_grad, b_grad, a_grad)))
