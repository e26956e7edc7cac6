"""Through the MLP of a layer, or its experts, keeping what the way back needs; and the way back.

Of experts only what has as many rows as there are places is made, n = N·k for N tokens with k experts each, and of
their matrices nothing but the gradients themselves. The share of an expert in a token has the gradient of its part in
the result, which is told from within: ⟨y_grad, W_down z⟩ = ⟨y_grad W_down, z⟩.
"""

from functools import partial
from typing import NamedTuple

import mlx.core as mx

from troupe.policy.gradient.parts import Back
from troupe.policy.network.experts import Places, Routed, probabilities, shares
from troupe.policy.network.forward import GATE_UP, Layer
from troupe.policy.network.fused_kernels import gates_back, swiglu_gradients
from troupe.policy.network.gating import gated, gated_gradient
from troupe.policy.network.tensors import ROUTER, STACKS


class KeptMlp(NamedTuple):
    """What the gradient needs besides the input."""

    gate: mx.array
    """(1, N, F), or of experts (n, F) in their order."""
    up: mx.array
    down: mx.array | None
    """The result, where there is a norm behind it."""
    routed: Routed | None
    """Where tokens went, in a layer that is a mixture of experts."""


def through_mlp(layer: Layer, x: mx.array) -> tuple[KeptMlp, mx.array]:
    """x (1, N, D) → what the MLP, or the experts, give of it, before the norm behind them."""
    family = layer.config.family
    h = layer.normalized(family.norm_before_mlp, x)
    routed = None
    if layer.spec.experts is None:
        gate, up = layer.inputs(GATE_UP, h)
        y = layer.linear("mlp.down_proj")(gated(family.activation, gate, up))
    else:
        routed = layer.routed(h[0])
        places = Places.of(routed.chosen)
        gate, up = layer.expert_inputs(h[0], places)
        y = layer.stack("down")(gated(family.activation, gate, up), places.experts)
        y = layer.mixed(routed, places, y)[None]
    return KeptMlp(gate, up, y if family.norms_behind else None, routed), y


def back_through_mlp(back: Back, layer: Layer, x: mx.array, kept: KeptMlp, y_grad: mx.array) -> mx.array:
    """From the cotangent of what the layer gives to that of x behind the norm, (1, N, D)."""
    family = layer.config.family
    y_grad = back.norm(family.norm_behind_mlp, kept.down, y_grad)
    h = layer.normalized(family.norm_before_mlp, x)
    if kept.routed is not None:
        return _back_through_experts(back, layer, h[0], kept, kept.routed, y_grad[0])[None]
    z_grad = back.product("mlp.down_proj", gated(family.activation, kept.gate, kept.up), y_grad)
    if family.activation == "silu" and gates_back(kept.gate, kept.up, z_grad):
        both = swiglu_gradients(kept.gate, kept.up, z_grad)
        is_joined = len(layer.parts(GATE_UP)) == 1
        return back.products(GATE_UP, h, [both] if is_joined else list(mx.split(both, 2, axis=-1)))
    return back.products(GATE_UP, h, gated_gradient(family.activation, kept.gate, kept.up, z_grad))


def _back_through_experts(
    back: Back, layer: Layer, h: mx.array, kept: KeptMlp, routed: Routed, y_grad: mx.array
) -> mx.array:
    """From the cotangent of the result (N, D) to that of h (N, D)."""
    spec, activation, N = layer.spec.experts, layer.config.family.activation, len(h)
    assert spec is not None
    places = Places.of(routed.chosen)
    x, y_grads = h[places.tokens], y_grad[places.tokens]
    z = gated(activation, kept.gate, kept.up)
    through = layer.stack("down").back(y_grads, places.experts)

    of_shares = mx.sum((through * z).astype(mx.float32), axis=-1)
    routing = partial(shares, spec, chosen=routed.chosen)
    parts, (logits_grad,) = mx.vjp(routing, [routed.logits], [places.collected(of_shares, N)])
    balance_grad = None if layer.routes is None else layer.routes.probabilities_grad()
    if balance_grad is not None:
        logits_grad = logits_grad + mx.vjp(probabilities, [routed.logits], [balance_grad])[1][0]
    share = parts[0].astype(z.dtype).reshape(-1)[places.order][:, None]
    gate_grad, up_grad = gated_gradient(activation, kept.gate, kept.up, through * share)

    if back.of_base:
        for name, grad, given in (("gate", gate_grad, x), ("up", up_grad, x), ("down", y_grads * share, z)):
            back.grads[f"{STACKS[name]}.weight"] = places.sums_by_expert(grad, given, spec.number)
    x_grad = sum(layer.stack(name).back(g, places.experts) for name, g in (("gate", gate_grad), ("up", up_grad)))
    assert isinstance(x_grad, mx.array)
    return mx.sum(places.collected(x_grad, N), axis=1) + back.product(ROUTER, h, logits_grad)
