"""Model folders as Hugging Face lays them out: config.json, safetensors whole or in shards, tokenizer files."""

from collections.abc import Iterator, Mapping
from pathlib import Path

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
from troupe.policy.network.architecture import NetworkConfig
from troupe.policy.network.elementwise import is_on_cpu
from troupe.policy.network.linear import Linear
from troupe.policy.network.tensors import (
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    Weights,
    as_stored,
    dtype_in,
    expected_shapes,
    is_one_of_a_stack,
    parameter_count,
    stacked,
    weights_dtype,
)
from troupe.policy.stored_tensors import (
    Stored,
    as_ours,
    config_as_stored,
    find_tensors,
    listed,
    load_tensors,
    read_headers,
)
from troupe.policy.tensor_names import canonical_name

MAX_SHARD_BYTES = 5_000_000_000
"""Where Hugging Face's tools split a model by default."""
_INTEGERS = {2: (mx.uint16, mx.int16), 4: (mx.uint32, mx.int32)}
_INFINITY = {mx.float32: 0x7F800000, mx.bfloat16: 0x7F80, mx.float16: 0x7C00}
"""By its bits, as an integer; numbers that are not finite begin with it, whatever their sign."""
_ROOM = {mx.float16: 5, mx.bfloat16: 8, mx.float32: 9}
"""Orders the types by the largest number that each has room for; float32 has a little more than bfloat16."""
_HEAD, _EMBEDDING = HEAD.removesuffix("weight"), EMBEDDING.removesuffix("weight")
_BESIDE = (".scales", ".biases")
"""How the names of tensors end that lie beside the weight of a packed matrix."""
_AT_ONCE = 16
"""Tensors that are read, cast and looked at together."""


def read_model_folder(
    path: str | Path, dtype: str | None = None, *, expand: bool | None = None
) -> tuple[NetworkConfig, Weights]:
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
        config = NetworkConfig.from_dict(read_json(folder / CONFIG_FILE))
    except ModelError as error:
        message = str(error)
        raise ModelError(message if message.startswith(str(folder)) else f"{folder / CONFIG_FILE}: {message}") from None
    headers = read_headers(weight_files(folder))
    is_tied, config = config.tie_word_embeddings, config_as_stored(folder, config, headers)
    places = find_tensors(folder, config, headers)
    stored = as_ours(config, load_tensors(places))
    if is_tied and not config.tie_word_embeddings and _head_is_embedding(stored):
        config = msgspec.structs.replace(config, tie_word_embeddings=True)
        stored = {name: tensor for name, tensor in stored.items() if not name.startswith(_HEAD)}
    kept = DTYPES[dtype] if dtype else mx.float32 if is_on_cpu() else _dtype_of(stored)
    is_expanded = config.quantization is not None and (is_on_cpu() if expand is None else expand)
    kinds = {name: kept if is_one_of_a_stack(name) else dtype_in(config, name, kept) for name in stored}
    if is_expanded:  # computed in float32, whatever becomes of them, so that nothing is rounded twice
        kinds |= {name: mx.float32 for name, kind in kinds.items() if name.endswith(_BESIDE) and kind == kept}
    weights = stacked(config, _finite(folder, config, places, stored, kinds))
    if is_expanded:
        config = _expand(folder, config, weights, kept)
    return config, {name: weights[name] for name in expected_shapes(config)}


def _head_is_embedding(stored: Weights) -> bool:
    """Whether a head holds the same tensors as the embedding."""
    head, embedding = (
        {name.removeprefix(module): tensor for name, tensor in stored.items() if name.startswith(module)}
        for module in (_HEAD, _EMBEDDING)
    )
    return head.keys() == embedding.keys() and all(_are_equal(head[kind], embedding[kind]) for kind in head)


def stored_dtype(folder: Path) -> str:
    """The name of the type that the float numbers of a folder are stored in: that of its last norm. ModelError as
    above, where there is none."""
    check_folder(folder)
    stored = {canonical_name(name): tensor.dtype for _, name, tensor in read_headers(weight_files(folder))}
    kind = stored.get(FINAL_NORM)
    found = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}.get(str(kind))
    if found is None:
        raise ModelError(f"{folder}: {FINAL_NORM}: missing, or of the type {kind}; it must be F32, BF16 or F16")
    return found


def _dtype_of(stored: Weights) -> mx.Dtype:
    dtype = stored[EMBEDDING].dtype
    return weights_dtype(stored) if dtype == mx.uint32 else dtype


def _expand(folder: Path, config: NetworkConfig, weights: dict[str, mx.array], dtype: mx.Dtype) -> NetworkConfig:
    """Unpack every matrix, one after the other → the config of what they are then."""
    for name in [name for name in weights if name.endswith(".scales")]:
        module = name.removesuffix(".scales")
        expanded = Linear.of(config, weights, module).expanded(dtype)
        is_finite = mx.all(mx.isfinite(expanded))
        mx.eval(expanded, is_finite)
        if not is_finite.item():
            raise ModelError(
                f"{folder}: {module}.weight: its packed numbers are not finite in {dtype_name(dtype)}; hold the "
                "weights in another type (model.dtype, --dtype), or copy the model again"
            )
        for kind in _BESIDE:
            weights.pop(module + kind, None)
        weights[f"{module}.weight"] = expanded
    return msgspec.structs.replace(config, quantization=None)


