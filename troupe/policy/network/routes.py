"""Which experts the tokens of one pass through a network go to: the router's, or those that were chosen before; and
what is to be known of it afterwards.

Experts chosen before are those that a sampler recorded: a learner that computes in another way finds others for tokens
between two experts, whose log-probabilities then jump ("Rollout Routing Replay", Ma et al. 2025, arXiv:2510.11370). The
shares are always the router's own, over the experts that are taken.

Load balancing (Fedus et al. 2021, arXiv:2101.03961; over all layers together, as transformers has it):
    loss = E · Σ_e f_e · P_e,  f_e how many of a token's k experts are e and P_e its probability, means over tokens and
    layers; f counts as constant.

Shapes: N tokens, L layers that are mixtures of experts, E experts, k a token.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any, NamedTuple, cast

import mlx.core as mx

from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.experts import Routed, likeliest, probabilities
from troupe.policy.network.packing import distinct_prompts

Recorded = tuple[bytes, bytes]
"""The experts of a prompt's tokens, and of its completion's without the last: (tokens, L, k), ascending ids in one byte
each, or two where there are more than 256. Empty: not known."""


class Given(NamedTuple):
    """Experts that were chosen before."""

    experts: mx.array
    """(N, L, k) ids."""
    known: mx.array
    """(N,) of which tokens they are known."""

    @classmethod
    def of(
        cls,
        config: NetworkConfig,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        recorded: Sequence[Recorded],
    ) -> "Given":
        """Those of R rows, as `Packing` lays their tokens out."""
        each = len(config.sparse_layers) * config.num_experts_per_tok * id_type(config).size
        _, sizes = distinct_prompts(prompts)
        firsts = [sum(sizes[:index]) for index in range(len(sizes))]
        parts = [(len(prompts[row]), recorded[row][0]) for row in firsts]
        parts += [
            (max(0, len(completion) - 1), of_row[1]) for completion, of_row in zip(completions, recorded, strict=True)
        ]
        is_known = [len(data) == tokens * each for tokens, data in parts]
        data = b"".join(
            data if known else bytes(tokens * each) for known, (tokens, data) in zip(is_known, parts, strict=True)
        )
        ids = memoryview(data).cast("B" if id_type(config) == mx.uint8 else "H")
        flat = mx.array(cast(Any, ids))
        known = list(chain.from_iterable([known] * tokens for known, (tokens, _) in zip(is_known, parts, strict=True)))
        experts = flat.reshape(len(known), len(config.sparse_layers), config.num_experts_per_tok)
        return cls(experts.astype(mx.int32), mx.array(known))


def id_type(config: NetworkConfig) -> mx.Dtype:
    """The smallest in which the ids of experts are recorded."""
    return mx.uint8 if config.num_experts <= 256 else mx.uint16


class Routes:
    """The routes of one pass. Without anything given each token goes where the router of the layer finds it best."""

    def __init__(
        self,
        config: NetworkConfig,
        given: Given | None = None,
        *,
        follows: bool = False,
        balance: float = 0.0,
        rows_of_token: mx.array | None = None,
    ) -> None:
        """`follows`: tokens go to the experts that are given; else they are only compared. `balance`: the weight of the
        loss of load balancing, of whose tokens (N,) `rows_of_token` says in how many rows each stands; 0 counts
        nothing."""
        self.balance = balance
        self._config = config
        self._given, self._follows = given, follows
        self._place = {layer: place for place, layer in enumerate(config.sparse_layers)}
        self._rows_of_token = rows_of_token
        self._chosen: dict[int, mx.array] = {}
        self._flips: dict[int, mx.array] = {}
        self._sums: dict[int, tuple[mx.array, mx.array]] = {}

    def route(self, layer: int, logits: mx.array) -> Routed:
        """Where the tokens (N, E) of a layer go. What is computed again is not noted again."""
        spec = self._config.layer(layer).experts
        assert spec is not None
        logits_alone = mx.stop_gradient(logits)
        own = chosen = likeliest(spec, logits_alone)
        if self._given is not None:
            told = mx.where(self._given.known[:, None], self._given.experts[:, self._place[layer]], own)
            chosen = told if self._follows else own
            self._flips.setdefault(layer, mx.sum(mx.any(told != own, axis=-1)))
        self._chosen.setdefault(layer, chosen)
        if self._rows_of_token is not None and layer not in self._sums:
            is_taken = mx.any(own[..., None] == mx.arange(spec.number), axis=1)
            self._sums[layer] = (
                mx.sum(is_taken * self._rows_of_token[:, None], axis=0),
                mx.sum(probabilities(logits_alone) * self._rows_of_token[:, None], axis=0),
            )
        return Routed(logits, chosen)

    def noted_of(self, layer: int) -> list[mx.array]:
        """What is to be evaluated with a layer, so that nothing of its inside is held."""
        sums = self._sums.get(layer, ())
        return [*sums, *(noted[layer] for noted in (self._flips, self._chosen) if layer in noted)]

    @property
    def chosen(self) -> mx.array:
        """(N, L, k) where all tokens went, in the type of `id_type`."""
        return mx.stack([self._chosen[layer] for layer in self._place], axis=1).astype(id_type(self._config))

    @property
    def flips(self) -> mx.array | None:
        """Of the tokens in layers of which the experts are given: in how many the router finds others, and how many
        there are, (2,); None where nothing is given."""
        if self._given is None:
            return None
        count = mx.sum(self._given.known) * len(self._place)
        return mx.stack([mx.sum(mx.stack(list(self._flips.values()))), count]).astype(mx.float32)

    @property
    def balance_loss(self) -> mx.array:
        """The loss of load balancing, without its weight; when all layers have been gone through."""
        frequencies, means = self._means()
        return self._config.num_experts * mx.sum(frequencies * means)

    def probabilities_grad(self) -> mx.array | None:
        """The cotangent of the router's probabilities (N, E) in each layer, from that loss with its weight; None where
        there is no such loss."""
        if self.balance == 0.0 or self._rows_of_token is None:
            return None
        frequencies, _ = self._means()
        return (self.balance * self._config.num_experts / self._total) * self._rows_of_token[:, None] * frequencies

    @property
    def _total(self) -> mx.array:
        assert self._rows_of_token is not None
        return mx.sum(self._rows_of_token) * len(self._place)

    def _means(self) -> tuple[mx.array, mx.array]:
        """f and P, (E,) each."""
        counts, sums = (sum(parts[1:], parts[0]) for parts in zip(*self._sums.values(), strict=True))
        return counts / self._total, sums / self._total


def rows_of_tokens(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> mx.array:
    """In how many of R rows each packed token (N,) stands: a prompt's in those of all its completions; float32."""
    _, sizes = distinct_prompts(prompts)
    firsts = [sum(sizes[:index]) for index in range(len(sizes))]
    lengths = [len(prompts[row]) for row in firsts] + [max(0, len(completion) - 1) for completion in completions]
    each = [*map(float, sizes), *[1.0] * len(completions)]
    return mx.array(list(chain.from_iterable([rows] * n for rows, n in zip(each, lengths, strict=True))))


def rows_as_bytes(experts: mx.array) -> list[bytes]:
    """Recorded experts (N, L, k), evaluated, of one token each."""
    data, each = as_bytes(experts), experts.nbytes // len(experts)
    return [data[start : start + each] for start in range(0, len(data), each)]


def as_bytes(experts: mx.array) -> bytes:
    """Recorded experts, evaluated, row by row."""
    buffer: Any = experts
    return bytes(memoryview(buffer).cast("B")) if experts.size else b""
