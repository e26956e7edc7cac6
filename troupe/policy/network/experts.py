"""A mixture of experts in the place of an MLP: every token goes to the few experts that a router finds likeliest.

    p = softmax(x Wᵀ) in float32;  y = Σ over the k likeliest e of s_e · expert_e(x);  s = p, or p over the sum of these

(Shazeer et al. 2017, arXiv:1701.06538; as in Qwen3, arXiv:2505.09388.) Tokens are laid out by expert, each k times, so
that a matrix of an expert meets all its tokens at once, and nothing of the size tokens × matrix is made.

Shapes: N tokens, E experts of F numbers each, k experts a token, n = N·k places.
"""

from collections.abc import Mapping
from typing import NamedTuple

import mlx.core as mx

from troupe.policy.network.architecture import Experts, NetworkConfig
from troupe.policy.network.elementwise import is_on_cpu
from troupe.policy.network.linear import Linear
from troupe.policy.network.quantization import Quantized

_ROWS_WORTH_EXPANDING = 64
"""Rows an expert from which a packed stack is written out for the moment on an NVIDIA card. Not measured."""


_PLACES_WORTH_SORTING = 4
"""Places an expert beyond which tokens are laid out by expert, elsewhere than on a CPU: fewer are read one by one in
less time (64 tokens of 128 experts on an H200: 9.4 ms for 12.4), and sorting takes six more launches a layer."""


class Stack(NamedTuple):
    """A matrix of all experts of a layer: float numbers, or packed."""

    weight: mx.array
    """(E, out, in), or packed (E, out, in · bits / 32) uint32."""
    packing: Quantized | None = None
    scales: mx.array | None = None
    biases: mx.array | None = None

    @classmethod
    def of(cls, config: NetworkConfig, weights: Mapping[str, mx.array], module: str) -> "Stack":
        """The matrices `module`, such as "model.layers.0.mlp.experts.up_proj", in a network's weights."""
        return cls(*Linear.of(config, weights, module)[:4])

    def __call__(self, x: mx.array, experts: mx.array, *, is_sorted: bool = True) -> mx.array:
        """x (n, in), each row through the matrix of its expert, ids (n,), ascending where `is_sorted` → (n, out)."""
        return self._product(x, experts, transpose=True, is_sorted=is_sorted)

    def back(self, y_grad: mx.array, experts: mx.array) -> mx.array:
        """From the cotangent of y (n, out) to that of x (n, in)."""
        return self._product(y_grad, experts, transpose=False, is_sorted=True)

    def _product(self, x: mx.array, experts: mx.array, *, transpose: bool, is_sorted: bool) -> mx.array:
        rows = x.reshape(len(x), 1, -1)  # not x[:, None]: on GPUs MLX 0.32 takes a new axis' stride for the rows'
        if self.packing is None or self.scales is None:
            return _gathered(rows, self.weight, experts, transpose=transpose, is_sorted=is_sorted)
        group, bits, mode = self.packing.group_size, self.packing.bits, self.packing.mode
        if len(x) >= _ROWS_WORTH_EXPANDING * len(self.weight) and mx.cuda.is_available() and not is_on_cpu():
            weight = mx.dequantize(
                self.weight, self.scales, self.biases, group_size=group, bits=bits, mode=mode, dtype=x.dtype
            )
            return _gathered(rows, weight, experts, transpose=transpose, is_sorted=is_sorted)
        return mx.gather_qmm(
            rows,
            self.weight,
            self.scales,
            self.biases,
            rhs_indices=experts,
            transpose=transpose,
            group_size=group,
            bits=bits,
            mode=mode,
            sorted_indices=is_sorted,
        )[:, 0]


def _gathered(rows: mx.array, weight: mx.array, experts: mx.array, *, transpose: bool, is_sorted: bool) -> mx.array:
    matrices = weight.swapaxes(-1, -2) if transpose else weight
    rows, matrices, dtype = _computable(rows), _computable(matrices), rows.dtype
    return mx.gather_mm(rows, matrices, rhs_indices=experts, sorted_indices=is_sorted)[:, 0].astype(dtype)


def _computable(x: mx.array) -> mx.array:
    """The same numbers in a type that MLX has such products for: on a CPU float32 alone."""
    has_others = mx.metal.is_available() or mx.cuda.is_available()
    return x if has_others and not is_on_cpu() else x.astype(mx.float32)


class Places(NamedTuple):
    """N tokens, each k times, in the order of their experts."""

    experts: mx.array
    """(n,) ids, ascending."""
    tokens: mx.array
    """(n,) which token stands where."""
    order: mx.array
    """(n,) which of the N·k choices, token by token."""
    back: mx.array
    """(n,) where each choice stands."""

    @classmethod
    def of(cls, chosen: mx.array) -> "Places":
        """From the experts of each token (N, k)."""
        flat = chosen.reshape(-1)
        order = mx.argsort(flat)
        return cls(flat[order], order // chosen.shape[1], order, mx.argsort(order))

    def collected(self, y: mx.array, tokens: int) -> mx.array:
        """(n, …) in this order → (N, k, …)."""
        return y[self.back].reshape(tokens, -1, *y.shape[1:])

    def sums_by_expert(self, y_grad: mx.array, x: mx.array, count: int) -> mx.array:
        """Σ over the places of each expert of y_grad xᵀ: (n, out), (n, in) → (E, out, in)."""
        ends = mx.cumsum(mx.sum(self.experts[:, None] == mx.arange(count), axis=0))
        starts = mx.concatenate([mx.zeros(1, ends.dtype), ends[:-1]])
        segments = mx.stack([starts, ends], axis=1).astype(mx.uint32)
        return mx.segmented_mm(_computable(y_grad.T), _computable(x), segments).astype(x.dtype)


def are_few(spec: Experts, chosen: mx.array) -> bool:
    """Whether tokens with these experts each (N, k) are not worth laying out by expert."""
    return chosen.size <= _PLACES_WORTH_SORTING * spec.number and not is_on_cpu()


class Routed(NamedTuple):
    """Where tokens go."""

    logits: mx.array
    """(N, E), of the router."""
    chosen: mx.array
    """(N, k) ids of experts, ascending."""


def likeliest(spec: Experts, logits: mx.array) -> mx.array:
    """The k experts of the largest logits (N, E) → ids (N, k), ascending, so that it is the same whoever chose them."""
    k = spec.per_token
    return mx.sort(mx.argpartition(-logits.astype(mx.float32), kth=k - 1, axis=-1)[:, :k], axis=-1).astype(mx.int32)


def probabilities(logits: mx.array) -> mx.array:
    """Of all experts, float32."""
    return mx.softmax(logits.astype(mx.float32), axis=-1)


def shares(spec: Experts, logits: mx.array, chosen: mx.array) -> mx.array:
    """What the results of the chosen experts are multiplied by, float32 (N, k)."""
    found = mx.take_along_axis(probabilities(logits), chosen, axis=-1)
    return found / mx.sum(found, axis=-1, keepdims=True) if spec.normalized else found
