"""The weights that a decode goes by: of one policy, or of several over one base, laid out when they are first used."""

from collections.abc import Mapping, Sequence, Set
from typing import NamedTuple

import mlx.core as mx

from troupe.policy.adapter.base import Base
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.tensors import Weights, weights_dtype


class _Mixed(NamedTuple):
    """Policies over one base, laid out for rows of several."""

    policies: Sequence[Weights]
    places: Sequence[int]
    """Of the rows' equal parts, among `policies`."""
    network: Weights


class LoadedWeights:
    """Weights that may be exchanged between two tokens. `load` may be called from any thread, all else from the one
    that decodes."""

    def __init__(self, config: NetworkConfig, base: Base) -> None:
        """`base`: what the weights that are loaded complete."""
        self._config, self.base = config, base
        self._loaded: dict[int, tuple[Weights, int]] = {}
        self._prepared: dict[int, tuple[Weights, Weights, int]] = {}
        self._mixed: _Mixed | None = None

    @property
    def policies(self) -> Set[int]:
        """Those that are loaded."""
        return self._loaded.keys()

    @property
    def dtype(self) -> mx.Dtype:
        """Of the network."""
        return weights_dtype(self.base.weights or next(iter(self._loaded.values()))[0])

    def load(self, weights: Weights, version: int, policy: int = 0) -> None:
        """Use these from now on."""
        if policy and not self.base.is_whole:
            raise ValueError("several policies can be decoded together only over one base")
        self._loaded = {**self._loaded, policy: (weights, version)}

    def release(self) -> None:
        """Let go of all, and of what was made of them."""
        self._loaded, self._prepared, self._mixed = {}, {}, None

    def current(self, slots: Sequence[int] = (0,)) -> tuple[Weights, Mapping[int, int]]:
        """The newest weights, laid out for decoding rows in equal parts of these policies, and the versions of all."""
        loaded = self._loaded
        versions = {policy: version for policy, (_, version) in loaded.items()}
        if len(set(slots)) == 1:
            weights, version = loaded[policy := slots[0]]
            prepared = self._prepared.get(policy)
            if prepared is None or prepared[0] is not weights:
                self._prepared.pop(policy, None)
                prepared = (weights, self.base.for_decoding(self._config, weights), version)
                self._prepared[policy] = prepared
            return prepared[1], versions
        order = sorted(set(slots))
        policies, places = [loaded[policy][0] for policy in order], [order.index(policy) for policy in slots]
        mixed = self._mixed
        if (
            mixed is None
            or mixed.places != places
            or any(a is not b for a, b in zip(mixed.policies, policies, strict=False))
        ):
            network = self.base.for_mixed_decoding(self._config, policies, places)
            mixed = self._mixed = _Mixed(policies, places, network)
        return mixed.network, versions
