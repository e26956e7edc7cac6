"""How the matrices of a network are packed into few bits, as `config.json` says and mlx-lm writes it.

Groups of neighbouring numbers of a row share a scale, and in mode "affine" an offset (`biases`). MX formats: OCP
Microscaling Formats 1.0.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from troupe.errors import ModelError

EXPERTS, STACKED_BY_MLX_LM = "mlp.experts.", "mlp.switch_mlp."
"""What the names of all experts' matrices begin with in a layer: ours and transformers', and mlx-lm's."""


class Quantized(msgspec.Struct, frozen=True):
    """How one matrix is packed."""

    group_size: int
    bits: int
    mode: str = "affine"


class Quantization(msgspec.Struct, frozen=True):
    """How the matrices of a network are packed."""

    default: Quantized
    modules: Mapping[str, Quantized | None] = {}
    """Those that differ, by name; None: not packed."""

    def __hash__(self) -> int:
        return hash((self.default, *self.modules.items()))

    def of(self, module: str) -> Quantized | None:
        """How a matrix, such as "model.layers.0.mlp.up_proj", is packed; None: it is not."""
        return self.modules.get(module, self.default)

    def having(self, modules: Mapping[str, Quantized | None]) -> "Quantization":
        """The same, with what differs elsewhere."""
        return Quantization(self.default, {name: q for name, q in modules.items() if q != self.default})


QUANTIZATION_KEYS = ("quantization", "quantization_config")
"""Of `config.json`; mlx-lm writes the same under both."""
_AFFINE_BITS, _AFFINE_GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
_FLOAT_MODES = {
    "mxfp4": Quantized(32, 4, "mxfp4"),
    "mxfp8": Quantized(32, 8, "mxfp8"),
    "nvfp4": Quantized(16, 4, "nvfp4"),
}
_NAMES = ("group_size", "bits", "mode")
_REMEDY = "take the unquantized folder of this model, and quantize it with mlx_lm.convert -q where it must be small"


def read_quantization(settings: Mapping[str, Any]) -> Quantization | None:
    """What a parsed `config.json` says; None where nothing is packed. ModelError, beginning with the key, for what is
    not here."""
    if settings.get("compression_config"):
        raise ModelError(_foreign("compression_config", settings["compression_config"]))
    if settings.get("quantize_activations"):
        raise ModelError("quantize_activations: true is not supported; only weights are packed here")
    found: dict[str, Quantization] = {}
    for key in QUANTIZATION_KEYS:
        if not (table := settings.get(key)):
            continue
        if not isinstance(table, dict):
            raise ModelError(f"{key}: {table!r} is refused; it must be a table with group_size and bits")
        if "quant_method" in table:
            raise ModelError(_foreign(key, table))
        default = _read_one(key, {name: value for name, value in table.items() if name in _NAMES})
        modules = {
            name.replace(STACKED_BY_MLX_LM, EXPERTS): value for name, value in table.items() if name not in _NAMES
        }
        found[key] = Quantization(default).having(
            {name: _read_module(f"{key}.{name}", value, default) for name, value in modules.items()}
        )
    first, second = QUANTIZATION_KEYS
    if len(found) == 2 and found[first] != found[second]:
        raise ModelError(f"{second}: says something else than {first}; keep the one that is true")
    return next(iter(found.values()), None)


def _foreign(key: str, table: Any) -> str:
    kind = table.get("quant_method") if isinstance(table, dict) else table
    return f"{key}: weights packed by {kind!r} are not supported; {_REMEDY}"


def _read_module(key: str, value: Any, default: Quantized) -> Quantized | None:
    if value is None or isinstance(value, bool):
        return default if value else None
    if not isinstance(value, dict):
        raise ModelError(f"{key}: {value!r} is refused; it must be a table with group_size and bits, or false")
    return _read_one(key, value)


def _read_one(key: str, table: Mapping[str, Any]) -> Quantized:
    if others := sorted(name for name, value in table.items() if name not in _NAMES and value):
        raise ModelError(f"{key}.{others[0]}: {table[others[0]]!r} is not supported; there may be {', '.join(_NAMES)}")
    mode = table.get("mode", "affine")
    group, bits = (table.get(name) for name in ("group_size", "bits"))
    for name, value in (("group_size", group), ("bits", bits)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise ModelError(f"{key}.{name}: {value!r} is refused; it must be a whole number")
    if mode == "affine":
        if bits not in _AFFINE_BITS:
            raise ModelError(f"{key}.bits: {bits} is not supported; it must be one of {_listed(_AFFINE_BITS)}")
        if group not in _AFFINE_GROUPS:
            raise ModelError(f"{key}.group_size: {group} is not supported; it must be one of {_listed(_AFFINE_GROUPS)}")
        return Quantized(int(group), int(bits))
    if not isinstance(mode, str) or mode not in _FLOAT_MODES:
        known = ", ".join(("affine", *_FLOAT_MODES))
        raise ModelError(f"{key}.mode: {mode!r} is not supported; it must be one of {known}")
    if Quantized(int(group or 0), int(bits or 0), mode) != (only := _FLOAT_MODES[mode]):
        raise ModelError(
            f"{key}: {mode} has groups of {only.group_size} numbers of {only.bits} bits, not {group} of {bits}"
        )
    return only


def _listed(numbers: tuple[int, ...]) -> str:
    return ", ".join(map(str, numbers))


def quantization_table(quantization: Quantization) -> dict[str, Any]:
    """As mlx-lm writes it, for `config.json`."""
    modules = {
        name.replace(EXPERTS, STACKED_BY_MLX_LM): False if q is None else msgspec.structs.asdict(q)
        for name, q in quantization.modules.items()
    }
    return {**msgspec.structs.asdict(quantization.default), **modules}


def packed_shapes(module: str, shape: tuple[int, ...], packing: Quantized) -> dict[str, tuple[int, ...]]:
    """Name → shape of the tensors of a packed matrix (out, in), or of a stack (…, out, in): `weight` uint32, `scales`,
    and `biases` where it is affine. ModelError, beginning with "quantization", where its rows cannot be cut into such
    groups."""
    *rows, columns = shape
    if columns % packing.group_size or columns * packing.bits % 32:
        raise ModelError(
            f"quantization: {module} has rows of {columns} numbers, which groups of {packing.group_size} numbers of "
            f"{packing.bits} bits do not divide"
        )
    groups = (*rows, columns // packing.group_size)
    shapes: dict[str, tuple[int, ...]] = {
        f"{module}.weight": (*rows, columns * packing.bits // 32),
        f"{module}.scales": groups,
    }
    return shapes | ({f"{module}.biases": groups} if packing.mode == "affine" else {})
