"""The SwiGLU feed-forward block."""

from __future__ import annotations

from torch import Tensor, nn

from lmesh_kernels.layers.linear import Linear
from lmesh_kernels.models.config import ModelConfig
from lmesh_kernels.ops.segmented_lora import NO_ADAPTERS, AdapterRows
from lmesh_kernels.ops.silu_mul import silu_mul


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor, adapters: AdapterRows = NO_ADAPTERS) -> Tensor:
        """x [T, hidden], and which of its rows have adapters; returns [T, hidden]."""
        return self.down.forward(silu_mul(self.gate_up.forward(x, adapters)), adapters)
