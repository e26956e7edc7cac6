"""A matrix of the network, as it is held: in float numbers or packed into few bits, alone or with an adapter beside it.

    y = f ⊙ (x Wᵀ + (x Aᵀ) Bᵀ) + c

W (out, in) and, in some families, c (out,) are the network's. A (r, in) and B (out, r) are the adapter's (LoRA,
arXiv:2106.09685), the scale already in B; f (out,) is DoRA's magnitude over the norm of what it directs
(arXiv:2402.09353), a norm that counts as constant.

In float32, W + BA is computed anew at every use, which costs as much as a few tokens and spares two products of every
token. In 16 bits it is not: where the entries of BA are a thousandth of W's, most of the sums round back to W.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx

from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.elementwise import is_on_cpu
from troupe.policy.network.quantization import Quantized

A, B, MAGNITUDE = ".lora_A", ".lora_B", ".lora_magnitude_vector"
"""What is behind a module's name, before ".weight", in the names of its adapter; as PEFT has them."""
BIAS = ".bias"
"""What is behind a module's name in that of c."""

WORTH_EXPANDING = 512
"""Rows from which an NVIDIA card is faster with a packed matrix written out for the moment: MLX 0.32 multiplies packed
ones there at a quarter of the speed."""
JOINED: Mapping[str, Sequence[str]] = {
    "self_attn.qkv_proj": [f"self_attn.{name}_proj" for name in "qkv"],
    "mlp.gate_up_proj": ["mlp.gate_proj", "mlp.up_proj"],
}
"""Matrices of a layer that have the same input, and what they are called as one."""


def groups(names: Sequence[str]) -> dict[str, Sequence[str]]:
    """The matrices of a layer, by their names in it, as they may be joined: first those that are, by the name of the
    whole, then each of the others."""
    joined = {whole: parts for whole, parts in JOINED.items() if parts[0] in names}
    inside = {part for parts in joined.values() for part in parts}
    return joined | {name: [name] for name in names if name not in inside}


