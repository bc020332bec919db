"""What a decoder is made of: `ModelConfig`, read by `load_config` from a model's files or refused by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lmesh_kernels.text.resolve import ModelFiles

Quantisation = Literal["none", "nf4"]
"""How the weights of the layers' products are held: as in the checkpoint's dtype, or in NF4 (see `quant.nf4`)."""
LoadFormat = Literal["auto", "dummy"]
"""Where weights come from: the checkpoint, or (dummy) a random generator, for measuring without one."""
RopeType = Literal["default", "linear", "llama3", "yarn"]


class UnsupportedModelError(ValueError):
    """A model, or a feature of one, that this code does not compute; `reason` is UPPER_SNAKE."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: base and how it is stretched. Fields a type does not use keep their defaults."""

    type: RopeType = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_max_position: int = 0  # llama3, yarn: the context the model was trained at first
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn: scale of cos and sin; None derives it from factor
    mscale: float = 0.0  # yarn
    mscale_all_dim: float = 0.0  # yarn
    truncate: bool = True  # yarn: correction range rounded to whole dimensions
    frequency_divisors: tuple[float, ...] = ()  # GGUF's rope_freqs: llama3's stretch, already worked out


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape and features of one decoder."""

    architecture: str  # llama | qwen2 | qwen3
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_word_embeddings: bool = False
    attention_bias: bool = False  # on q, k, v
    output_bias: bool = False  # on the attention's output projection
    mlp_bias: bool = False
    qk_norm: bool = False  # RMS norm of each head's q and k before the rotation
    torch_dtype: str = "float32"  # of the checkpoint
    quantisation: Quantisation = "none"  # of the checkpoint

    @property
    def q_size(self) -> int:
        """Width of q."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Width of k, and of v."""
        return self.num_kv_heads * self.head_dim


def load_config(files: ModelFiles) -> ModelConfig:
    """The config of a resolved model, HF folder or GGUF file.

    Raises UnsupportedModelError, naming the architecture or feature that is not computed here.
    """
    if files.format == "gguf":
        from lmesh_kernels.models.gguf import gguf_config

        return gguf_config(files.path)
    from lmesh_kernels.models.hf_config import hf_config

    return hf_config(files.path)
