"""Tiny random checkpoints of the three families, every parameter (biases and norms too) drawn at random."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SHAPE = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 72,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1000.0, "factor": 3.0}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 24}
YARN_ALL = {
    **YARN,
    "beta_fast": 2.0,
    "beta_slow": 0.5,
    "truncate": False,
    "mscale": 1.5,
    "mscale_all_dim": 0.5,
}


@dataclass(frozen=True)
class Family:
    """One checkpoint's family and what its config changes of SHAPE."""

    name: str
    model_type: str
    overrides: dict[str, Any] = field(default_factory=dict)
    shards: bool = False


FAMILIES = (
    Family("llama-gqa-tied", "llama", {"tie_word_embeddings": True}),
    Family("llama-mha-biases-linear", "llama", {
        "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True, "rope_parameters": LINEAR,
    }),
    Family("llama-mqa-headdim-llama3", "llama", {
        "num_key_value_heads": 1, "head_dim": 20, "rope_parameters": LLAMA3,
    }),
    Family("llama-theta-sharded", "llama", {
        "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
    }, shards=True),
    Family("qwen2-tied-yarn", "qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    Family("qwen2-mha-sharded", "qwen2", {"num_key_value_heads": 4}, shards=True),
    Family("qwen3-headdim", "qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
    Family("qwen3-bias-yarn-all", "qwen3", {"head_dim": 32, "attention_bias": True, "rope_parameters": YARN_ALL}),
    Family("qwen3-yarn-factor", "qwen3", {
        "head_dim": 8, "rope_parameters": {**YARN, "attention_factor": 1.7},
    }),
)  # fmt: skip


def save_family(family: Family, folder: Path, *, seed: int = 0) -> Path:
    """Save the family's checkpoint to `folder`, in several shards where it says so; returns `folder`."""
    config_class, model_class = CLASSES[family.model_type]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SHAPE, **family.overrides}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.normal_(1.0, 0.3)
            else:
                parameter.normal_(0.0, 0.25)
    model.save_pretrained(folder, max_shard_size="40KB" if family.shards else "1GB")
    return folder


def load_peer(folder: Path, **options: Any) -> PreTrainedModel:
    """transformers' own float32 model of the same files, attention in its plainest form."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", **options
    ).eval()


@torch.no_grad()
def peer_logits(peer: PreTrainedModel, sequences: list[list[int]]) -> list[torch.Tensor]:
    """Logits of every token, sequence by sequence, without a cache."""
    return [peer(torch.tensor([ids]), use_cache=False).logits[0] for ids in sequences]
