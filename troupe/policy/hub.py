"""From what a user calls a model to a folder on this disk: a path, or an id of the Hugging Face hub.

Models that other tools fetched are found in the hub's cache without any dependency and without the network; what is
missing is fetched where `huggingface_hub` is installed (the extra `hub`).
"""

import importlib
import os
import re
from pathlib import Path

from troupe.errors import ModelError, in_clone, remedy
from troupe.policy.model_files import CONFIG_FILE, weight_files

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = "main"
_FETCHED = ["*.json", "*.safetensors", "*.txt", "*.jinja", "*.tiktoken", "LICENSE*"]


def is_hub_id(path: str | Path) -> bool:
    """Whether `path` has the form of a hub id, "ORGANIZATION/NAME", and no file or folder of that name is here."""
    return _HUB_ID.fullmatch(str(path)) is not None and not Path(path).exists()


def resolve_model(path: str | Path) -> Path:
    """The folder that `path` means: itself, or for a hub id its newest snapshot in the local cache.

    A snapshot that is absent or lacks files is fetched where `huggingface_hub` is installed; what is whole is never
    asked for again, so a cached model works offline. Raises ModelError where no whole folder can be had. A path that
    is no hub id comes back as it is.
    """
    if not is_hub_id(path):
        return Path(path)
    name = str(path)
    snapshot = _snapshot(name)
    if snapshot is not None and _is_whole(snapshot):
        return snapshot
    found = "not in" if snapshot is None else f"incomplete ({snapshot}) in"
    problem = f"{name}: no such folder here, and the model of this name is {found} the cache {hub_cache()}"
    try:
        hub = importlib.import_module("huggingface_hub")
    except ImportError:
        fetching = "Troupe's extra `hub`" if in_clone() else f"huggingface_hub ({remedy('hub')})"
        raise ModelError(
            f"{problem}; correct the path if a folder is meant; a model of the hub's is fetched by {fetching}, or on a "
            f"machine that is online (hf download {name}), from where the cache can be copied"
        ) from None
    try:
        fetched = hub.snapshot_download(name, revision=_REVISION, cache_dir=hub_cache(), allow_patterns=_FETCHED)
    except Exception as error:  # the network's, the hub's and the disk's many kinds
        raise ModelError(
            f"{problem}, and fetching it failed: {type(error).__name__}: {error}; check the name and the network, or "
            "give the path of a model folder"
        ) from error
    return Path(fetched)


def hub_cache() -> Path:
    """The folder in which Hugging Face's tools keep models, as their environment variables set it."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or Path(home) / "hub"
    return Path(os.path.expanduser(os.path.expandvars(cache)))  # noqa: PTH111 - a user who is not there is no error


def _snapshot(name: str) -> Path | None:
    """The folder of the newest revision that was fetched, whole or not."""
    folder = hub_cache() / f"models--{name.replace('/', '--')}"
    try:
        commit = (folder / "refs" / _REVISION).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if commit.isalnum() and snapshot.is_dir() else None


def _is_whole(snapshot: Path) -> bool:
    """Whether config.json and all weights are there; a fetch that was cut off leaves fewer."""
    try:
        return (snapshot / CONFIG_FILE).is_file() and bool(weight_files(snapshot))
    except ModelError:
        return False
