"""AdamW and the memory that it takes, clipping and learning rates: pure functions over flat dicts of arrays.

Weights and gradients are `name → array`, the optimizer's state is too, so that a checkpoint can write it as it is.

State: `step` float32 () updates done; `m.NAME` and `v.NAME` float32 first and second moments of weight NAME; and what
a weight of lower precision lacks of the float32 weight that is really trained (a bfloat16 weight near 0.02 moves in
steps of 1e-4, so updates of 1e-6 would all be rounded away): `low.NAME` uint16, the low half of its bits, where the
weight is bfloat16 and so its high half, rounded; `master.NAME`, the whole of it, where the weight is float16.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import mlx.core as mx

from troupe.grpo.config import LearnerConfig, Scheduler
from troupe.policy.network.linear import MAGNITUDE

OptimizerState = dict[str, mx.array]
"""Flat name → array, as the docstring of this file has it."""

_PARTS = ("m", "v", "low", "master")
LEARNING_RATE = 1e-6
"""Where the config leaves it open."""
UPDATED_AT_ONCE = 2**24
"""Numbers, of one weight or of several, that are updated at a time."""


def adamw_init(weights: Mapping[str, mx.array]) -> OptimizerState:
    """The state before the first update."""
    state: OptimizerState = {"step": mx.array(0.0)}
    for name, weight in weights.items():
        state[f"m.{name}"] = mx.zeros(weight.shape, dtype=mx.float32)
        state[f"v.{name}"] = mx.zeros(weight.shape, dtype=mx.float32)
        if weight.dtype == mx.bfloat16:
            state[f"low.{name}"] = mx.zeros(weight.shape, dtype=mx.uint16)
        elif weight.dtype != mx.float32:
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

        θ ← θ·(1 − lr·λ)                      λ = weight_decay, matrices (ndim ≥ 2) and DoRA's magnitudes only
        m ← β₁·m + (1 − β₁)·g                 v ← β₂·v + (1 − β₂)·g²
        θ ← θ − lr/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)

    Returns new weights, of the dtypes of the old ones, and the new state; the arguments stay as they are.
    """
    new_weights, new_state = dict(weights), dict(state)
    adamw_update_in_place(new_weights, dict(grads), new_state, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    return new_weights, new_state


def adamw_update_in_place(
    weights: dict[str, mx.array],
    grads: dict[str, mx.array],
    state: OptimizerState,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_scale: mx.array | float = 1.0,
) -> None:
    """`adamw_update` with gradients times `grad_scale`, that puts new arrays into `weights` and `state`.

    Part by part, old arrays that nobody else holds being given up on the way, and `grads` with them. So an update
    takes the memory of a few millions of numbers more, not of everything twice.
    """
    beta1, beta2 = betas
    t = round(float(state["step"])) + 1
    state["step"] = mx.array(float(t))
    rates = _Rates(
        beta1=mx.array(beta1),
        one_minus_beta1=mx.array(1.0 - beta1),
        beta2=mx.array(beta2),
        one_minus_beta2=mx.array(1.0 - beta2),
        eps=mx.array(eps),
        step_size=mx.array(lr / (1.0 - beta1**t)),
        root_correction=mx.array(math.sqrt(1.0 - beta2**t)),
        grad_scale=mx.array(grad_scale, mx.float32),
    )
    decayed, whole = mx.array(1.0 - lr * weight_decay), mx.array(1.0)
    for names in _portions(weights):
        taken = [_pop_parts(name, weights, grads, state) for name in names]
        keeps = [decayed if _is_decayed(name, parts["m"]) else whole for name, parts in zip(names, taken, strict=True)]
        if taken[0]["m"].size > UPDATED_AT_ONCE:
            updated = [_updated_in_slices(taken.pop(), keeps[0], rates)]
        else:
            updated = _updated(taken, keeps, rates)
            taken.clear()  # or the old arrays would outlive the update
            mx.eval(updated)
        for name, parts in zip(names, updated, strict=True):
            weights[name] = parts.pop("weight")
            state |= {f"{part}.{name}": array for part, array in parts.items()}


def _is_decayed(name: str, x: mx.array) -> bool:
    """As in transformers' Trainer: all but norms and biases."""
    return x.ndim >= 2 or name.endswith(f"{MAGNITUDE}.weight")


def _portions(weights: Mapping[str, mx.array]) -> list[list[str]]:
    """Names of weights that are updated together; the largest weights when the fewest gradients are left."""
    portions: list[list[str]] = [[]]
    size = 0
    for name in sorted(weights, key=lambda name: weights[name].size):
        size += weights[name].size
        if size > UPDATED_AT_ONCE and portions[-1]:
            portions.append([])
            size = weights[name].size
        portions[-1].append(name)
    return portions


def _pop_parts(
    name: str, weights: dict[str, mx.array], grads: dict[str, mx.array], state: OptimizerState
) -> dict[str, mx.array]:
    """Everything that belongs to one weight, out of the three dicts."""
    parts = {"weight": weights.pop(name), "grad": grads.pop(name)}
    return parts | {part: state.pop(f"{part}.{name}") for part in _PARTS if f"{part}.{name}" in state}


def _updated_in_slices(parts: dict[str, mx.array], keep: mx.array, rates: _Rates) -> dict[str, mx.array]:
    """The new arrays of a large weight, slice by slice written into the old ones, which are given up."""
    rows = max(1, UPDATED_AT_ONCE * parts["m"].shape[0] // parts["m"].size)
    for name in parts:
        parts[name] = parts[name][:]  # writing into an array changes it for all who hold the object
    for start in range(0, parts["m"].shape[0], rows):
        part = slice(start, start + rows)
        (updated,) = _updated([{name: array[part] for name, array in parts.items()}], [keep], rates)
        mx.eval(updated)
        mx.synchronize()  # a GPU lets go of what it has read only now; before, writing would copy the whole array
        for name, array in updated.items():
            parts[name][part] = array
        mx.eval(parts)
    del parts["grad"]
    return parts


class _Rates(NamedTuple):
    """The numbers of one update, each float32 ()."""

    beta1: mx.array
    one_minus_beta1: mx.array
    beta2: mx.array
    one_minus_beta2: mx.array
    eps: mx.array
    step_size: mx.array
    root_correction: mx.array
    grad_scale: mx.array


def _move(
    m: mx.array, v: mx.array, grad: mx.array, weight: mx.array, keep: mx.array, rates: _Rates
) -> tuple[mx.array, mx.array, mx.array]:
    """The new m, v and weight, float32 all but the gradient."""
    grad = grad.astype(mx.float32) * rates.grad_scale
    m = rates.beta1 * m + rates.one_minus_beta1 * grad
    v = rates.beta2 * v + rates.one_minus_beta2 * mx.square(grad)
    return m, v, weight * keep - rates.step_size * (m / (mx.sqrt(v) / rates.root_correction + rates.eps))


@mx.compile  # a few fused kernels a weight; one call for many weights, because a call from Python costs 50 µs
def _updated(taken: list[dict[str, mx.array]], keeps: list[mx.array], rates: _Rates) -> list[dict[str, mx.array]]:
    """The new arrays of some weights; `keeps` are 1 − lr·λ."""
    updated = []
    for parts, keep in zip(taken, keeps, strict=True):
        weight, moments = parts["weight"], (parts["m"], parts["v"], parts["grad"])
        if weight.dtype == mx.bfloat16:
            m, v, trained = _move(*moments, join_halves(weight, parts["low"]), keep, rates)
            high, low = split_halves(trained)
            updated.append({"m": m, "v": v, "weight": high, "low": low})
        else:
            m, v, trained = _move(*moments, parts.get("master", weight), keep, rates)
            copy = {"master": trained} if "master" in parts else {}
            updated.append({"m": m, "v": v, "weight": trained.astype(weight.dtype), **copy})
    return updated


def join_halves(weight: mx.array, low: mx.array) -> mx.array:
    """The float32 array that `split_halves` was given."""
    high, low = mx.view(weight, mx.uint16).astype(mx.uint32), low.astype(mx.uint32)
    rounded_up = (low >> 15) << 16
    return mx.view((high << 16) + low - rounded_up, mx.float32)


def split_halves(x: mx.array) -> tuple[mx.array, mx.array]:
    """float32 → it rounded to the nearest bfloat16, and the low half of its bits, uint16. Without loss."""
    bits = mx.view(x, mx.uint32)
    return mx.view(((bits + 0x8000) >> 16).astype(mx.uint16), mx.bfloat16), (bits & 0xFFFF).astype(mx.uint16)


def optimizer_state_bytes(numbers: int, dtype: mx.Dtype) -> int:
    """Of the state of `adamw_init` for so many weights of one type: two float32 moments, and what `dtype` lacks."""
    lacking = 2 if dtype == mx.bfloat16 else 0 if dtype == mx.float32 else 4
    return numbers * (4 + 4 + lacking)


def update_bytes(numbers: int, largest: int, dtype: mx.Dtype) -> int:
    """What `adamw_update_in_place` takes beside the weights, the state and the gradients: an upper end, as measured.

    `numbers` of all weights, of which `largest` are in the largest ones (embedding and head). No more than a portion
    is under way: the new arrays of its largest weights and what their kernels make, or a little of all of it. A weight
    larger than a portion is there anew before its gradient is gone.
    """
    portion = math.ceil(max(8 * min(numbers, UPDATED_AT_ONCE), 18 * min(largest, UPDATED_AT_ONCE)))
    return portion + (largest * dtype.size if largest > UPDATED_AT_ONCE else 0)


def global_norm(grads: Mapping[str, mx.array]) -> mx.array:
    """‖g‖₂ over all gradients together, float32 (); the same bits whatever the order of the dict."""
    sums = [_sum_of_squares(part) for name in sorted(grads) for part in _slices(grads[name])]
    while len(sums) > 1:  # sixteen a kernel
        sums = [_added_up(*sums[start : start + 16]) for start in range(0, len(sums), 16)]
    return mx.sqrt(sums[0])


def _slices(x: mx.array) -> list[mx.array]:
    return [x.reshape(-1)[start : start + UPDATED_AT_ONCE] for start in range(0, x.size, UPDATED_AT_ONCE)]


@partial(mx.compile, shapeless=True)
def _added_up(*numbers: mx.array) -> mx.array:
    total = numbers[0]
    for number in numbers[1:]:
        total = total + number
    return total


@partial(mx.compile, shapeless=True)
def _sum_of_squares(x: mx.array) -> mx.array:
    return mx.sum(mx.square(x.astype(mx.float32)))


def clip_scale(norm: mx.array, max_norm: float | None) -> mx.array:
    """What gradients of norm ‖g‖₂ are multiplied by: min(1, max_norm / (‖g‖₂ + 1e-6)); 1 where max_norm is None or 0.

    As `torch.nn.utils.clip_grad_norm_` has it. float32 ().
    """
    return mx.minimum(max_norm / (norm + 1e-6), 1.0) if max_norm else mx.array(1.0)


def clip_by_global_norm(grads: Mapping[str, mx.array], max_norm: float | None) -> tuple[dict[str, mx.array], mx.array]:
    """All gradients times `clip_scale`, and ‖g‖₂ before clipping, float32 ()."""
    norm = global_norm(grads)
    scale = clip_scale(norm, max_norm)
    return {name: grad * scale.astype(grad.dtype) for name, grad in grads.items()}, norm


def learning_rate(step: int, total_steps: int, config: LearnerConfig) -> float:
    """The learning rate of update `step` (from 0) of `total_steps`, by the formulas of transformers' `get_scheduler`.

    During the first `warmup_steps` updates lr · step / warmup_steps, so that the first update of a warm-up has rate
    0. Then, with p the part of the remaining updates that is done: constant lr; linear lr·(1 − p);
    cosine lr·(1 + cos πp)/2.
    """
    peak = LEARNING_RATE if config.lr is None else config.lr
    if step < config.warmup_steps:
        return peak * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return peak * _SHAPES[config.lr_scheduler](min(1.0, done))


_SHAPES: dict[Scheduler, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
}
