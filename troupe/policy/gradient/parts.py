"""The ways back through the parts of a layer that all layers are made of: matrices and norms."""

from collections.abc import Sequence
from functools import partial, reduce

import mlx.core as mx

from troupe.policy.network.forward import Layer, normalized
from troupe.policy.network.fused_kernels import turned_heads_gradient
from troupe.policy.network.linear import tensor_name
from troupe.policy.network.rotation import Rotation

Gradients = dict[str, mx.array]


class Back:
    """The ways back through the parts of one layer, each from the cotangent of what a part gives to that of its input
    x; the gradients of its weights are in `grads`, by the names within the layer."""

    def __init__(self, layer: Layer, *, of_base: bool) -> None:
        """Without `of_base` only adapters are trained."""
        self.layer, self.of_base = layer, of_base
        self.grads: Gradients = {}

    def product(self, name: str, x: mx.array, y_grad: mx.array) -> mx.array:
        """Through a matrix."""
        x_grad, found = self.layer.linear(name).gradients(x, y_grad, trained=self.of_base)
        self.grads.update({tensor_name(name, kind): grad for kind, grad in found.items()})
        return x_grad

    def products(self, whole: str, x: mx.array, y_grads: Sequence[mx.array]) -> mx.array:
        """Through those that `whole` joins, from a cotangent each."""
        parts = self.layer.parts(whole)
        if len(parts) == 1:
            return self.product(whole, x, mx.concatenate(list(y_grads), axis=-1))
        return self.each(parts, x, y_grads)

    def each(self, names: Sequence[str], x: mx.array, y_grads: Sequence[mx.array]) -> mx.array:
        """Through matrices that have the same input."""
        x_grads = [self.product(name, x, grad) for name, grad in zip(names, y_grads, strict=True)]
        return reduce(mx.add, x_grads)

    def turned(self, name: str | None, x: mx.array, rotation: Rotation, y_grad: mx.array) -> mx.array:
        """Through a norm of heads (1, N, heads, d), where there is one, and their turning."""
        scale = None if name is None else self.layer.norm(name)
        tables = rotation.tables(x, scale)
        if tables is None:
            return self.norm(name, x, rotation.gradient(y_grad.swapaxes(1, 2)).swapaxes(1, 2))
        eps = self.layer.config.rms_norm_eps
        x_grad, scale_grad = turned_heads_gradient(x, scale, eps, *tables, y_grad)
        if self.of_base and name is not None and scale_grad is not None:
            self.grads[f"{name}.weight"] = scale_grad.astype(self.layer.norm_dtype(name))
        return x_grad

    def norm(self, name: str | None, x: mx.array | None, y_grad: mx.array) -> mx.array:
        """Through a norm; None: through nothing."""
        if name is None or x is None:
            return y_grad
        arguments = [x, self.layer.norm(name)]
        x_grad, scale_grad = mx.vjp(partial(normalized, self.layer.config), arguments, [y_grad])[1]
        if self.of_base:
            self.grads[f"{name}.weight"] = scale_grad.astype(self.layer.norm_dtype(name))
        return x_grad
