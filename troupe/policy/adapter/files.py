"""Adapter folders: PEFT's and mlx-lm's read as ours, and one folder written that both load as it is.

    adapter_config.json          settings, under the names of both
    adapter_model.safetensors    PEFT's tensors
    adapters.safetensors         mlx-lm's

Over which base an adapter was trained is said by its fingerprint in the metadata of both files, where Troupe wrote
them.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import mlx.core as mx
import msgspec

from troupe.errors import ModelError
from troupe.policy.adapter import mlx_lm, peft
from troupe.policy.adapter.modules import ENDS, Adapter, adapter_shapes
from troupe.policy.model_files import ADAPTER_CONFIG, WEIGHTS_NAME, read_json, some
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.safetensors import StoredTensor, read_header

_BASE = "base"
"""Key of the metadata."""
_FLOATS = ("F32", "BF16", "F16")
_PICKLES = ("adapter_model.bin", "adapters.npz")


class StoredAdapter(NamedTuple):
    """What an adapter folder holds."""

    adapter: Adapter
    weights: dict[str, mx.array]
    """float32, evaluated, under the names of `adapter_shapes` and in its order."""
    base_name: str | None
    """The folder or hub id of the base, as the folder has it."""
    base_fingerprint: str | None
    """None where another tool wrote the folder."""


class AdapterFiles(NamedTuple):
    """What is to be written of an adapter."""

    settings: bytes
    """Of `adapter_config.json`."""
    tensors: Mapping[str, tuple[Mapping[str, mx.array], dict[str, str]]]
    """File → its tensors and metadata."""


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter and no weights of a model; a config.json alone, which some trainers leave
    beside an adapter, is no model."""
    names = (ADAPTER_CONFIG, peft.WEIGHTS_FILE, mlx_lm.WEIGHTS_FILE, *_PICKLES)
    if not any((folder / name).is_file() for name in names):
        return False
    return not any(WEIGHTS_NAME.fullmatch(file.name) for file in folder.glob("model*.safetensors*"))


def base_named_in(folder: Path) -> str | None:
    """The base that an adapter folder names: an existing folder, which may be named from the adapter's, or a hub id."""
    settings = read_json(folder / ADAPTER_CONFIG)
    named = [settings.get(key) for key in ("base_model_name_or_path", "model")]  # PEFT's and mlx-lm's
    name = next((name for name in named if isinstance(name, str) and name), None)
    if name is not None:
        with suppress(OSError):  # a text too long for a name is no folder's
            return str(folder / name) if (folder / name).is_dir() else name
    return name


def read_adapter(
    folder: Path, network: NetworkConfig, base: Path | None = None, fingerprint: str | None = None
) -> StoredAdapter:
    """Read an adapter of this network. ModelError names the file and the key or tensor that is wrong, and where it says
    that it was trained over another base than the one of this `fingerprint`, in the folder `base`."""
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such adapter folder; give one that holds {ADAPTER_CONFIG} and its tensors")
    config = folder / ADAPTER_CONFIG
    if not config.is_file():
        raise ModelError(f"{folder}: holds no {ADAPTER_CONFIG}, so it is no adapter folder")
    settings = read_json(config)
    ours = _format_of(folder, settings)
    file = folder / ours.WEIGHTS_FILE
    headers = _headers(file)
    names = {stored: ours.our_name(stored) for stored, _ in headers}
    known = {name for name in names.values() if name is not None}
    _check_types(file, headers)
    arrays, metadata = mx.load(str(file), return_metadata=True)
    assert isinstance(arrays, dict)
    assert isinstance(metadata, dict)
    named, told = base_named_in(folder), metadata.get(_BASE)
    if base is not None and told not in (None, fingerprint):  # first: with other shapes every tensor would be a fault
        of = "" if named is None else f" ({named})"
        raise ModelError(
            f"{folder}: this adapter was trained over another base{of} than {base}: their fingerprints are "
            f"{str(told)[:12]}… and {str(fingerprint)[:12]}…; give the base that it was trained over"
        )
    if ours is peft:
        adapter = peft.read_settings(config, settings, known, network)
    else:
        partial = mlx_lm.PARTIAL in metadata
        adapter = mlx_lm.read_settings(config, settings, known, network, partial=partial)
    _check(file, headers, names, adapter_shapes(network, adapter), ours)
    weights = {}
    for stored, name in names.items():
        array = arrays[stored].astype(mx.float32)
        weights[str(name)] = mx.contiguous(array.T) if ours is mlx_lm and array.ndim == 2 else array
    mx.eval(weights)
    if bad := [name for name, array in weights.items() if not mx.all(mx.isfinite(array)).item()]:
        raise ModelError(f"{file}: NaN or infinity in {some(bad)}; such an adapter cannot be used")
    in_order = {name: weights[name] for name in adapter_shapes(network, adapter)}
    return StoredAdapter(adapter, in_order, named, told)


