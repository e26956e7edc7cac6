"""Model folders as Hugging Face lays them out: config.json, safetensors whole or in shards, tokenizer files.

Tensors are known by the names that other tools give them, too, and where they are not, their names tell why.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import msgspec

from troupe.errors import InputError, ModelError
from troupe.policy.model_files import (
    CONFIG_FILE,
    DTYPES,
    INDEX_FILE,
    WEIGHTS_FILE,
    WEIGHTS_NAME,
    Companions,
    check_folder,
    dtype_name,
    read_json,
    weight_files,
)
from troupe.policy.network.architecture import Qwen3Config
from troupe.policy.network.elementwise import is_on_cpu
from troupe.policy.network.linear import Linear
from troupe.policy.network.qwen3 import EMBEDDING, FINAL_NORM, HEAD, Weights, dtype_in, expected_shapes, weights_dtype
from troupe.policy.safetensors import read_header
from troupe.policy.tensor_names import canonical_name, is_harmless, what_the_names_tell

MAX_SHARD_BYTES = 5_000_000_000
"""Where Hugging Face's tools split a model by default."""
_SHOWN = 6
"""Faults that a message lists; where each of many tensors has one, the first tell enough."""
_INTEGERS = {2: (mx.uint16, mx.int16), 4: (mx.uint32, mx.int32)}
_INFINITY = {mx.float32: 0x7F800000, mx.bfloat16: 0x7F80, mx.float16: 0x7C00}
"""By its bits, as an integer; numbers that are not finite begin with it, whatever their sign."""
_ROOM = {mx.float16: 5, mx.bfloat16: 8, mx.float32: 9}
"""Orders the types by the largest number that each has room for; float32 has a little more than bfloat16."""
_AT_ONCE = 16
"""Tensors that are read, cast and looked at together."""


class _Stored(NamedTuple):
    """Where a tensor is."""

    file: Path
    name: str


