"""`ModelConfig` from a Hugging Face folder's config.json, in its older and newer spellings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lmesh_kernels.models.config import ModelConfig, RopeConfig, UnsupportedModelError

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# Keys of the rope parameters that this code reads, or that change nothing; any other is refused by name.
ROPE_KEYS = {
    *("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "partial_rotary_factor"),
    *("low_freq_factor", "high_freq_factor"),
    *("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
}


def hf_config(folder: Path) -> ModelConfig:
    """The config in `folder`/config.json. Raises UnsupportedModelError naming what is not computed here."""
    path = folder / "config.json"
    if not path.is_file():
        raise UnsupportedModelError("CONFIG_MISSING", f"{folder} has no config.json")
    return config_from_dict(json.loads(path.read_text()))


def config_from_dict(raw: dict[str, Any]) -> ModelConfig:
    """The config from config.json's object."""
    family = _family(raw)
    _refuse_features(raw)
    heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
    bias = bool(raw.get("attention_bias", False))
    return ModelConfig(
        architecture=family,
        vocab_size=int(raw["vocab_size"]),
        hidden_size=hidden,
        intermediate_size=int(raw["intermediate_size"]),
        num_layers=int(raw["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=_head_dim(raw, family, hidden // heads),
        rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
        max_position_embeddings=_max_positions(raw),
        rope=_rope(raw),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        attention_bias=True if family == "qwen2" else bias,
        output_bias=False if family == "qwen2" else bias,
        mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        torch_dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
        quantisation="nf4" if raw.get("quantization_config") else "none",
    )


def _family(raw: dict[str, Any]) -> str:
    family = raw.get("model_type")
    named = raw.get("architectures") or [ARCHITECTURES.get(str(family), "")]
    if family not in ARCHITECTURES or named != [ARCHITECTURES[family]]:
        supported = ", ".join(ARCHITECTURES.values())
        what = f"architecture {named} (model_type {family!r})"
        raise UnsupportedModelError("UNSUPPORTED_ARCHITECTURE", f"{what} is not supported; supported: {supported}")
    return str(family)


def _head_dim(raw: dict[str, Any], family: str, derived: int) -> int:
    # Qwen3's published default is 128 whatever the hidden size; Qwen2's code knows no head_dim of its own.
    return int(raw.get("head_dim") or (128 if family == "qwen3" else derived))


def _refuse_features(raw: dict[str, Any]) -> None:
    """Refuse what would change the result and is not computed."""
    activation = raw.get("hidden_act", "silu")
    if activation != "silu":
        raise UnsupportedModelError("UNSUPPORTED_ACTIVATION", f"hidden_act {activation!r} is not supported: only silu")
    told = raw.get("quantization_config")
    if told and not _is_nf4(told):
        method = told.get("quant_method", "unnamed")
        raise UnsupportedModelError(
            "UNSUPPORTED_QUANTIZATION",
            f"quantization_config ({method}) is not supported: load unquantised, bitsandbytes' NF4, or GGUF",
        )
    _refuse_sliding_window(raw)


def _is_nf4(told: dict[str, Any]) -> bool:
    """Whether a quantization_config is bitsandbytes' with 4-bit NF4 weights, its statistics quantised or not."""
    method, kind = told.get("quant_method", "bitsandbytes"), told.get("bnb_4bit_quant_type")
    return bool(method == "bitsandbytes" and told.get("load_in_4bit", told.get("_load_in_4bit")) and kind == "nf4")


def _refuse_sliding_window(raw: dict[str, Any]) -> None:
    """A window at least as long as the context hides nothing; a shorter one does."""
    window, layers = raw.get("sliding_window"), int(raw["num_hidden_layers"])
    if not raw.get("use_sliding_window"):
        window = None
    first = int(raw.get("max_window_layers", 28))
    kinds = raw.get("layer_types") or ["full_attention" if i < first else "sliding_attention" for i in range(layers)]
    unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if unknown:
        raise UnsupportedModelError("UNSUPPORTED_LAYER_TYPE", f"layer_types {unknown} are not supported")
    if window is not None and "sliding_attention" in kinds and window < int(raw["max_position_embeddings"]):
        raise UnsupportedModelError(
            "UNSUPPORTED_SLIDING_WINDOW", f"sliding_window {window}, shorter than the context, is not supported"
        )


def _rope_parameters(raw: dict[str, Any]) -> dict[str, Any]:
    """One dictionary, whether the file has `rope_parameters` or `rope_scaling` with `rope_theta` beside it."""
    parameters = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    parameters.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    if raw.get("partial_rotary_factor") is not None:
        parameters.setdefault("partial_rotary_factor", raw["partial_rotary_factor"])
    return parameters


def _rope(raw: dict[str, Any]) -> RopeConfig:
    given = _rope_parameters(raw)
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise UnsupportedModelError(
            "UNSUPPORTED_ROPE", f"rope_type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}"
        )
    unknown = sorted(set(given) - ROPE_KEYS)
    if unknown or given.get("partial_rotary_factor", 1.0) != 1.0:
        named = unknown or [f"partial_rotary_factor={given['partial_rotary_factor']}"]
        raise UnsupportedModelError("UNSUPPORTED_ROPE", f"rope parameters {named} are not supported")
    return _rope_of(kind, given, raw)


def _rope_of(kind: str, given: dict[str, Any], raw: dict[str, Any]) -> RopeConfig:
    factor = given.get("factor")
    original = raw.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
    original = int(original or raw["max_position_embeddings"])
    if kind in ("linear", "llama3", "yarn") and factor is None:
        raise UnsupportedModelError("UNSUPPORTED_ROPE", f"rope_type {kind!r} needs a factor")
    attention = given.get("attention_factor")
    return RopeConfig(
        type=kind,  # type: ignore[arg-type] # one of ROPE_TYPES
        theta=float(given["rope_theta"]),
        factor=float(factor or 1.0),
        original_max_position=original,
        low_freq_factor=float(given.get("low_freq_factor", 1.0)),
        high_freq_factor=float(given.get("high_freq_factor", 4.0)),
        beta_fast=float(given.get("beta_fast") or 32),
        beta_slow=float(given.get("beta_slow") or 1),
        attention_factor=None if attention is None else float(attention),
        mscale=float(given.get("mscale") or 0),
        mscale_all_dim=float(given.get("mscale_all_dim") or 0),
        truncate=bool(given.get("truncate", True)),
    )


def _max_positions(raw: dict[str, Any]) -> int:
    """The declared context; under yarn at least what the stretch was made for, which some configs leave undeclared."""
    declared = int(raw["max_position_embeddings"])
    given = _rope_parameters(raw)
    if (given.get("rope_type") or given.get("type")) != "yarn" or not given.get("factor"):
        return declared
    original = given.get("original_max_position_embeddings") or declared
    return max(declared, int(original * given["factor"]))
