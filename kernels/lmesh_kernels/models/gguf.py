"""GGUF files: the config from their metadata, and their tensors dequantised under Hugging Face names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lmesh_kernels.models.config import ModelConfig, RopeConfig, RopeType, UnsupportedModelError
from lmesh_kernels.models.gguf_file import GgufFile, GgufTensor

ARCHITECTURES = ("llama", "qwen2", "qwen3")
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_DIVISORS = "rope_freqs.weight"  # read with the config
_LAYER = re.compile(r"^blk\.(\d+)\.(\w+)\.(weight|bias)$")


class Metadata:
    """A file's key-value pairs; keys of the architecture without its prefix."""

    def __init__(self, values: dict[str, Any]) -> None:
        self._values = values
        self.architecture = str(values.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:  # noqa: ANN401 - GGUF values are of many types
        """The architecture's value of `key`, or the default."""
        value = self._values.get(f"{self.architecture}.{key}")
        return default if value is None else value

    def need(self, key: str) -> Any:  # noqa: ANN401 - as above
        """The architecture's value of `key`; UnsupportedModelError where the file has none."""
        value = self.get(key)
        if value is None:
            raise UnsupportedModelError("GGUF_METADATA", f"GGUF file lacks {self.architecture}.{key}")
        return value


def gguf_config(path: Path) -> ModelConfig:
    """The config of a GGUF file. Raises UnsupportedModelError naming what is not computed here."""
    file = GgufFile(path)
    metadata = Metadata(file.metadata)
    if metadata.architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            "UNSUPPORTED_ARCHITECTURE",
            f"GGUF architecture {metadata.architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}",
        )
    _refuse_features(metadata)
    return _config(metadata, file.tensors)


def _refuse_features(metadata: Metadata) -> None:
    if metadata.get("expert_count", 0):
        raise UnsupportedModelError("UNSUPPORTED_EXPERTS", "mixture-of-experts GGUF files are not supported")
    window = metadata.get("attention.sliding_window", 0)
    if window and window < metadata.need("context_length"):
        raise UnsupportedModelError("UNSUPPORTED_SLIDING_WINDOW", f"sliding_window {window} is not supported")


def _config(metadata: Metadata, tensors: dict[str, GgufTensor]) -> ModelConfig:
    heads, hidden = int(metadata.need("attention.head_count")), int(metadata.need("embedding_length"))
    head_dim = int(metadata.get("attention.key_length", hidden // heads))
    if metadata.get("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedModelError("UNSUPPORTED_ROPE", "rope.dimension_count below the head's size is not supported")
    return ModelConfig(
        architecture=metadata.architecture,
        vocab_size=int(tensors["token_embd.weight"].shape[0]),
        hidden_size=hidden,
        intermediate_size=int(metadata.need("feed_forward_length")),
        num_layers=int(metadata.need("block_count")),
        num_heads=heads,
        num_kv_heads=int(metadata.get("attention.head_count_kv", heads)),
        head_dim=head_dim,
        rms_norm_eps=float(metadata.need("attention.layer_norm_rms_epsilon")),
        max_position_embeddings=int(metadata.need("context_length")),
        rope=_rope(metadata, tensors),
        tie_word_embeddings="output.weight" not in tensors,
        attention_bias="blk.0.attn_q.bias" in tensors,
        output_bias="blk.0.attn_output.bias" in tensors,
        mlp_bias="blk.0.ffn_gate.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
        torch_dtype=_stored_dtype(tensors),
    )


def _stored_dtype(tensors: dict[str, GgufTensor]) -> str:
    """Quantised weights unfold to float32; unquantised files keep their own."""
    kind = tensors["blk.0.ffn_up.weight"].kind.name
    return {"BF16": "bfloat16", "F16": "float16"}.get(kind, "float32")


def _rope(metadata: Metadata, tensors: dict[str, GgufTensor]) -> RopeConfig:
    named = str(metadata.get("rope.scaling.type", "none"))
    kinds: dict[str, RopeType] = {"none": "default", "linear": "linear", "yarn": "yarn"}
    if named not in kinds:
        raise UnsupportedModelError("UNSUPPORTED_ROPE", f"GGUF rope scaling {named!r} is not supported")
    divisors: tuple[float, ...] = ()
    if ROPE_DIVISORS in tensors:
        divisors = tuple(tensors[ROPE_DIVISORS].floats().tolist())
    return RopeConfig(
        type=kinds[named],
        theta=float(metadata.get("rope.freq_base", 10000.0)),
        factor=float(metadata.get("rope.scaling.factor", 1.0)),
        original_max_position=int(
            metadata.get("rope.scaling.original_context_length", metadata.need("context_length"))
        ),
        frequency_divisors=divisors,
    )


def read_gguf(path: Path, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face name and float tensor of each tensor in the file, dequantised one at a time.

    Names that have no Hugging Face counterpart come as they are, for the binding to refuse.
    """
    for stored in GgufFile(path).tensors.values():
        if stored.name == ROPE_DIVISORS:
            continue
        name = hf_name(stored.name)
        tensor = torch.from_numpy(stored.floats())
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
        # Only llama files pair neighbouring dimensions; the other families keep halves.
        if config.architecture == "llama" and heads:
            tensor = _halves(tensor, heads)
        yield name, tensor


def hf_name(name: str) -> str:
    """The Hugging Face name of a GGUF tensor, or the name itself where there is none."""
    match = _LAYER.match(name)
    if match and match[2] in LAYER_NAMES:
        return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.{match[3]}"
    return TOP_NAMES.get(name, name)


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from neighbouring pairs (0, 1), (2, 3).. to halves (0, d/2), (1, d/2 + 1).."""
    pairs = weight.view(heads, -1, 2, *weight.shape[1:])
    return pairs.transpose(1, 2).reshape(weight.shape)
