"""Model shapes for measuring on random weights, from the families' published config.json values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        **_LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-8b": {
        **_LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 1000000,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": False,
    },
    # No model's: small enough that a CPU runs a benchmark from end to end, as their tests do.
    "tiny": {
        **_LLAMA,
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
}


def save_shape(folder: Path, name: str, *, tokenizer: bool) -> Path:
    """A model folder without weights: config.json and, for a mesh, a tokenizer of the vocabulary's size."""
    folder.mkdir(parents=True, exist_ok=True)
    shape = SHAPES[name]
    (folder / "config.json").write_text(json.dumps(shape))
    if tokenizer:
        made_up_tokenizer(shape["vocab_size"]).save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return folder


def made_up_tokenizer(size: int) -> Tokenizer:
    """`size` tokens: the 256 bytes, then made-up words of a few letters, so that every id decodes to some text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [f"\u0120{_letters(i)}" for i in range(size - len(alphabet))]  # that sign is the byte level's space
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*alphabet, *words])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _letters(number: int) -> str:
    """A number written in letters, two at least."""
    text = ""
    while number or len(text) < 2:
        number, digit = divmod(number, 26)
        text = chr(ord("a") + digit) + text
    return text
