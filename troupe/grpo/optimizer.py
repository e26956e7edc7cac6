"""AdamW, clipping and learning rates as pure functions over flat dicts of arrays.

Knows nothing of models, losses or files: weights and gradients are `name → array`, the optimizer's state is too, so
that a checkpoint can write it as it is.

State: `step` float32 () updates done; `m.NAME` and `v.NAME` float32 first and second moments of weight NAME; and
`master.NAME`, the float32 weight itself, for weights of lower precision. (A bfloat16 weight near 0.02 moves in steps
of 1e-4, so updates of 1e-6 would all be rounded away.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal, NamedTuple, Protocol

import mlx.core as mx

OptimizerState = dict[str, mx.array]
"""Flat name → float32 array; see the module docstring."""

Scheduler = Literal["linear", "constant", "cosine"]


class Schedule(Protocol):
    """The settings that `learning_rate` reads; `LearnerConfig` has them."""

    @property
    def lr(self) -> float: ...
    @property
    def lr_scheduler(self) -> Scheduler: ...
    @property
    def warmup_steps(self) -> int: ...


def adamw_init(weights: Mapping[str, mx.array]) -> OptimizerState:
    """The state before the first update: zero moments, and a float32 copy of each weight that is not float32."""
    state: OptimizerState = {"step": mx.array(0.0)}
    for name, weight in weights.items():
        state[f"m.{name}"] = mx.zeros(weight.shape, dtype=mx.float32)
        state[f"v.{name}"] = mx.zeros(weight.shape, dtype=mx.float32)
        if weight.dtype != mx.float32:
            state[f"master.{name}"] = weight.astype(mx.float32)
    return state


def adamw_update(
    weights: Mapping[str, mx.array],
    grads: Mapping[str, mx.array],
    state: Mapping[str, mx.array],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[dict[str, mx.array], OptimizerState]:
    """One AdamW update (Loshchilov & Hutter 2019, arXiv:1711.05101), as `torch.optim.AdamW` computes it.

        θ ← θ·(1 − lr·λ)                      λ = weight_decay, matrices (ndim ≥ 2) only
        m ← β₁·m + (1 − β₁)·g                 v ← β₂·v + (1 − β₂)·g²
        θ ← θ − lr/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)

    Returns new weights, of the dtypes of the old ones, and the new state; nothing is evaluated. `state["step"]` must
    be evaluated or cheap to evaluate: its value is read, so that the powers βᵗ are taken in double precision.
    """
    beta1, beta2 = betas
    t = round(float(state["step"])) + 1
    rates = _Rates(
        beta1=mx.array(beta1),
        one_minus_beta1=mx.array(1.0 - beta1),
        beta2=mx.array(beta2),
        one_minus_beta2=mx.array(1.0 - beta2),
        eps=mx.array(eps),
        step_size=mx.array(lr / (1.0 - beta1**t)),
        root_correction=mx.array(math.sqrt(1.0 - beta2**t)),
    )
    decayed, whole = mx.array(1.0 - lr * weight_decay), mx.array(1.0)
    new_weights: dict[str, mx.array] = {}
    new_state: OptimizerState = {"step": mx.array(float(t))}
    for name, weight in weights.items():
        master = state.get(f"master.{name}", weight)
        keep = decayed if weight.ndim >= 2 else whole
        updated, m, v = _update_one(master, grads[name], state[f"m.{name}"], state[f"v.{name}"], keep, rates)
        new_state[f"m.{name}"] = m
        new_state[f"v.{name}"] = v
        if weight.dtype != mx.float32:
            new_state[f"master.{name}"] = updated
        new_weights[name] = updated.astype(weight.dtype)
    return new_weights, new_state


class _Rates(NamedTuple):
    """The numbers of one update, each float32 ()."""

    beta1: mx.array
    one_minus_beta1: mx.array
    beta2: mx.array
    one_minus_beta2: mx.array
    eps: mx.array
    step_size: mx.array
    root_correction: mx.array


# One fused kernel for each weight: 7.0 → 3.4 ms for 450,000 weights in 45 arrays on a CPU, with the same bits.
@partial(mx.compile, shapeless=True)
def _update_one(
    weight: mx.array, grad: mx.array, m: mx.array, v: mx.array, keep: mx.array, rates: _Rates
) -> tuple[mx.array, mx.array, mx.array]:
    """The new weight, m and v of one array; `keep` is 1 − lr·λ. All float32 but the gradient."""
    grad = grad.astype(mx.float32)
    m = rates.beta1 * m + rates.one_minus_beta1 * grad
    v = rates.beta2 * v + rates.one_minus_beta2 * mx.square(grad)
    direction = m / (mx.sqrt(v) / rates.root_correction + rates.eps)
    return weight * keep - rates.step_size * direction, m, v


def global_norm(grads: Mapping[str, mx.array]) -> mx.array:
    """‖g‖₂ over all gradients together, float32 ()."""
    squares = [mx.sum(mx.square(grad.astype(mx.float32))) for grad in grads.values()]
    return mx.sqrt(mx.sum(mx.stack(squares)))


def clip_by_global_norm(grads: Mapping[str, mx.array], max_norm: float | None) -> tuple[dict[str, mx.array], mx.array]:
    """Scales all gradients by min(1, max_norm / (‖g‖₂ + 1e-6)), as `torch.nn.utils.clip_grad_norm_` does.

    `max_norm` None or 0 leaves them as they are. Returns the gradients and ‖g‖₂ before clipping, float32 ().
    """
    norm = global_norm(grads)
    if not max_norm:
        return dict(grads), norm
    scale = mx.minimum(max_norm / (norm + 1e-6), 1.0)
    return {name: grad * scale.astype(grad.dtype) for name, grad in grads.items()}, norm


def learning_rate(step: int, total_steps: int, config: Schedule) -> float:
    """The learning rate of update `step` (from 0) of `total_steps`, by the formulas of transformers' `get_scheduler`.

    During the first `warmup_steps` updates lr · step / warmup_steps, so that the first update of a warm-up has rate
    0. Then, with p the part of the remaining updates that is done: constant lr; linear lr·(1 − p);
    cosine lr·(1 + cos πp)/2.
    """
    if step < config.warmup_steps:
        return config.lr * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.lr * _SHAPES[config.lr_scheduler](min(1.0, done))


_SHAPES: dict[Scheduler, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