def _are_equal(a: mx.array, b: mx.array) -> bool:
    if a.dtype != b.dtype:
        a, b = a.astype(mx.float32), b.astype(mx.float32)
    return bool(mx.array_equal(a, b).item())


def _finite(
    folder: Path,
    config: NetworkConfig,
    places: Mapping[str, Stored],
    stored: dict[str, mx.array],
    kept: Mapping[str, mx.Dtype],
) -> dict[str, mx.array]:
    """Take all of `stored` and give it evaluated, each in its type of `kept`. Raises ModelError where a number is not
    finite. What a type cannot lose is looked at in the fewer bytes that are stored."""
    weights: dict[str, mx.array] = {}
    bad: list[str] = []
    names = list(stored)
    for start in range(0, len(names), _AT_ONCE):
        extremes = []
        for name in names[start : start + _AT_ONCE]:
            tensor = stored.pop(name)  # or its memory would stay beside that of the other type
            weights[name] = tensor.astype(kept[name])  # no copy where that is its type
            is_smaller = tensor.dtype in _ROOM and _ROOM[kept[name]] < _ROOM[tensor.dtype]
            extremes.append((name, _extremes(config, name, weights[name] if is_smaller else tensor)))
            del tensor
        mx.eval([weights[name] for name, _ in extremes], [largest for _, pairs in extremes for largest, _ in pairs])
        for name, pairs in extremes:
            if any(int(largest.item()) >= limit for largest, limit in pairs):  # type: ignore[arg-type]
                bad.append(name)
    if bad:
        raise ModelError(_what_is_not_finite(folder, places, kept, bad))
    return weights


def _extremes(config: NetworkConfig, name: str, x: mx.array) -> list[tuple[mx.array, int]]:
    """The largest numbers of a tensor, of either sign, and the first that is not finite; lazily.

    As integers numbers of one sign are ordered by size, so that the largest tell: two reductions, which copy nothing.
    Scales of 8 bits are NaN where all bits are set (E8M0) or, in nvfp4, all but the sign's (E4M3).
    """
    if x.dtype == mx.uint8:
        packing = None if config.quantization is None else config.quantization.of(name.removesuffix(".scales"))
        has_sign = packing is not None and packing.mode == "nvfp4"
        return [(mx.max(x & 0x7F), 0x7F) if has_sign else (mx.max(x), 0xFF)]
    if x.dtype not in _INFINITY:
        return []
    unsigned, signed = _INTEGERS[x.dtype.size]
    infinity, sign = _INFINITY[x.dtype], 1 << (8 * x.dtype.size - 1)
    return [(mx.max(mx.view(x, signed)), infinity), (mx.max(mx.view(x, unsigned)), sign + infinity)]


def _what_is_not_finite(
    folder: Path, places: Mapping[str, Stored], kept: Mapping[str, mx.Dtype], bad: list[str]
) -> str:
    faults, is_room = [], True
    for name in bad:
        file, stored = places[name]
        dtype = kept[name]
        was_finite = dtype in _ROOM and bool(mx.all(mx.isfinite(load_tensors({name: places[name]})[name])).item())
        is_room &= was_finite
        reason = f"not finite in {dtype_name(dtype)}, which has no room for its numbers" if was_finite else "not finite"
        faults.append(f"{stored}: {reason} (in {file.name})")
    remedy = (
        "hold the weights in another type (model.dtype, --dtype)"
        if is_room
        else "such weights cannot be used; copy the model again, or take one from before it diverged"
    )
    return f"{folder}: NaN or infinity in {len(faults)} tensor(s); {remedy}:{listed(faults)}"


def save_model_folder(
    path: str | Path,
    config: NetworkConfig,
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
    in_order = as_stored(config, weights)  # equal weights make equal files
    written = set(_save_weights(folder, in_order, max_shard_bytes, parameter_count(config)))
    for file in folder.iterdir():
        if WEIGHTS_NAME.fullmatch(file.name) and file.name not in written:
            file.unlink()  # else a reader might take it for these weights
    companions_of(source).write(folder, config, weights)


def companions_of(source: str | Path | Companions | None) -> Companions:
    """Those that were kept, or that a model folder has now."""
    if isinstance(source, Companions):
        return source
    return Companions() if source is None else Companions.of(Path(source))


def _save_weights(folder: Path, weights: Weights, max_shard_bytes: int | None, numbers: int) -> Iterator[str]:
    """Write the tensors → the names of the files. `numbers`: those of the network."""
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
    metadata = {"total_parameters": numbers, "total_size": total}
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
