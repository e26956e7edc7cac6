"""Model folders as Hugging Face lays them out: config.json, safetensors whole or in shards, tokenizer files.

Knows names, shapes and types of what lies in a folder, and reads only from the disk. Knows nothing of where folders
come from, of text, nor of training.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import mlx.core as mx
import msgspec
from safetensors import SafetensorError, safe_open

from troupe.errors import InputError, ModelError
from troupe.policy.architecture import Qwen3Config
from troupe.policy.elementwise import is_on_cpu
from troupe.policy.qwen3 import EMBEDDING, HEAD, Weights, expected_shapes

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
COMPANION_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    GENERATION_CONFIG_FILE,
)
"""What travels with the weights, byte for byte, from a model folder into every folder made from it."""

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
MAX_SHARD_BYTES = 5_000_000_000
"""Where Hugging Face's tools split a model by default."""
_WEIGHTS_NAME = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def read_model_folder(path: str | Path, dtype: str | None = None) -> tuple[Qwen3Config, Weights]:
    """Read config.json and the safetensors of a folder → (config, evaluated weights).

    `dtype`: a name of `DTYPES`; None keeps what is stored, or where that is several types, the one of the embedding for
    all; except that on a CPU everything becomes float32, the only type with fast matrix products there. Raises
    ModelError, which names the folder, the file and every bad tensor.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype: {dtype!r} is refused; it must be one of {', '.join(DTYPES)}")
    folder = Path(path)
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such model folder; give one that holds {CONFIG_FILE} and {WEIGHTS_FILE}")
    if not (folder / CONFIG_FILE).is_file():
        raise ModelError(f"{folder}: holds no {CONFIG_FILE}, so it is no model folder")
    try:
        config = Qwen3Config.from_dict(read_json(folder / CONFIG_FILE))
    except ModelError as error:
        message = str(error)
        raise ModelError(message if message.startswith(str(folder)) else f"{folder / CONFIG_FILE}: {message}") from None
    files = _weight_files(folder)
    _check_tensors(folder, config, files)
    target = DTYPES[dtype] if dtype else mx.float32 if is_on_cpu() else None
    wanted = expected_shapes(config)
    weights: dict[str, mx.array] = {}
    for file in files:
        tensors = mx.load(str(file))
        assert isinstance(tensors, dict)
        for name in wanted.keys() & tensors.keys():
            weights[name] = tensors[name]
    kept = target or weights[EMBEDDING].dtype
    weights = {name: tensor.astype(kept) for name, tensor in weights.items()}  # no copy where that is its type
    mx.eval(weights)
    return config, {name: weights[name] for name in wanted}


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError, naming the file, where there is none."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except msgspec.MsgspecError as error:
        raise ModelError(f"{file}: not a JSON object: {error}") from None


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: the whole one, else the shards that the index names."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    index = folder / INDEX_FILE
    if not index.is_file():
        raise ModelError(f"{folder}: holds neither {WEIGHTS_FILE} nor {INDEX_FILE}; convert the weights to safetensors")
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


def _stored_tensors(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name → (dtype, shape) of what a safetensors file holds; the data are not read."""
    tensors = {}
    try:
        with safe_open(file, framework="numpy") as stored:
            for name in stored.keys():  # noqa: SIM118 - no mapping: it has `keys` alone
                entry = stored.get_slice(name)
                tensors[name] = (str(entry.get_dtype()), tuple(entry.get_shape()))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{file}: truncated, damaged or no safetensors file ({error}); copy it again") from None
    return tensors


def _names_given_twice(file: Path) -> list[str]:
    """Tensors that the header of a sound safetensors file lists more than once; readers silently take one of them."""
    names: list[str] = []

    def note(pairs: list[tuple[str, Any]]) -> None:
        names[:] = [name for name, _ in pairs]  # the outermost object is closed last

    with file.open("rb") as stored:
        json.loads(stored.read(int.from_bytes(stored.read(8), "little")), object_pairs_hook=note)
    return sorted(name for name, count in Counter(names).items() if count > 1)


