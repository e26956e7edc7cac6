"""Which files of a model folder hold its weights, and true words where there are none that can be read."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

from troupe.errors import ModelError
from troupe.policy.tensor_names import some

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
WEIGHTS_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
"""What files of weights, and the index of shards, are called."""

_SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapters.safetensors", "adapter_model.bin", "adapters.npz")
_OTHER_FORMATS = (
    ("*.gguf", "which is llama.cpp's format; take the model's folder of safetensors"),
    ("*.bin", "a pickle, which is not read; save it anew with transformers, whose save_pretrained writes safetensors"),
    ("*.pt", "a pickle, which is not read; save it anew with transformers, whose save_pretrained writes safetensors"),
    ("*.pth", "a pickle, which is not read; save it anew with transformers, whose save_pretrained writes safetensors"),
    ("*.npz", "weights of an old MLX program; convert the model again with a newer one, which writes safetensors"),
    ("*.h5", "TensorFlow's format; save it anew with transformers, whose save_pretrained writes safetensors"),
    ("*.msgpack", "Flax's format; save it anew with transformers, whose save_pretrained writes safetensors"),
    ("*.onnx", "a graph that cannot be trained; take the model's folder of safetensors"),
)


def check_folder(folder: Path) -> None:
    """Raise ModelError, saying what it is, where this is no folder of a whole model."""
    if folder.is_file():
        raise ModelError(f"{folder}: is a file; give the model folder that it lies in")
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder; give one that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    adapters = [name for name in _ADAPTER_WEIGHTS if (folder / name).is_file()]
    is_whole = any(_SHARD.fullmatch(name) or name in (WEIGHTS_FILE, INDEX_FILE) for name in _names(folder))
    if (adapters or (folder / _ADAPTER_CONFIG).is_file()) and not is_whole:
        raise ModelError(
            f"{folder}: holds an adapter ({', '.join(adapters or [_ADAPTER_CONFIG])}) and no whole model; fuse or "
            f"merge first with {_base_model(folder)}, and give the folder that comes of it"
        )
    if not (folder / CONFIG_FILE).is_file():
        inner = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_FILE}"))
        hint = f"; give {folder / inner[0]}" if inner else ""
        if is_whole:
            hint = f"; copy {CONFIG_FILE} beside the weights"
        raise ModelError(f"{folder}: holds no {CONFIG_FILE}, so it is no model folder{hint}")
    if adapters:
        raise ModelError(
            f"{folder}: holds a whole model and an adapter ({', '.join(adapters)}), and does not say whether the one "
            f"is in the other already; fuse or merge first, or move {', '.join(adapters)} elsewhere to train without it"
        )


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: the whole one, else the shards that the index names, else those that are
    numbered as shards where none is missing. ModelError says what there is instead."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if (folder / INDEX_FILE).is_file():
        return _indexed_shards(folder, folder / INDEX_FILE)
    if shards := _numbered_shards(folder):
        return shards
    raise ModelError(f"{folder}: holds neither {WEIGHTS_FILE} nor {INDEX_FILE}{_instead(folder)}")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError, naming the file, where there is none."""
    try:
        return parse_json(file, file.read_bytes())
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error}") from None


def parse_json(file: Path, content: bytes) -> dict[str, Any]:
    """The object in the content of a JSON file. Raises ModelError, naming the file, where there is none."""
    try:
        return msgspec.json.decode(content, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"{file}: not a JSON object: {error}") from None


def _indexed_shards(folder: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{index}: weight_map: missing, or not an object of tensor name → file name")
    shards = []
    for name in sorted(set(weight_map.values())):
        if PurePosixPath(name).name != name or "\\" in name or name in ("", ".", ".."):
            raise ModelError(f"{index}: weight_map: {name!r} leads out of the folder; shards must lie beside the index")
        if not (folder / name).is_file():
            raise ModelError(f"{index}: weight_map: the shard {name} is missing from {folder}")
        shards.append(folder / name)
    return shards


def _numbered_shards(folder: Path) -> list[Path]:
    """Shards without an index, whose names say how many there are."""
    found = {name: match for name in _names(folder) if (match := _SHARD.fullmatch(name))}
    counts = sorted({match[2] for match in found.values()})
    if len(counts) > 1:
        raise ModelError(
            f"{folder}: {INDEX_FILE} is missing, and shards of several models lie here (of {', of '.join(counts)}); "
            "copy the index too, or keep the shards of one model"
        )
    for count in counts:
        wanted = (f"model-{number:05d}-of-{count}.safetensors" for number in range(1, int(count) + 1))
        missing = next((name for name in wanted if name not in found), None)
        if missing is not None:
            raise ModelError(
                f"{folder}: the shard {missing} is missing, and {INDEX_FILE}, which would name it, too; copy them here"
            )
    return [folder / name for name in sorted(found)]


def _instead(folder: Path) -> str:
    """What else there is, and what can be done with it."""
    names = _names(folder)
    if broken := [file.name for file in sorted(folder.iterdir()) if not file.exists()]:
        return f", but links that lead nowhere ({some(broken)}); copy, or fetch, what they stand for"
    if others := [name for name in names if name.endswith(".safetensors")]:
        rename = WEIGHTS_FILE if len(others) == 1 else "model-00001-of-0000N.safetensors and so on"
        return (
            f", but safetensors under other names ({some(others)}); if they are this model's weights, rename to "
            f"{rename}"
        )
    for pattern, meaning in _OTHER_FORMATS:
        if others := [name for name in names if PurePosixPath(name).match(pattern)]:
            return f", but {some(others)}, {meaning}"
    return f"; copy the model's weights beside {CONFIG_FILE}"


def _names(folder: Path) -> list[str]:
    try:
        return sorted(file.name for file in folder.iterdir() if file.is_file())
    except OSError as error:
        raise ModelError(f"{folder}: cannot be read: {error}") from None


def _base_model(folder: Path) -> str:
    """The model that an adapter belongs to, as far as it says."""
    try:
        settings = read_json(folder / _ADAPTER_CONFIG)
    except ModelError:
        settings = {}
    named = [settings.get(key) for key in ("base_model_name_or_path", "model")]  # PEFT's and mlx-lm's
    base = next((name for name in named if isinstance(name, str) and name), None)
    return "its base model" if base is None else f"its base model {base}"
