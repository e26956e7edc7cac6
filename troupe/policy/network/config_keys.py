"""A parsed config.json, of either age, as the fields of a `NetworkConfig`.

Unknown keys are passed over; what would change the arithmetic into one that is not here is refused by its key.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from troupe.errors import ModelError
from troupe.policy.network.families import (
    ACTIVATION_NAMES,
    FAMILIES,
    FULL,
    LINEAR,
    SLIDING,
    WRAPPED,
    Family,
    family_of,
    layers_by_pattern,
)
from troupe.policy.network.quantization import read_quantization
from troupe.policy.network.rope_settings import rope_settings

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
_OF_SOME = (
    "query_pre_attn_scalar",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "num_experts",
    "num_experts_per_tok",
    "moe_intermediate_size",
    "norm_topk_prob",
    "decoder_sparse_step",
    "mlp_only_layers",
)
"""Keys that mean something only in families that have a default for them."""
_ALSO_EXPERTS = "num_local_experts"
"""What `num_experts` is called, too: by transformers 5."""
_MOST = 2**16
"""No list of kinds of layers becomes longer, whatever num_hidden_layers is: that is refused elsewhere."""
_PLAIN = ("mlp_bias", "attn_logit_softcapping", "final_logit_softcapping")
"""Keys that change the arithmetic of any family where they are not null, 0 or false."""
_DEFAULT_WINDOW = 4096
"""Of `sliding_window` where a config.json leaves it out, as in transformers; null is none."""


def text_settings(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """A parsed config.json, or of one for images and text what it says of the part for text. Raises ModelError."""
    outer = settings.get("model_type")
    if not isinstance(outer, str) or outer not in WRAPPED:
        return settings
    text, inner = settings.get("text_config"), WRAPPED[outer]
    if not isinstance(text, Mapping):
        raise ModelError(f"text_config: missing; the config.json of a {outer} must say of what its text part is")
    if text.get("model_type", inner) != inner:
        raise ModelError(f"text_config.model_type: {text['model_type']!r} is refused; in a {outer} it is {inner!r}")
    around = ("tie_word_embeddings", "dtype", "torch_dtype", "eos_token_id", "quantization", "quantization_config")
    return {**{key: settings[key] for key in around if key in settings}, **text, "model_type": inner} | (
        {"tie_word_embeddings": settings["tie_word_embeddings"]} if "tie_word_embeddings" in settings else {}
    )


def fields_of(settings: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Those of the fields `names` that a config.json, or its family, says anything of. Raises ModelError, its message
    starting with the key at fault."""
    settings = text_settings(settings)
    family = family_of(settings.get("model_type"))
    _refuse_unsupported(settings, family)
    found = {name: value for name, value in family.defaults.items() if name in names}
    known = [name for name in names if name not in _OF_SOME or name in family.defaults]
    found |= {name: settings[name] for name in known if settings.get(name) is not None}
    if family.experts and settings.get("num_experts") is None and settings.get(_ALSO_EXPERTS) is not None:
        found["num_experts"] = settings[_ALSO_EXPERTS]
    found.pop("local_rope_theta", None)
    found |= rope_settings(settings, family)
    found |= _windows(settings, family)
    found["quantization"] = read_quantization(settings)
    eos = settings.get("eos_token_id")
    found["eos_token_id"] = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if family.biases != "as_said":
        found.pop("attention_bias", None)
    for key in _REQUIRED:
        if key not in found:
            raise ModelError(f"{key}: missing; the config.json of a {settings['model_type']} must name it")
    heads, hidden = found["num_attention_heads"], found["hidden_size"]
    if found["num_key_value_heads"] is None:
        found["num_key_value_heads"] = heads
    if "head_dim" not in found and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        if hidden % heads:
            raise ModelError(f"head_dim: missing, and hidden_size {hidden} is not a multiple of {heads} heads; name it")
        found["head_dim"] = hidden // heads
    return found


