"""What of a policy is not trained, and how it is completed by what is.

A policy is a frozen base and what is trained. Where the whole network is trained the base is empty; beside an adapter
it is the network, and only the adapter's few numbers go to the optimizer, the policy board, files and checkpoints.

The network knows an adapter as two small matrices beside a large one (`network/linear.py`), in the type that it
computes in; what is trained are PEFT's tensors, one pair a module, in float32. Here is the way from these to those, and
for gradients back: scales are multiplied into B, and where several modules are joined into one matrix their A lie below
each other and their B in blocks.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import mlx.core as mx

from troupe.policy.adapter.files import AdapterFiles, adapter_files
from troupe.policy.adapter.modules import Adapter, name_in_layer
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.elementwise import is_on_cpu
from troupe.policy.network.fusing import fuse_projections
from troupe.policy.network.linear import MAGNITUDE, A, B, Linear, by_columns, groups
from troupe.policy.network.tensors import Weights, linear_shapes, weights_dtype

_NORM = ".lora_norm"
"""‖W + s·BA‖ of each row, beside what DoRA made of it: for the way back."""


class _Part(NamedTuple):
    """A module with an adapter within a matrix of the base."""

    module: str
    rows: slice
    """Of the matrix."""
    ranks: slice
    """Of the rows of A there, and columns of B."""
    scale: float


class Base:
    """The part of a policy that is not trained: nothing (`Base()`), or a network beside which an adapter is."""

    def __init__(self) -> None:
        self.weights: Weights = {}
        """Laid out as for decoding (`fuse_projections`), which is how they are held once."""
        self.adapter: Adapter | None = None
        self.name, self.fingerprint = "", ""
        """The folder or hub id of the network, and what tells it from others."""
        self._parts: dict[str, list[_Part]] = {}
        self._norms: dict[str, mx.array] = {}

    @classmethod
    def of(
        cls,
        config: NetworkConfig,
        weights: dict[str, mx.array],
        adapter: Adapter | None,
        *,
        name: str = "",
        fingerprint: str = "",
    ) -> "Base":
        """A network for good; `weights` is used up. None: no adapter is beside it."""
        base = cls()
        base.adapter, base.name, base.fingerprint = adapter, name, fingerprint
        base.weights = _laid_out(config, weights)
        if adapter is not None:
            base._parts = _parts(config, base.weights, adapter)
        return base

    def beside(self, config: NetworkConfig, adapter: Adapter) -> "Base":
        """The same network, shared, with another adapter beside it."""
        other = Base()
        other.weights, other.name, other.fingerprint = self.weights, self.name, self.fingerprint
        other.adapter, other._parts = adapter, _parts(config, self.weights, adapter)
        return other

    @property
    def is_whole(self) -> bool:
        """Whether the network is all here, and what is trained, if anything, lies beside it."""
        return bool(self.weights)

    def completed(self, config: NetworkConfig, trained: Weights) -> Weights:
        """The network that what is trained makes of the base; lazily. Without anything trained, the base alone."""
        if not self.is_whole:
            return trained
        network = dict(self.weights)
        dtype = weights_dtype(network)
        for module, parts in self._parts.items():
            if f"{parts[0].module}{A}.weight" in trained:
                network |= self._beside(config, module, parts, trained, dtype)
        return network

    def for_decoding(self, config: NetworkConfig, trained: Weights) -> Weights:
        """The same network laid out for decoding, evaluated: where it computes in float32, with the adapter in it."""
        if not self.is_whole:
            return fuse_projections(config, trained)
        network = dict(self.completed(config, trained))
        for module in self._parts:
            linear = Linear.of(config, network, module)
            if linear.is_merged:
                for kind in (A, B, MAGNITUDE):
                    network.pop(f"{module}{kind}.weight", None)
                network[f"{module}.weight"] = linear.merged().weight
                if linear.factor is not None:
                    directed = network[f"{module}.weight"] * linear.factor[:, None]
                    network[f"{module}.weight"] = by_columns(directed) if is_on_cpu() else directed
                mx.eval(network[f"{module}.weight"])  # one by one: what it is made from is held meanwhile
            network.pop(module + _NORM, None)
        mx.eval(network)
        return network

    def for_mixed_decoding(self, config: NetworkConfig, policies: Sequence[Weights], slots: Sequence[int]) -> Weights:
        """The base with adapters of several policies: the one of `slots[i]` for the i-th of len(slots) equal parts of
        the rows. Evaluated; nothing is added to the base's matrices."""
        network, index = dict(self.weights), mx.array(list(slots))
        dtype = weights_dtype(network)
        completed = [self.completed(config, trained) for trained in policies]
        for module, parts in self._parts.items():
            out, columns = Linear.of(config, network, module).size, linear_shapes(config)[parts[0].module][1]
            empty = {
                A: mx.zeros((parts[-1].ranks.stop, columns), dtype),
                B: mx.zeros((out, parts[-1].ranks.stop), dtype),
                MAGNITUDE: mx.ones(out, dtype),
            }
            for kind, nothing in empty.items():
                name = f"{module}{kind}.weight"
                if any(name in one for one in completed):
                    network[name] = mx.stack([one.get(name, nothing) for one in completed])[index]
            mx.eval(network)
        return network

    def gradients(self, network: Weights, gradients: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Gradients by a completed network's weights → by what is trained, in float32."""
        if not self.is_whole:
            return dict(gradients)
        found: dict[str, mx.array] = {}
        for name, gradient in gradients.items():
            module, _, kind = name.removesuffix(".weight").rpartition(".")
            for part in self._parts[module]:
                if kind == A[1:]:
                    own = gradient[part.ranks]
                elif kind == B[1:]:
                    own = gradient[part.rows, part.ranks].astype(mx.float32) * part.scale
                else:
                    own = gradient[part.rows].astype(mx.float32) / network[module + _NORM][part.rows]
                found[f"{part.module}.{kind}.weight"] = own.astype(mx.float32)
        return found

    def files_of(self, config: NetworkConfig, trained: Weights) -> AdapterFiles | None:
        """What to write of what is trained where it is an adapter's; None where it is the whole network."""
        if self.adapter is None:
            return None
        return adapter_files(config, self.adapter, trained, base_name=self.name, base_fingerprint=self.fingerprint)

    def row_norms(self, config: NetworkConfig, adapter: Adapter) -> dict[str, mx.array]:
        """‖W‖₂ of the rows of every module that is to have an adapter, float32 (out,): DoRA's magnitudes at first."""
        norms: dict[str, mx.array] = {}
        for matrix, parts in _parts(config, self.weights, adapter).items():
            whole = mx.sqrt(self._squares(config, matrix))
            norms |= {part.module: whole[part.rows] for part in parts}
            mx.eval(whole)
        return norms

    def _beside(
        self, config: NetworkConfig, module: str, parts: Sequence[_Part], trained: Weights, dtype: mx.Dtype
    ) -> dict[str, mx.array]:
        """What lies beside one matrix of the base."""
        out = Linear.of(config, self.weights, module).size
        a = mx.concatenate([trained[f"{part.module}{A}.weight"] for part in parts])
        blocks, at = [], 0
        for part in parts:
            block = trained[f"{part.module}{B}.weight"] * part.scale
            before, after = part.ranks.start, a.shape[0] - part.ranks.stop
            blocks += [mx.zeros((part.rows.start - at, a.shape[0]))] if part.rows.start > at else []
            blocks.append(mx.pad(block, [(0, 0), (before, after)]) if before or after else block)
            at = part.rows.stop
        blocks += [mx.zeros((out - at, a.shape[0]))] if at < out else []
        b = mx.concatenate(blocks) if len(blocks) > 1 else blocks[0]
        beside = {f"{module}{A}.weight": a.astype(dtype), f"{module}{B}.weight": b.astype(dtype)}
        if f"{parts[0].module}{MAGNITUDE}.weight" in trained:
            norm = mx.sqrt(self._adapted_squares(config, module, a, b))
            beside[module + _NORM] = norm
            factor = mx.ones(out)
            for part in parts:
                factor[part.rows] = trained[f"{part.module}{MAGNITUDE}.weight"] / norm[part.rows]
            beside[f"{module}{MAGNITUDE}.weight"] = factor.astype(dtype)
        return beside

    def _squares(self, config: NetworkConfig, module: str) -> mx.array:
        """‖w‖² of the rows of a matrix of the base, float32 (out,); kept once it is known."""
        if module not in self._norms:
            linear = Linear.of(config, self.weights, module)
            squares = mx.sum(mx.square(linear.expanded(mx.float32)), axis=1)
            mx.eval(squares)  # before another thread may see it
            self._norms[module] = squares
        return self._norms[module]

    def _adapted_squares(self, config: NetworkConfig, module: str, a: mx.array, b: mx.array) -> mx.array:
        """‖w + (BA)‖² of the rows: ‖w‖² + 2·w·(BA) + ‖(BA)‖², for which nothing of the matrix's size is made."""
        linear = Linear.of(config, self.weights, module)._replace(bias=None)
        along = linear(a.astype(weights_dtype(self.weights))).astype(mx.float32).T  # W Aᵀ, (out, r)
        return self._squares(config, module) + mx.sum(b * (2.0 * along + b @ (a @ a.T)), axis=1)


def _laid_out(config: NetworkConfig, weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """For good: matrices are given up as others are made of them."""
    held = fuse_projections(config, weights, uses_up=True)
    if is_on_cpu():
        for module in linear_shapes(config):
            if f"{module}.weight" in held and module.endswith(("o_proj", "down_proj", "out_proj")):
                held[f"{module}.weight"] = by_columns(held[f"{module}.weight"])
                mx.eval(held[f"{module}.weight"])
    return held


def _parts(config: NetworkConfig, weights: Weights, adapter: Adapter) -> dict[str, list[_Part]]:
    """Matrix of the base → the modules with an adapter that it holds, in order."""
    found: dict[str, list[_Part]] = {}
    shapes = linear_shapes(config)
    names: dict[str, list[str]] = {f"model.layers.{index}.": [] for index in range(config.num_hidden_layers)}
    for module in shapes:
        names[module.removesuffix(name := name_in_layer(module))].append(name)
    for prefix, inside in names.items():
        for name, parts in groups(inside).items():
            modules = [prefix + part for part in parts]
            if f"{prefix}{name}.weight" in weights:
                found |= _parts_of(prefix + name, modules, shapes, adapter)
            else:
                for module in modules:
                    found |= _parts_of(module, [module], shapes, adapter)
    return found


def _parts_of(
    matrix: str, modules: Sequence[str], shapes: Mapping[str, tuple[int, int]], adapter: Adapter
) -> dict[str, list[_Part]]:
    parts, row, rank = [], 0, 0
    for module in modules:
        out, adapted = shapes[module][0], adapter.modules.get(module)
        if adapted is not None:
            rows, ranks = slice(row, row + out), slice(rank, rank + adapted.rank)
            parts.append(_Part(module, rows, ranks, adapted.scale))
            rank += adapted.rank
        row += out
    return {matrix: parts} if parts else {}