class Linear(NamedTuple):
    """One matrix and what stands beside it; the formula stands at the head of this file."""

    weight: mx.array
    """(out, in), or packed (out, in · bits / 32) uint32."""
    packing: Quantized | None = None
    scales: mx.array | None = None
    biases: mx.array | None = None
    a: mx.array | None = None
    """(r, in); or (S, r, in) where x is S equal parts, one behind the other, each with an adapter of its own."""
    b: mx.array | None = None
    factor: mx.array | None = None
    drop: Callable[[mx.array], mx.array] | None = None
    """What A sees of an input; linear, and its own transpose."""
    bias: mx.array | None = None
    """c."""

    @classmethod
    def of(cls, config: NetworkConfig, weights: Mapping[str, mx.array], module: str) -> "Linear":
        """The matrix `module`, such as "model.layers.0.mlp.up_proj", in a network's weights."""

        def find(kind: str) -> mx.array | None:
            return weights.get(f"{module}{kind}.weight")

        scales = weights.get(f"{module}.scales")
        packing = None
        if scales is not None and config.quantization is not None:
            packing = config.quantization.of(first_part(module))
        biases = weights.get(f"{module}.biases")
        weight, bias = weights[f"{module}.weight"], weights.get(module + BIAS)
        return cls(weight, packing, scales, biases, find(A), find(B), find(MAGNITUDE), None, bias)

    def __call__(self, x: mx.array) -> mx.array:
        """(…, in) → (…, out)."""
        y = self._times(x) if self.a is None or self.b is None else self._directed(x, self.a, self.b)
        if self.factor is not None and self.a is not None:
            if self.a.ndim == 2:
                y = y * self.factor
            else:
                y = (y.reshape(self.a.shape[0], -1, self.size) * self.factor[:, None]).reshape(y.shape)
        return y if self.bias is None else y + self.bias

    def gradients(self, x: mx.array, y_grad: mx.array, *, trained: bool) -> tuple[mx.array, dict[str, mx.array]]:
        """From x (…, in) and the cotangent (…, out) of y: that of x, and those of what is trained here.

        The latter by what is behind the module's name: "" is W's and `BIAS` c's (with `trained`), `A`, `B` and
        `MAGNITUDE` are the adapter's.
        """
        a, b = self.a, self.b
        grads: dict[str, mx.array] = {}
        if a is None or b is None:
            if trained:
                grads[""] = _by_rows(y_grad).T @ _by_rows(x)
            if trained and self.bias is not None:
                grads[BIAS] = mx.sum(_by_rows(y_grad), axis=0)
            return self._back(y_grad), grads
        if self.factor is not None:
            grads[MAGNITUDE] = mx.sum(_by_rows(y_grad) * _by_rows(self._directed(x, a, b)), axis=0)
            y_grad = y_grad * self.factor
        inner_grad, seen = y_grad @ b, x if self.drop is None else self.drop(x)
        grads[A] = _by_rows(inner_grad).T @ _by_rows(seen)
        grads[B] = _by_rows(y_grad).T @ _by_rows(seen @ a.T)
        if self.is_merged:
            return y_grad @ self.merged().weight, grads
        through_a = inner_grad @ a
        return self._back(y_grad) + (through_a if self.drop is None else self.drop(through_a)), grads

    @property
    def is_merged(self) -> bool:
        """Whether the adapter is added to the matrix before it is used."""
        if self.a is None or self.scales is not None or self.drop is not None:
            return False
        return self.a.ndim == 2 and self.weight.dtype == mx.float32

    def merged(self) -> "Linear":
        """W + BA, without the factor; lazily. On a CPU its transpose is contiguous, as `by_columns` has it."""
        assert self.a is not None
        assert self.b is not None
        if is_on_cpu():
            return Linear(mx.addmm(self.weight.T, self.a.T, self.b.T).T)
        return Linear(mx.addmm(self.weight, self.b, self.a))

    def rows(self, block: slice) -> "Linear":
        """Some of the rows of W, hence of y, of a matrix without adapter."""
        scales, biases = (None if part is None else part[block] for part in (self.scales, self.biases))
        return Linear(self.weight[block], self.packing, scales, biases)

    @property
    def size(self) -> int:
        """Numbers of y: rows of W."""
        return self.weight.shape[0]

    def expanded(self, dtype: mx.Dtype, ids: mx.array | None = None) -> mx.array:
        """W as float numbers (out, in) of a type, or the rows of W of integer ids (…) → (…, in); lazily."""
        weight, scales, biases = (
            part if part is None or ids is None else part[ids] for part in (self.weight, self.scales, self.biases)
        )
        assert weight is not None
        if self.packing is None or scales is None:
            return weight.astype(dtype)
        group, bits, mode = self.packing.group_size, self.packing.bits, self.packing.mode
        return mx.dequantize(weight, scales, biases, group_size=group, bits=bits, mode=mode, dtype=dtype)

    def _directed(self, x: mx.array, a: mx.array, b: mx.array) -> mx.array:
        """y without the factor."""
        if self.is_merged:
            return x @ self.merged().weight.T
        seen, y = x if self.drop is None else self.drop(x), self._times(x)
        if a.ndim == 3:
            seen = seen.reshape(a.shape[0], -1, seen.shape[-1])
        inner = seen @ a.swapaxes(-1, -2)
        return mx.addmm(y.reshape(*inner.shape[:-1], -1), inner, b.swapaxes(-1, -2)).reshape(y.shape)

    def _times(self, x: mx.array) -> mx.array:
        return x @ self.weight.T if self.scales is None else self._packed_product(x, transpose=True)

    def _back(self, y_grad: mx.array) -> mx.array:
        return y_grad @ self.weight if self.scales is None else self._packed_product(y_grad, transpose=False)

    def _packed_product(self, x: mx.array, *, transpose: bool) -> mx.array:
        assert self.packing is not None
        assert self.scales is not None
        if x.size // x.shape[-1] >= WORTH_EXPANDING and mx.cuda.is_available() and not is_on_cpu():
            return x @ (self.expanded(x.dtype).T if transpose else self.expanded(x.dtype))
        return mx.quantized_matmul(
            x,
            self.weight,
            self.scales,
            self.biases,
            transpose=transpose,
            group_size=self.packing.group_size,
            bits=self.packing.bits,
            mode=self.packing.mode,
        )


def tensor_name(module: str, kind: str) -> str:
    """The name of a tensor of a module, from what `Linear.gradients` calls it."""
    return f"{module}{BIAS}" if kind == BIAS else f"{module}{kind}.weight"


def first_part(module: str) -> str:
    """The first of the matrices that a name of `JOINED` stands for; any other name as it is."""
    for whole, parts in JOINED.items():
        if module.endswith(whole):
            return module.removesuffix(whole) + parts[0]
    return module


def by_columns(x: mx.array) -> mx.array:
    """The same matrix, whose transpose is contiguous: BLAS copies a matrix at every product, and transposing it on the
    way takes as long as multiplying 32 rows by it."""
    return mx.contiguous(x.T).T


def _by_rows(x: mx.array) -> mx.array:
    """(…, n) → (m, n)."""
    return x.reshape(-1, x.shape[-1])