def read_model_folder(
    path: str | Path, dtype: str | None = None, *, expand: bool | None = None
) -> tuple[Qwen3Config, Weights]:
    """Read config.json and the safetensors of a folder → (config, evaluated weights).

    `dtype`: a name of `DTYPES`; None keeps what is stored, or where that is several types, the one of the embedding for
    all (where it is packed, of the last norm); except that on a CPU everything becomes float32, the only type with fast
    matrix products there. `expand`: matrices that are packed into few bits become float numbers, and the config says
    so; None: on a CPU, where products with packed ones are slow. Else they stay packed. Tensors may have other prefixes
    than Hugging Face's (`canonical_name`). Where an own `lm_head.weight` lies beside tie_word_embeddings: true and is
    not the embedding, it is kept, and the config says that they are not tied. ModelError names the folder,
    the file and bad tensors: those that hold NaN or infinity in that type, too.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ModelError(f"dtype: {dtype!r} is refused; it must be one of {', '.join(DTYPES)}")
    folder = Path(path)
    check_folder(folder)
    try:
        config = Qwen3Config.from_dict(read_json(folder / CONFIG_FILE))
    except ModelError as error:
        message = str(error)
        raise ModelError(message if message.startswith(str(folder)) else f"{folder / CONFIG_FILE}: {message}") from None
    places = _check_tensors(folder, config, weight_files(folder))
    stored = _load(places)
    if config.tie_word_embeddings and HEAD in stored:
        if _are_equal(stored[HEAD], stored[EMBEDDING]):
            del stored[HEAD]
        else:
            config = msgspec.structs.replace(config, tie_word_embeddings=False)
    kept = DTYPES[dtype] if dtype else mx.float32 if is_on_cpu() else _dtype_of(stored)
    weights = _finite(folder, places, stored, kept)
    if config.quantization is not None and (is_on_cpu() if expand is None else expand):
        config = _expand(config, weights, kept)
    return config, {name: weights[name] for name in expected_shapes(config)}


def stored_dtype(folder: Path) -> str:
    """The name of the type that the float numbers of a folder are stored in: that of its last norm. ModelError as
    above, where there is none."""
    check_folder(folder)
    stored = {canonical_name(name): tensor.dtype for file in weight_files(folder) for name, tensor in read_header(file)}
    kind = stored.get(FINAL_NORM)
    found = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(str(kind))
    if found is None:
        raise ModelError(f"{folder}: {FINAL_NORM}: missing, or of the type {kind}; it must be F32, BF16 or F16")
    return found


def _dtype_of(stored: Weights) -> mx.Dtype:
    dtype = stored[EMBEDDING].dtype
    return weights_dtype(stored) if dtype == mx.uint32 else dtype


def _expand(config: Qwen3Config, weights: dict[str, mx.array], dtype: mx.Dtype) -> Qwen3Config:
    """Unpack every matrix, one after the other → the config of what they are then."""
    for name in [name for name in weights if name.endswith(".scales")]:
        module = name.removesuffix(".scales")
        expanded = Linear.of(config, weights, module).expanded(dtype)
        mx.eval(expanded)
        for kind in ("scales", "biases"):
            weights.pop(f"{module}.{kind}", None)
        weights[f"{module}.weight"] = expanded
    return msgspec.structs.replace(config, quantization=None)


def _load(places: Mapping[str, _Stored]) -> dict[str, mx.array]:
    """The tensors under our names, not evaluated."""
    weights: dict[str, mx.array] = {}
    for file in sorted({place.file for place in places.values()}):
        tensors = mx.load(str(file))
        assert isinstance(tensors, dict)
        weights |= {name: tensors[place.name] for name, place in places.items() if place.file == file}
    return weights


def _are_equal(a: mx.array, b: mx.array) -> bool:
    if a.dtype != b.dtype:
        a, b = a.astype(mx.float32), b.astype(mx.float32)
    return bool(mx.array_equal(a, b).item())


def _check_tensors(folder: Path, config: Qwen3Config, files: list[Path]) -> dict[str, _Stored]:
    """Where each tensor of the network is, with the head of its own that a tied one may have. Raises one ModelError
    that tells of missing, unexpected, mis-shaped and non-float tensors, and why, where that is known."""
    try:
        wanted = expected_shapes(config)
    except ModelError as error:
        raise ModelError(f"{folder / CONFIG_FILE}: {error}") from None
    shapes = {HEAD: wanted[EMBEDDING]} | wanted
    places: dict[str, _Stored] = {}
    faults: list[str] = []
    unexpected: list[str] = []
    for file in files:
        try:
            header = read_header(file)
        except OSError as error:
            raise ModelError(f"{file}: cannot be read: {error}") from None
        for name, tensor in header:
            known = canonical_name(name)
            if known not in shapes:
                if not is_harmless(name):
                    unexpected.append(name)
                    faults.append(f"{name}: unexpected in {file.name}")
                continue
            if known in places:
                other = places[known].name
                names = "" if other == name else f", as {other} and as {name},"
                faults.append(f"{known}: stored twice{names} in {file.name}")
            elif tensor.shape != (asked := shapes[known]):
                faults.append(f"{name}: shape {list(tensor.shape)} in {file.name}, config.json asks for {list(asked)}")
            elif tensor.dtype not in (dtypes := _stored_dtypes(config, known)):
                faults.append(f"{name}: dtype {tensor.dtype} in {file.name}, it must be {' or '.join(dtypes)}")
            places[known] = _Stored(file, name)
    missing = wanted.keys() - places.keys()
    faults += [f"{name}: missing" for name in missing]
    if faults:
        cause = what_the_names_tell(missing, unexpected, config.num_hidden_layers)
        why = f" {cause}" if cause else ""
        raise ModelError(f"{folder}: {len(faults)} bad tensor(s) for its config.json:{why}{_listed(faults)}")
    return places


def _stored_dtypes(config: Qwen3Config, name: str) -> Sequence[str]:
    """The types that a tensor may be stored in."""
    packed = {mx.uint32: ["U32"], mx.uint8: ["U8"]}
    return packed.get(dtype_in(config, name, mx.float32), ["F32", "BF16", "F16"])


def _finite(
    folder: Path, places: Mapping[str, _Stored], stored: dict[str, mx.array], kept: mx.Dtype
) -> dict[str, mx.array]:
    """Take all of `stored` and give it evaluated, in the type `kept`. Raises ModelError where a number is not finite.

    As integers numbers of one sign are ordered by size, so that the largest of each sign tells: two reductions a
    tensor, which copy nothing. What a type cannot lose is looked at in the fewer bytes that are stored.
    """
    weights: dict[str, mx.array] = {}
    bad: list[str] = []
    names = list(stored)
    for start in range(0, len(names), _AT_ONCE):
        extremes = []
        for name in names[start : start + _AT_ONCE]:
            tensor = stored.pop(name)  # or its memory would stay beside that of the other type
            if tensor.dtype not in _ROOM:
                weights[name] = tensor
                continue
            weights[name] = tensor.astype(kept)  # no copy where that is its type
            seen = weights[name] if _ROOM[kept] < _ROOM[tensor.dtype] else tensor
            unsigned, signed = _INTEGERS[seen.dtype.size]
            extremes.append((name, seen.dtype, mx.max(mx.view(seen, signed)), mx.max(mx.view(seen, unsigned))))
            del tensor, seen
        mx.eval([weights[name] for name, *_ in extremes], [extreme[2:] for extreme in extremes])
        for name, dtype, above, below in extremes:
            infinity, sign = _INFINITY[dtype], 1 << (8 * dtype.size - 1)
            if int(above.item()) >= infinity or int(below.item()) >= sign + infinity:  # type: ignore[arg-type]
                bad.append(name)
    if bad:
        raise ModelError(_what_is_not_finite(folder, places, kept, bad))
    return weights


def _what_is_not_finite(folder: Path, places: Mapping[str, _Stored], kept: mx.Dtype, bad: list[str]) -> str:
    faults, is_room = [], True
    for name in bad:
        file, stored = places[name]
        was_finite = bool(mx.all(mx.isfinite(_load({name: places[name]})[name])).item())
        is_room &= was_finite
        reason = f"not finite in {dtype_name(kept)}, which has no room for its numbers" if was_finite else "not finite"
        faults.append(f"{stored}: {reason} (in {file.name})")
    remedy = (
        "hold the weights in another type (model.dtype, --dtype)"
        if is_room
        else "such weights cannot be used; copy the model again, or take one from before it diverged"
    )
    return f"{folder}: NaN or infinity in {len(faults)} tensor(s); {remedy}:{_listed(faults)}"


def _listed(faults: list[str]) -> str:
    """One a line, but no more than are read."""
    shown = sorted(faults)[:_SHOWN]
    more = [f"and {len(faults) - _SHOWN} more"] if len(faults) > _SHOWN else []
    return "".join(f"\n  {line}" for line in (*shown, *more))


def save_model_folder(
    path: str | Path,
    config: Qwen3Config,
    weights: Weights,
    source: str | Path | Companions | None = None,
    max_shard_bytes: int | None = None,
) -> None:
    """Write a folder that transformers and mlx-lm load: config.json, the weights, and the files beside them.

    The weights go into model.safetensors or, where they are more than `max_shard_bytes`, into shards of at most so many
    bytes with an index (a tensor that is larger has a shard of its own). config.json, the tokenizer's files and
    generation_config.json are byte copies of those of `source`, a model folder or what was kept of one, but for what
    config.json says of type and head where these weights are otherwise; without one config.json is made from `config`.
    Older weights in the folder are removed. Not atomic: `checkpoint` gives a folder its name when it is whole. Raises
    InputError for a limit below 1.
    """
    if max_shard_bytes is not None and max_shard_bytes < 1:
        raise InputError(f"max_shard_bytes: {max_shard_bytes} is refused; give at least 1, or None for one file")
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    in_order = {name: weights[name] for name in expected_shapes(config)}  # equal weights make equal files
    written = set(_save_weights(folder, in_order, max_shard_bytes))
    for file in folder.iterdir():
        if WEIGHTS_NAME.fullmatch(file.name) and file.name not in written:
            file.unlink()  # else a reader might take it for these weights
    companions_of(source).write(folder, config, weights)


def companions_of(source: str | Path | Companions | None) -> Companions:
    """Those that were kept, or that a model folder has now."""
    if isinstance(source, Companions):
        return source
    return Companions() if source is None else Companions.of(Path(source))


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
