"""What a model takes of a device's memory, known before anything is allocated: lines of the memory plan."""

from __future__ import annotations

import torch

from lmesh_kernels.layers.linear import Linear
from lmesh_kernels.models.config import ModelConfig, Quantisation
from lmesh_kernels.models.decoder import Decoder
from lmesh_kernels.ops.attention_plan import CPU_GROUP_BYTES, PIECE_ROWS
from lmesh_kernels.ops.device_attention import room_bytes
from lmesh_kernels.ops.prompt_attention import STEP
from lmesh_kernels.quant.nf4_matrix import Nf4Matrix


def parameter_bytes(config: ModelConfig, dtype: torch.dtype, quantisation: Quantisation = "none") -> int:
    """Bytes of the weight arena, of quantised weights beside it, and of the rotation table."""
    # Laid out on the meta device by the same code, so the two cannot disagree.
    shapes = Decoder(config, dtype=dtype, device=torch.device("meta"), quantisation=quantisation)
    products = [m for m in shapes.modules() if isinstance(m, Linear) and m.quantised is not None]
    quantised = sum(Nf4Matrix.planned_bytes(m.outputs, m.inputs) for m in products)
    rotations = shapes.rotations.numel() * shapes.rotations.dtype.itemsize
    return shapes.arena.numel() * dtype.itemsize + quantised + rotations


def unfolded_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that unfolding the largest quantised product takes for a moment: its codes, scales and values."""
    largest = max(2 * config.intermediate_size, config.q_size + 2 * config.kv_size) * config.hidden_size
    return largest * (8 + 4 + 4 + 2 * dtype.itemsize)


def packed_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes that `Decoder.pack` adds at most: every product's weights once more."""
    shapes = Decoder(config, dtype=dtype, device=torch.device("meta"))
    linears = sum(m.outputs * m.inputs for m in shapes.modules() if isinstance(m, Linear))
    return (linears + config.vocab_size * config.hidden_size) * dtype.itemsize


def activation_bytes(
    config: ModelConfig, max_tokens: int, max_seqs: int, dtype: torch.dtype, *, device_type: str = "cpu"
) -> int:
    """Most bytes a step of max_tokens tokens and max_seqs sequences holds at once, sampling included.

    An upper bound: the largest moment of a layer, the logits and what sampling makes of them, and attention's own.
    """
    return max(
        _layer_bytes(config, max_tokens, dtype) + _attention_bytes(config, max_tokens, dtype, device_type),
        max_tokens * config.hidden_size * dtype.itemsize + _sampling_bytes(config, max_seqs, dtype, device_type),
    )


def _layer_bytes(config: ModelConfig, max_tokens: int, dtype: torch.dtype) -> int:
    """The residual stream with its float32 temporaries, and the wider of the attention's and the MLP's insides."""
    hidden = config.hidden_size * (3 * dtype.itemsize + 3 * 4)
    # qkv; the float32 halves, products and result of rotating q and k; attention's output and its copy.
    attention = (2 * config.q_size + 2 * config.kv_size) * dtype.itemsize * 2 + (config.q_size + config.kv_size) * 4 * 4
    mlp = 3 * config.intermediate_size * dtype.itemsize
    rotation = config.head_dim * 4
    return max_tokens * (hidden + max(attention, mlp) + rotation)


def _attention_bytes(config: ModelConfig, max_tokens: int, dtype: torch.dtype, device_type: str) -> int:
    """On a CPU gathered K and V of the longest sequence, or of one group of decodes, and the mask of one piece.

    On an accelerator the room for parts, and a whole prompt's q, k, v and output, filled up to a round length.
    """
    if device_type != "cpu":
        prompt = (max_tokens + STEP) * (2 * config.q_size + 2 * config.kv_size) * dtype.itemsize
        return room_bytes(config.num_heads, config.head_dim) + prompt
    longest = 2 * config.max_position_embeddings * config.kv_size * dtype.itemsize
    mask = min(max_tokens, PIECE_ROWS) * config.max_position_embeddings * dtype.itemsize
    return max(longest, CPU_GROUP_BYTES) + mask


def _sampling_bytes(config: ModelConfig, max_seqs: int, dtype: torch.dtype, device_type: str) -> int:
    """Logits in the model's dtype and float32; adjusted, tempered, sorted with indices, their mass, and the noise.

    On an accelerator the sampler copies nothing of the vocabulary's size: what is left are log-probabilities' sums.
    """
    return max_seqs * config.vocab_size * (dtype.itemsize + (4 * 8 + 8 if device_type == "cpu" else 4 * 4))