def _check_tensors(folder: Path, config: Qwen3Config, files: list[Path]) -> None:
    """Raise one ModelError that lists every missing, unexpected, mis-shaped or non-float tensor."""
    wanted = expected_shapes(config)
    faults: list[str] = []
    found: set[str] = set()
    for file in files:
        stored = _stored_tensors(file)
        faults += [f"{name}: stored twice in {file.name}" for name in _names_given_twice(file)]
        for name, (dtype, shape) in stored.items():
            if name in found:
                faults.append(f"{name}: stored twice")
            found.add(name)
            if name not in wanted:
                if name != HEAD and not name.endswith("rotary_emb.inv_freq"):
                    faults.append(f"{name}: unexpected in {file.name}")
            elif shape != wanted[name]:
                faults.append(f"{name}: shape {list(shape)} in {file.name}, config.json asks for {list(wanted[name])}")
            elif dtype not in ("F32", "BF16", "F16"):
                faults.append(f"{name}: dtype {dtype} in {file.name}, only F32, BF16 and F16 can be trained")
    faults += [f"{name}: missing" for name in wanted.keys() - found]
    if faults:
        raise ModelError(
            f"{folder}: {len(faults)} bad tensor(s) for its config.json:\n  " + "\n  ".join(sorted(faults))
        )


def save_model_folder(
    path: str | Path,
    config: Qwen3Config,
    weights: Weights,
    source: str | Path | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Write a folder that transformers and mlx-lm load: config.json, the weights, and the files beside them.

    The weights go into model.safetensors or, where they are more than `max_shard_bytes`, into shards of at most so many
    bytes with an index (a tensor that is larger has a shard of its own). config.json, the tokenizer's files and
    generation_config.json are byte copies of those in the folder `source`, but for the type that config.json names,
    where the weights are held in another; without one config.json is made from `config`. Older weights in the folder
    are removed. Not atomic: `checkpoint` gives a folder its name when it is whole. Raises InputError for a limit below
    1.
    """
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise InputError(f"max_shard_bytes: {max_shard_bytes} is refused; give at least 1, or None for one file")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    in_order = {name: weights[name] for name in expected_shapes(config)}  # equal weights make equal files
    written = set(_save_weights(folder, in_order, max_shard_bytes))
    for file in folder.iterdir():
        if _WEIGHTS_NAME.fullmatch(file.name) and file.name not in written:
            file.unlink()  # else a reader might take it for these weights
    save_companions(folder, config, weights, source)


def save_companions(folder: Path, config: Qwen3Config, weights: Weights, source: str | Path | None = None) -> None:
    """Write what stands beside the weights in a model folder, as `save_model_folder` does."""
    origin = None if source is None else Path(source)
    if origin is None or not (origin / CONFIG_FILE).is_file():
        text = msgspec.json.format(msgspec.json.encode(config.to_dict()), indent=2)
        (folder / CONFIG_FILE).write_bytes(text + b"\n")
    if origin is not None:
        rank_files = sorted(file.name for file in origin.glob("*.tiktoken"))
        for name in (CONFIG_FILE, *COMPANION_FILES, *rank_files):
            original, copy = origin / name, folder / name
            if original.is_file() and original.resolve() != copy.resolve():
                shutil.copyfile(original, copy)
    _name_dtype(folder / CONFIG_FILE, weights)


def _name_dtype(file: Path, weights: Weights) -> None:
    """Correct the type that a config.json names to that of the weights, for transformers loads them in that type."""
    held = next(name for name, dtype in DTYPES.items() if dtype == weights[EMBEDDING].dtype)
    settings = read_json(file)
    wrong = {key: held for key in ("dtype", "torch_dtype") if settings.get(key) not in (None, held)}
    if wrong:
        file.write_bytes(msgspec.json.format(msgspec.json.encode(settings | wrong), indent=2) + b"\n")


def _save_weights(folder: Path, weights: Weights, max_shard_bytes: int | None) -> Iterator[str]:
    """Write the tensors → the names of the files."""
    total = sum(tensor.nbytes for tensor in weights.values())
    if max_shard_bytes is None or total <= max_shard_bytes:
        mx.save_safetensors(str(folder / WEIGHTS_FILE), dict(weights), metadata={"format": "pt"})
        yield WEIGHTS_FILE
        return
    shards = _split(weights, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        mx.save_safetensors(str(folder / name), dict(shard), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
        yield name
    metadata = {"total_parameters": sum(tensor.size for tensor in weights.values()), "total_size": total}
    index = msgspec.json.encode({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})
    (folder / INDEX_FILE).write_bytes(msgspec.json.format(index, indent=2) + b"\n")
    yield INDEX_FILE


def _split(weights: Mapping[str, mx.array], max_bytes: int) -> list[dict[str, mx.array]]:
    """Runs of tensors, in order, of at most `max_bytes` each, or of a single one."""
    shards: list[dict[str, mx.array]] = []
    room = 0
    for name, tensor in weights.items():
        if tensor.nbytes > room:
            shards.append({})
            room = max_bytes
        shards[-1][name] = tensor
        room -= tensor.nbytes
    return shards
