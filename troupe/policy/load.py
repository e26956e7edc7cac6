"""Ways to a `Policy`: a model folder, an adapter folder beside or instead of it, a base with a new adapter."""

from pathlib import Path

from troupe.errors import ModelError
from troupe.policy.adapter.base import Base
from troupe.policy.adapter.files import base_named_in, check_base, is_adapter_folder, read_adapter
from troupe.policy.adapter.modules import Adapter, init_adapter, resolve_adapter
from troupe.policy.adapter.settings import AdapterConfig
from troupe.policy.folders import read_model_folder
from troupe.policy.hub import resolve_model
from troupe.policy.model import Policy
from troupe.policy.model_files import Companions, model_fingerprint
from troupe.policy.network.qwen3 import Weights


def load_policy(path: str | Path, dtype: str | None = None, *, adapter: str | Path | None = None) -> Policy:
    """Read a model folder, or the one that a hub id such as "Qwen/Qwen3-0.6B" stands for → `Policy`.

    `adapter`: an adapter folder of PEFT, mlx-lm or a run, to be beside it. Where `path` itself is one, the base is the
    one that it names. `dtype` and errors are those of `read_model_folder`, `resolve_model` and `read_adapter`.
    """
    folder, of_path = resolve_base(path)
    if of_path is not None and adapter is not None:
        raise ModelError(
            f"{of_path}: is an adapter itself, and {adapter} is given beside it; name a base, or one of them"
        )
    adapter = of_path if adapter is None else Path(adapter)
    config, weights = read_model_folder(folder, dtype)
    policy = Policy(config, weights, folder, Companions.of(folder))
    if adapter is None:
        return policy
    stored = read_adapter(adapter, config)
    fingerprint = model_fingerprint(folder)
    check_base(stored, adapter, fingerprint, folder)
    del weights
    return with_adapter(policy, stored.adapter, stored.weights, fingerprint)


def resolve_base(path: str | Path) -> tuple[Path, Path | None]:
    """The model folder of a path or hub id, and where it is an adapter folder, which names its base, that folder."""
    folder = resolve_model(path)
    if not is_adapter_folder(folder):
        return folder, None
    if (base := base_named_in(folder)) is None:
        raise ModelError(f"{folder}: holds an adapter and names no base; give the base, and the adapter beside it")
    try:
        return resolve_model(base), folder
    except ModelError as error:
        raise ModelError(
            f"{folder}: holds an adapter of the base {base}, which is not there: {error}; give the base, and the "
            "adapter beside it"
        ) from None


def with_adapter(policy: Policy, adapter: Adapter, weights: Weights, fingerprint: str) -> Policy:
    """A whole network as the base of an adapter, whose weights are what is trained; uses up those of `policy`."""
    network = dict(policy.weights)
    policy.weights = {}
    name = "" if policy.path is None else str(policy.path.absolute())
    base = Base.of(policy.config, network, adapter, name=name, fingerprint=fingerprint)
    adapted = policy.having(weights)
    adapted.base = base
    return adapted


def with_new_adapter(policy: Policy, settings: AdapterConfig, seed: int, fingerprint: str) -> Policy:
    """A whole network as the base of an adapter that begins as `settings` say. ConfigError as `resolve_adapter`."""
    adapted = with_adapter(policy, resolve_adapter(settings, policy.config), {}, fingerprint)
    adapter = adapted.base.adapter
    assert adapter is not None
    norms = adapted.base.row_norms(policy.config, adapter) if adapter.kind == "dora" else None
    adapted.weights = init_adapter(policy.config, adapter, settings.init, seed, norms)
    return adapted
