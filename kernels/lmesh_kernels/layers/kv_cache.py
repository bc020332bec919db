"""The paged KV cache: one allocation, cut into blocks that the engine hands to sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from lmesh_kernels.models.config import ModelConfig


class KVCache:
    """Keys and values of every layer, [layers, 2, num_blocks, block_size, kv_heads, head_dim]."""

    LAYOUT = "nhd"  # of a layer's keys or values in a block: place, head, element; part of the block hashes' root

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.group = config.num_heads // config.num_kv_heads  # query heads that read one key head
        shape = (config.num_layers, 2, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        # Zeroed: readers mask what lies past a sequence's end, and 0 * uninitialised may be NaN.
        self.data = torch.zeros(shape, dtype=dtype, device=device)

    @staticmethod
    def bytes_per_block(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
        """Bytes one block takes over all layers, keys and values."""
        return 2 * config.num_layers * block_size * config.kv_size * dtype.itemsize

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """(keys, values) of one layer, each [num_blocks, block_size, kv_heads, head_dim], views."""
        return self.data[index, 0], self.data[index, 1]

    def copy_block(self, source: int, target: int) -> None:
        """Copy one block in all layers, for a sequence that is about to write into a block it shares."""
        self.data[:, :, target].copy_(self.data[:, :, source])