def _format_of(folder: Path, settings: Mapping[str, Any]) -> ModuleType:
    """Whose tensors are to be read; where both kinds are there, those of the tool that wrote the settings last."""
    there = [ours for ours in (peft, mlx_lm) if (folder / ours.WEIGHTS_FILE).is_file()]
    if not there:
        pickles = [name for name in _PICKLES if (folder / name).is_file()]
        instead = f", but {pickles[0]}, which is not read; save it anew as safetensors" if pickles else ""
        raise ModelError(f"{folder}: holds neither {peft.WEIGHTS_FILE} nor {mlx_lm.WEIGHTS_FILE}{instead}")
    return there[0] if "peft_type" in settings else there[-1]


def _headers(file: Path) -> list[tuple[str, StoredTensor]]:
    try:
        return read_header(file)
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error}") from None


def _check_types(file: Path, headers: Sequence[tuple[str, StoredTensor]]) -> None:
    """Before anything is loaded: MLX does not know all types that the format has."""
    if bad := [f"{name}: dtype {tensor.dtype}" for name, tensor in headers if tensor.dtype not in _FLOATS]:
        raise ModelError(f"{file}: {some(bad)}; only {', '.join(_FLOATS)} are read")


def _check(
    file: Path,
    headers: Sequence[tuple[str, StoredTensor]],
    names: Mapping[str, str | None],
    wanted: Mapping[str, tuple[int, ...]],
    ours: ModuleType,
) -> None:
    """Raise one ModelError that tells of tensors that are missing, left over, twice there or of another shape."""
    faults = []
    seen: set[str | None] = set()
    if not wanted and not headers:
        raise ModelError(f"{file}: holds no adapter of this network: no tensors")
    for stored, tensor in headers:
        name = names[stored]
        shape = tensor.shape[::-1] if ours is mlx_lm else tensor.shape
        if any(f"{end}.lora_" in stored for end in ENDS):
            faults.append(f"{stored}: an adapter of embedding or head is not supported; merge it into its base first")
        elif name is None or name not in wanted:
            faults.append(f"{stored}: left over: {ADAPTER_CONFIG} names no such part of an adapter of this network")
        elif name in seen:
            faults.append(f"{stored}: stored twice")
        elif shape != (asked := wanted[name]):
            expected = asked[::-1] if ours is mlx_lm else asked
            faults.append(
                f"{stored}: shape {list(tensor.shape)}, this base and {ADAPTER_CONFIG} ask for {list(expected)}"
            )
        seen.add(name)
    faults += [f"{ours.their_name(name)}: missing" for name in wanted if name not in seen]
    if faults:
        shown = "".join(f"\n  {fault}" for fault in faults[:6])
        more = f"\n  and {len(faults) - 6} more" if len(faults) > 6 else ""
        raise ModelError(f"{file}: {len(faults)} bad tensor(s) for this base:{shown}{more}")


def adapter_files(
    network: NetworkConfig, adapter: Adapter, weights: Mapping[str, mx.array], *, base_name: str, base_fingerprint: str
) -> AdapterFiles:
    """What to write of an adapter, so that PEFT, mlx-lm and we read it."""
    settings: dict[str, Any] = {
        **peft.settings_for(adapter, network.num_hidden_layers, base_name),
        **mlx_lm.settings_for(network, adapter),
    }
    of_mlx = mlx_lm.tensors_for(adapter, weights)
    mx.eval(of_mlx)
    in_order = adapter_shapes(network, adapter)  # equal weights make equal files
    of_peft = {peft.their_name(name): weights[name] for name in in_order}
    partial = {mlx_lm.PARTIAL: "true"} if mlx_lm.is_partial(network, adapter) else {}
    return AdapterFiles(
        msgspec.json.format(msgspec.json.encode(settings), indent=2) + b"\n",
        {
            peft.WEIGHTS_FILE: (of_peft, {"format": "pt", _BASE: base_fingerprint}),
            mlx_lm.WEIGHTS_FILE: (
                of_mlx,
                {"format": "mlx", _BASE: base_fingerprint, **partial},
            ),
        },
    )


def save_adapter(folder: Path, files: AdapterFiles) -> None:
    """Write an adapter folder; not atomic."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ADAPTER_CONFIG).write_bytes(files.settings)
    for name, (arrays, metadata) in files.tensors.items():
        mx.save_safetensors(str(folder / name), dict(arrays), metadata=metadata)
