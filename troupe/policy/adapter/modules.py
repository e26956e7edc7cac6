"""Which modules of a network have an adapter, of which rank and scale, and its weights at first."""

import difflib
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Literal, TypeVar

import mlx.core as mx
import msgspec

from troupe.errors import ConfigError
from troupe.policy.adapter.settings import AdapterConfig, end_pattern
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.linear import MAGNITUDE, A, B
from troupe.policy.network.tensors import ROUTER, STACKS, linear_shapes, parameter_count

Kind = Literal["lora", "dora"]
T = TypeVar("T")
_ALL_LINEAR = "all-linear"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
ENDS = ("model.embed_tokens", "lm_head")
"""Matrices that are no layer's."""


class Adapted(msgspec.Struct, frozen=True):
    """The adapter of one module."""

    rank: int
    scale: float
    """What BA is multiplied by: alpha / rank in PEFT, `scale` itself in mlx-lm."""


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """The adapters of a network."""

    kind: Kind
    modules: Mapping[str, Adapted]
    """Name of a module, such as "model.layers.0.self_attn.q_proj" → its adapter, in the network's order."""
    dropout: float = 0.0

    def __hash__(self) -> int:
        return hash((self.kind, self.dropout, *self.modules.items()))


def resolve_adapter(config: AdapterConfig, network: NetworkConfig) -> Adapter:
    """What `config` asks for of this network. ConfigError for modules and layers that it does not have."""
    assert config.kind is not None
    modules = list(linear_shapes(network))
    chosen = _targeted(config.target_modules, modules, network)
    layers = _layers(config.layers, network.num_hidden_layers)
    chosen = [module for module in chosen if layer_of(module) in layers]
    if not chosen:
        raise ConfigError(
            "adapter.layers leaves none of the modules that adapter.target_modules names; change one of them"
        )
    for key, patterns in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        for pattern in patterns:
            if not any(matches(pattern, module) for module in chosen):
                raise ConfigError(
                    f"adapter.{key}: {pattern!r} matches none of the modules with an adapter, such as {chosen[0]}"
                )
    adapted = {}
    for module in chosen:
        rank = by_pattern(config.rank_pattern, module, config.rank)
        alpha = by_pattern(config.alpha_pattern, module, 2.0 * rank if config.alpha is None else config.alpha)
        adapted[module] = Adapted(rank, alpha / (math.sqrt(rank) if config.use_rslora else rank))
    return Adapter(kind=config.kind, modules=adapted, dropout=config.dropout)


def matches(pattern: str, module: str) -> bool:
    """Whether a regular expression matches the end of a module's name behind a dot, as PEFT's patterns do."""
    return re.match(end_pattern(pattern), module) is not None


def is_named(module: str, names: Iterable[str]) -> bool:
    """Whether a module's name equals one of these, or ends with it behind a dot."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def by_pattern(patterns: Mapping[str, T], module: str, otherwise: T) -> T:
    """What the first pattern that matches says."""
    return next((value for pattern, value in patterns.items() if matches(pattern, module)), otherwise)


def layer_of(module: str) -> int:
    """The number of a module's layer."""
    found = _LAYER.match(module)
    assert found is not None
    return int(found[1])


def name_in_layer(module: str) -> str:
    """A module's name without that of its layer, such as "self_attn.q_proj"."""
    return module.split(".", 3)[3]


def _targeted(target: str | Sequence[str], modules: Sequence[str], network: NetworkConfig) -> list[str]:
    if target == _ALL_LINEAR:
        return list(modules)
    for name in [target] if isinstance(target, str) else target:
        if (end := _end_in(name, is_expression=isinstance(target, str))) is not None:
            raise ConfigError(
                f"adapter.target_modules: {name!r} names {end}, which cannot have an adapter here: embedding and head "
                "are computed without one, together with the softmax; leave it out, or name some of "
                f"{', '.join(_leaves(modules))}"
            )
    if isinstance(target, str):
        chosen = [module for module in modules if re.fullmatch(target, module)]
        if not chosen:
            for module in without_adapter(network):
                if re.fullmatch(target, module):
                    _refuse_experts(module, network)
            raise ConfigError(
                f"adapter.target_modules: the expression {target!r} matches the whole name of no module, such as "
                f"{modules[0]}; give a list for names that end so"
            )
        return chosen
    for name in target:
        if not any(is_named(module, [name]) for module in modules):
            _refuse_experts(name, network)
            raise ConfigError(f"adapter.target_modules: no module is called {name!r}; {_nearest(name, modules)}")
    return [module for module in modules if is_named(module, target)]


def without_adapter(network: NetworkConfig) -> list[str]:
    """Routers, and matrices of experts, stacked and one by one, which can have none."""
    modules = []
    for index in network.sparse_layers:
        prefix = f"model.layers.{index}."
        modules += [prefix + ROUTER, *(prefix + stack for stack in STACKS.values())]
        stacks = [stack.rpartition(".")[::2] for stack in STACKS.values()]
        modules += [f"{prefix}{at}.{expert}.{name}" for expert in range(network.num_experts) for at, name in stacks]
    return modules