def _refuse_unsupported(settings: Mapping[str, Any], family: Family) -> None:
    """Raise ModelError where a setting asks for arithmetic that is not here."""
    named, known = settings.get("architectures"), ([family.architecture], [family.bare])
    if named is not None and named not in known:
        model_type = settings["model_type"]
        if others := [name for name, f in FAMILIES.items() if named in ([f.architecture], [f.bare])]:
            raise ModelError(
                f"model_type: {model_type!r} is refused beside architectures {named}, which is a {others[0]!r}; one of "
                "them is wrong"
            )
        raise ModelError(
            f"architectures: {named!r} is not supported; of a {model_type} it must be ['{family.architecture}']"
        )
    if settings.get("attention_bias") and family.biases != "as_said":
        which = "those of queries, keys and values, and no other," if family.biases == "qkv" else "none"
        raise ModelError(f"attention_bias: true is not supported; a {settings['model_type']} has {which} here")
    for key in ("hidden_act", "hidden_activation"):
        names = ACTIVATION_NAMES[family.activation]
        if settings.get(key) not in (None, *names):
            raise ModelError(f"{key}: {settings[key]!r} is not supported; it must be {names[0]!r}")
    for key in _PLAIN:
        if settings.get(key):
            raise ModelError(f"{key}: {settings[key]!r} is not supported; leave it out if the network does without")
    if family.gates_attention and settings.get("attn_output_gate") is False:
        raise ModelError("attn_output_gate: false is not supported; what attention gives is gated in such a network")
    if settings.get("is_causal") is False or settings.get("use_bidirectional_attention"):
        key = "is_causal" if settings.get("is_causal") is False else "use_bidirectional_attention"
        raise ModelError(f"{key}: {settings[key]!r} is not supported; a token sees only those before it")


def _windows(settings: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """The fields `sliding_window` and `layer_types`, both empty where no layer has a window."""
    layers, count = settings.get("layer_types"), settings.get("num_hidden_layers")
    window = settings.get("sliding_window", family.defaults.get("sliding_window", _DEFAULT_WINDOW))
    kinds: list[str] = []
    if family.has_delta:
        return {"sliding_window": None, "layer_types": _with_delta(settings, family, count)}
    if layers is not None:
        kinds = _checked_kinds(layers, count, family)
    elif family.windows == "none" and settings.get("use_sliding_window") and window:
        raise ModelError(f"use_sliding_window: true (window {window}) is not supported")
    elif family.windows == "by_layer" and isinstance(count, int):
        kinds = _by_pattern(settings, family, count)
    if family.windows == "all" and window is not None and isinstance(count, int):
        if FULL in kinds:
            raise ModelError(
                f"layer_types: {FULL!r} beside sliding_window {window}; each layer of such a network has it"
            )
        kinds = [SLIDING] * min(count, _MOST)
    if SLIDING not in kinds:
        return {"sliding_window": None, "layer_types": []}
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ModelError(
            f"sliding_window: {window!r} is refused; the layers with a window need one of at least 1 token"
        )
    return {"sliding_window": window, "layer_types": kinds}


def _checked_kinds(layers: Any, count: Any, family: Family) -> list[str]:
    if not isinstance(layers, list) or not all(isinstance(kind, str) for kind in layers):
        raise ModelError(f"layer_types: {layers!r} is refused; it must be a list of names, one a layer")
    known = (FULL, LINEAR) if family.has_delta else (FULL,) if family.windows == "none" else (FULL, SLIDING)
    if any(kind not in known for kind in layers):
        raise ModelError(
            f"layer_types: {sorted(set(layers))} is not supported; every layer must be {' or '.join(map(repr, known))}"
        )
    if len(layers) != count:
        raise ModelError(f"layer_types: {len(layers)} entries are refused; num_hidden_layers is {count}")
    return layers


def _by_pattern(settings: Mapping[str, Any], family: Family, count: int) -> list[str]:
    """Every n-th layer sees all, the others a window."""
    return layers_by_pattern(_every("sliding_window_pattern", settings, family), min(count, _MOST))


def _with_delta(settings: Mapping[str, Any], family: Family, count: Any) -> list[str]:
    """Where some layers are gated delta nets: what `layer_types` says, else every n-th layer sees all."""
    if (layers := settings.get("layer_types")) is not None:
        kinds = _checked_kinds(layers, count, family)
    else:
        every = _every("full_attention_interval", settings, family)
        kinds = layers_by_pattern(every, min(count, _MOST), LINEAR) if isinstance(count, int) else []
    return kinds if LINEAR in kinds else []


def _every(key: str, settings: Mapping[str, Any], family: Family) -> int:
    """Each so many-th layer sees all tokens."""
    every = settings.get(key)
    every = family.defaults[key] if every is None else every
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ModelError(f"{key}: {every!r} is refused; it says that each so many-th layer sees all tokens")
    return every
