"""Ways to a `Policy`: a model folder, an adapter folder beside or instead of it, a base with a new adapter."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import mlx.core as mx
import msgspec

from troupe.errors import ModelError
from troupe.policy.adapter.base import Base
from troupe.policy.adapter.files import StoredAdapter, base_named_in, is_adapter_folder, read_adapter
from troupe.policy.adapter.modules import Adapter, init_adapter, resolve_adapter
from troupe.policy.adapter.settings import AdapterConfig
from troupe.policy.folders import read_model_folder
from troupe.policy.hub import is_hub_id, resolve_model
from troupe.policy.model import Policy
from troupe.policy.model_files import Companions, check_folder, model_fingerprint, network_fingerprint, some
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.tensors import Weights

_REMEDY = "give its base, with the adapter beside it (-m BASE --adapter DIR), or fuse or merge first"


class Located(NamedTuple):
    """Where a policy lies."""

    folder: Path
    """Of the model, or of the base."""
    adapter: Path | None
    """Beside it, if any."""
    name: str
    """Of the model, for who looks for it later: the hub id that it was named by, which other machines know, or the
    absolute path of its folder."""


def load_policy(path: str | Path, dtype: str | None = None, *, adapter: str | Path | None = None) -> Policy:
    """Read a model folder, or the one that a hub id such as "Qwen/Qwen3-0.6B" stands for → `Policy`.

    `adapter`: an adapter folder of PEFT, mlx-lm or a run, to be beside it. Where `path` itself is one, the base is the
    one that it names. `dtype` and errors are those of `read_model_folder`, `resolve_model` and `read_adapter`.
    """
    located = resolve_base(path, None if adapter is None else Path(adapter))
    policy = _whole(located.folder, dtype)
    return policy if located.adapter is None else _beside(policy, located, network_fingerprint(located.folder))[0]


def load_teacher(
    path: str | Path, dtype: str | None, student: Policy, others: Sequence[Policy] = ()
) -> tuple[Policy, str]:
    """Read who teaches a policy → `Policy`, and its fingerprint. The base of the student's adapter, or of those of
    `others`, who teach it too, is not read again where the teacher is that network, or an adapter beside it. Raises
    what `load_policy` raises."""
    located = resolve_base(path)
    folder, fingerprint = located.folder, model_fingerprint(located.folder)
    of_base = network_fingerprint(folder)
    there = [
        known
        for known in (student, *others)
        if known.base.is_whole and known.base.fingerprint == of_base and dtype in (None, known.dtype)
    ]
    if not there:
        policy = _whole(folder, dtype)
        if located.adapter is None:
            return policy, fingerprint
        policy, of_adapter = _beside(policy, located, of_base)
        return policy, _joined(fingerprint, of_adapter)
    known = there[0]
    if located.adapter is None:
        return known.having({}), fingerprint
    stored = read_adapter(located.adapter, known.config, folder, of_base)
    policy = known.having(stored.weights, base=known.base.beside(known.config, stored.adapter))
    return policy, _joined(fingerprint, digest_of(stored.adapter, stored.weights))


def _joined(of_model: str, of_adapter: str) -> str:
    return hashlib.sha256(f"{of_model} {of_adapter}".encode()).hexdigest()


def begin_policy(path: str | Path, dtype: str | None, settings: AdapterConfig, seed: int) -> tuple[Policy, str]:
    """What a run begins with, and its fingerprint: the whole network of a folder, or an adapter beside it, new or read,
    as `settings` say. Raises what `load_policy` raises, ConfigError as `resolve_adapter`, and ModelError for a packed
    network that would be trained whole."""
    given = None if settings.resume_from is None else Path(settings.resume_from)
    located = resolve_base(path, given)
    folder = located.folder
    if located.adapter is not None and settings.kind is not None and given is None:
        raise ModelError(
            f"{located.adapter}: is an adapter itself, so that no new one can begin beside it; leave adapter.kind out "
            "to go on with it, or fuse it first (troupe fuse)"
        )
    policy, fingerprint, of_base = _whole(folder, dtype), model_fingerprint(folder), network_fingerprint(folder)
    if located.adapter is not None:
        policy, of_adapter = _beside(policy, located, of_base, settings)
        return policy, _joined(fingerprint, of_adapter)
    if settings.kind is not None:
        return _with_new(policy, settings, seed, located.name, of_base), fingerprint
    if policy.is_packed:
        raise ModelError(
            f"{folder}: its weights are quantized, and such a network cannot be trained whole; train an adapter beside "
            "it (--lora 16), or write it out in float numbers first (mlx_lm.convert -d) or take the unquantized model"
        )
    return policy, fingerprint


def resolve_base(path: str | Path, adapter: Path | None = None) -> Located:
    """The model folder that a path or hub id means, and the adapter folder beside it, if any: `adapter`, or `path`
    itself, whose base is then the one that it names."""
    folder = resolve_model(path)
    if not is_adapter_folder(folder):
        return Located(folder, adapter, _name_of(path, folder))
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
    return Located(found, folder, _name_of(base, found))


def _name_of(named: str | Path, folder: Path) -> str:
    return str(named) if is_hub_id(named) else str(folder.absolute())


def adapter_beside(folder: Path, config: NetworkConfig, base: Path) -> StoredAdapter:
    """The adapter of a folder, which must be one of this base. ModelError where it is not."""
    return read_adapter(folder, config, base, network_fingerprint(base))


def _whole(folder: Path, dtype: str | None) -> Policy:
    config, weights = read_model_folder(folder, dtype)
    return Policy(config, weights, folder, Companions.of(folder))


def _beside(
    policy: Policy, located: Located, fingerprint: str, settings: AdapterConfig | None = None
) -> tuple[Policy, str]:
    """A whole network with the adapter of a folder beside it, and what tells this adapter from others."""
    folder = located.adapter
    assert folder is not None
    stored = read_adapter(folder, policy.config, located.folder, fingerprint)
    adapter = stored.adapter
    if settings is not None:
        if settings.kind not in (None, adapter.kind):
            raise ModelError(
                f"{folder}: is a {adapter.kind} adapter, and adapter.kind is {settings.kind}; leave it out"
            )
        adapter = msgspec.structs.replace(adapter, dropout=settings.dropout)
    return _adapted(policy, adapter, stored.weights, located.name, fingerprint), digest_of(adapter, stored.weights)


def _with_new(policy: Policy, settings: AdapterConfig, seed: int, name: str, fingerprint: str) -> Policy:
    """A whole network as the base of an adapter that begins as `settings` say."""
    adapter = resolve_adapter(settings, policy.config)
    adapted = _adapted(policy, adapter, {}, name, fingerprint)
    norms = adapted.base.row_norms(policy.config, adapter) if adapter.kind == "dora" else None
    if empty := [module for module, lengths in (norms or {}).items() if not mx.all(lengths > 0.0).item()]:
        raise ModelError(
            f"{name}: rows of {some(empty)} hold nothing but 0, and DoRA divides by their length; take "
            "adapter.kind = 'lora', or leave these matrices out of adapter.target_modules"
        )
    return adapted.having(init_adapter(policy.config, adapter, settings.init, seed, norms))


def _adapted(policy: Policy, adapter: Adapter, weights: Weights, name: str, fingerprint: str) -> Policy:
    """A whole network as the base of an adapter, whose weights are what is trained; uses up those of `policy`."""
    network, policy.weights = dict(policy.weights), {}
    return policy.having(weights, base=Base.of(policy.config, network, adapter, name=name, fingerprint=fingerprint))


def digest_of(adapter: Adapter, weights: Weights) -> str:
    """64 hexadecimal digits that are the same for the same policy over a base: kind, scales and numbers."""
    total = hashlib.sha256(msgspec.json.encode(msgspec.structs.replace(adapter, dropout=0.0)))
    for name, array in weights.items():
        total.update(name.encode())
        total.update(memoryview(cast(Any, array)))
    return total.hexdigest()