def _refuse_experts(name: str, network: NetworkConfig) -> None:
    """ConfigError where a name is that of a router or of a matrix of experts."""
    if any(is_named(module, [name]) for module in without_adapter(network)):
        raise ConfigError(
            f"adapter.target_modules: {name!r} names routers or experts, which cannot have an adapter here: name "
            f"some of {', '.join(_leaves(list(linear_shapes(network))))}, or train all weights (adapter.kind left out)"
        )


def _nearest(name: str, modules: Sequence[str]) -> str:
    """What may have been meant."""
    known = _leaves(modules)
    close = difflib.get_close_matches(name.rpartition(".")[2], known, n=2, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"there are {', '.join(known)}"


def _end_in(name: str, *, is_expression: bool) -> str | None:
    """The matrix that is no layer's and that a name or an expression is about; one for every module is not."""
    for whole in ENDS:
        end = whole.rpartition(".")[2]
        if end in name and (re.fullmatch(name, whole) if is_expression else is_named(whole, [name])):
            return end
    return None


def _leaves(modules: Sequence[str]) -> list[str]:
    """What modules are called within their part of a layer, each once."""
    return list(dict.fromkeys(module.rpartition(".")[2] for module in modules))


def _layers(asked: int | Sequence[int] | None, count: int) -> range | Sequence[int]:
    if asked is None:
        return range(count)
    if isinstance(asked, int):
        if asked > count:
            raise ConfigError(f"adapter.layers is {asked}, but the network has {count} layers; give at most {count}")
        return range(count - asked, count)
    if max(asked) >= count:
        raise ConfigError(f"adapter.layers names layer {max(asked)}, but the last of the network is {count - 1}")
    return asked


def adapter_shapes(network: NetworkConfig, adapter: Adapter) -> dict[str, tuple[int, ...]]:
    """Name → shape of every trained tensor: A (r, in) and B (out, r) of each module, and DoRA's magnitude (out,)."""
    shapes: dict[str, tuple[int, ...]] = {}
    matrices = linear_shapes(network)
    for module, adapted in adapter.modules.items():
        rows, columns = matrices[module]
        shapes[f"{module}{A}.weight"] = (adapted.rank, columns)
        shapes[f"{module}{B}.weight"] = (rows, adapted.rank)
        if adapter.kind == "dora":
            shapes[f"{module}{MAGNITUDE}.weight"] = (rows,)
    return shapes


@lru_cache
def adapter_parameter_count(network: NetworkConfig, adapter: Adapter) -> int:
    """Numbers that are trained."""
    return sum(math.prod(shape) for shape in adapter_shapes(network, adapter).values())


def init_adapter(
    network: NetworkConfig,
    adapter: Adapter,
    init: Literal["default", "gaussian"],
    seed: int,
    norms: Mapping[str, mx.array] | None = None,
) -> dict[str, mx.array]:
    """The weights before the first update, float32: A random by seed and module, B 0, DoRA's magnitudes from `norms`,
    ‖W‖₂ of the rows (out,) of each module; the policy is the base."""
    weights = {}
    for name, shape in adapter_shapes(network, adapter).items():
        module, _, kind = name.removesuffix(".weight").rpartition(".")
        if f".{kind}" == MAGNITUDE:
            assert norms is not None
            weights[name] = norms[module]
        elif f".{kind}" == B:
            weights[name] = mx.zeros(shape)
        else:
            key = mx.random.key(int.from_bytes(hashlib.sha256(f"{seed}:{module}".encode()).digest()[:8], "little"))
            bound = 1.0 / math.sqrt(shape[1])
            weights[name] = (
                mx.random.uniform(-bound, bound, shape, key=key)
                if init == "default"
                else mx.random.normal(shape, scale=1.0 / shape[0], key=key)
            )
    mx.eval(weights)
    return weights


def describe_adapter(network: NetworkConfig, adapter: Adapter) -> str:
    """In one line, the scale as a number: PEFT's alpha / rank and mlx-lm's `scale` differ many times over."""
    ranks = sorted({adapted.rank for adapted in adapter.modules.values()})
    scales = sorted({adapted.scale for adapted in adapter.modules.values()})
    trained, whole = adapter_parameter_count(network, adapter), parameter_count(network)
    name = {"lora": "LoRA", "dora": "DoRA"}[adapter.kind]
    return (
        f"{name} of rank {_span(ranks)}, scale {_span(scales)}, on {len(adapter.modules)} of "
        f"{len(linear_shapes(network))} matrices: {trained:,} trained numbers, {trained / whole:.2%} of the network's"
        + (f", dropout {adapter.dropout:g}" if adapter.dropout else "")
    )


def _span(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
