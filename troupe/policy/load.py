"""Ways to a `Policy`: a model folder, an adapter folder beside or instead of it, a base with a new adapter."""

import hashlib
from pathlib import Path
from typing import Any, cast

import msgspec

from troupe.errors import ModelError
from troupe.policy.adapter.base import Base
from troupe.policy.adapter.files import StoredAdapter, base_named_in, check_base, is_adapter_folder, read_adapter
from troupe.policy.adapter.modules import Adapter, init_adapter, resolve_adapter
from troupe.policy.adapter.settings import AdapterConfig
from troupe.policy.folders import read_model_folder
from troupe.policy.hub import resolve_model
from troupe.policy.model import Policy
from troupe.policy.model_files import Companions, check_folder, model_fingerprint
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.tensors import Weights

_REMEDY = "give its base, with the adapter beside it (-m BASE --adapter DIR), or fuse or merge first"


def load_policy(path: str | Path, dtype: str | None = None, *, adapter: str | Path | None = None) -> Policy:
    """Read a model folder, or the one that a hub id such as "Qwen/Qwen3-0.6B" stands for → `Policy`.

    `adapter`: an adapter folder of PEFT, mlx-lm or a run, to be beside it. Where `path` itself is one, the base is the
    one that it names. `dtype` and errors are those of `read_model_folder`, `resolve_model` and `read_adapter`.
    """
    folder, adapter_folder = resolve_base(path, None if adapter is None else Path(adapter))
    policy = _whole(folder, dtype)
    return policy if adapter_folder is None else _beside(policy, adapter_folder, model_fingerprint(folder))[0]


def begin_policy(path: str | Path, dtype: str | None, settings: AdapterConfig, seed: int) -> tuple[Policy, str]:
    """What a run begins with, and its fingerprint: the whole network of a folder, or an adapter beside it, new or read,
    as `settings` say. Raises what `load_policy` raises, ConfigError as `resolve_adapter`, and ModelError for a packed
    network that would be trained whole."""
    given = None if settings.resume_from is None else Path(settings.resume_from)
    folder, adapter_folder = resolve_base(path, given)
    if adapter_folder is not None and settings.kind is not None and given is None:
        raise ModelError(
            f"{adapter_folder}: is an adapter itself, so that no new one can begin beside it; leave adapter.kind out "
            "to go on with it, or fuse it first (troupe fuse)"
        )
    policy, fingerprint = _whole(folder, dtype), model_fingerprint(folder)
    if adapter_folder is not None:
        policy, of_adapter = _beside(policy, adapter_folder, fingerprint, settings)
        return policy, hashlib.sha256(f"{fingerprint} {of_adapter}".encode()).hexdigest()
    if settings.kind is not None:
        return _with_new(policy, settings, seed, fingerprint), fingerprint
    if policy.is_packed:
        raise ModelError(
            f"{folder}: its weights are quantized, and such a network cannot be trained whole; train an adapter beside "
            "it (--lora 16), or write it out in float numbers first (mlx_lm.convert -d) or take the unquantized model"
        )
    return policy, fingerprint


def resolve_base(path: str | Path, adapter: Path | None = None) -> tuple[Path, Path | None]:
    """The model folder that a path or hub id means, and the adapter folder beside it, if any: `adapter`, or `path`
    itself, whose base is then the one that it names."""
    folder = resolve_model(path)
    if not is_adapter_folder(folder):
        return folder, adapter
    if adapter is not None:
        raise ModelError(f"{folder}: is an adapter itself, and {adapter} is given beside it; name one of them")
    if (base := base_named_in(folder)) is None:
        raise ModelError(f"{folder}: holds an adapter and names no base; {_REMEDY}")
    try:
        found = resolve_model(base)
        check_folder(found)
    except (ModelError, OSError) as error:
        raise ModelError(
            f"{folder}: holds an adapter of the base {base}, which cannot be used: {error}; {_REMEDY}"
        ) from None
    return found, folder


def adapter_beside(folder: Path, config: NetworkConfig, base: Path) -> StoredAdapter:
    """The adapter of a folder, which must be one of this base. ModelError where it is not."""
    stored = read_adapter(folder, config)
    check_base(stored, folder, model_fingerprint(base), base)
    return stored


def _whole(folder: Path, dtype: str | None) -> Policy:
    config, weights = read_model_folder(folder, dtype)
    return Policy(config, weights, folder, Companions.of(folder))


def _beside(
    policy: Policy, folder: Path, fingerprint: str, settings: AdapterConfig | None = None
) -> tuple[Policy, str]:
    """A whole network with the adapter of a folder beside it, and what tells this adapter from others."""
    stored = read_adapter(folder, policy.config)
    check_base(stored, folder, fingerprint, policy.path or folder)
    adapter = stored.adapter
    if settings is not None:
        if settings.kind not in (None, adapter.kind):
            raise ModelError(
                f"{folder}: is a {adapter.kind} adapter, and adapter.kind is {settings.kind}; leave it out"
            )
        adapter = msgspec.structs.replace(adapter, dropout=settings.dropout)
    return _adapted(policy, adapter, stored.weights, fingerprint), digest_of(stored.weights)


def _with_new(policy: Policy, settings: AdapterConfig, seed: int, fingerprint: str) -> Policy:
    """A whole network as the base of an adapter that begins as `settings` say."""
    adapter = resolve_adapter(settings, policy.config)
    adapted = _adapted(policy, adapter, {}, fingerprint)
    norms = adapted.base.row_norms(policy.config, adapter) if adapter.kind == "dora" else None
    return adapted.having(init_adapter(policy.config, adapter, settings.init, seed, norms))


def _adapted(policy: Policy, adapter: Adapter, weights: Weights, fingerprint: str) -> Policy:
    """A whole network as the base of an adapter, whose weights are what is trained; uses up those of `policy`."""
    network, policy.weights = dict(policy.weights), {}
    name = "" if policy.path is None else str(policy.path.absolute())
    return policy.having(weights, base=Base.of(policy.config, network, adapter, name=name, fingerprint=fingerprint))


def digest_of(weights: Weights) -> str:
    """64 hexadecimal digits that are the same for the same numbers."""
    total = hashlib.sha256()
    for name, array in weights.items():
        total.update(name.encode())
        total.update(memoryview(cast(Any, array)))
    return total.hexdigest()
