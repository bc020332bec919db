"""The SwiGLU feed-forward block."""

from __future__ import annotations

from torch import Tensor, nn

from lmesh_kernels.layers.linear import Linear
from lmesh_kernels.layers.norm import RMSNorm
from lmesh_kernels.models.config import ModelConfig
from lmesh_kernels.ops.segmented_lora import NO_ADAPTERS, AdapterRows


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)), gate and up in one projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def after_norm(
        self, x: Tensor, residual: Tensor | None, norm: RMSNorm, adapters: AdapterRows = NO_ADAPTERS
    ) -> tuple[Tensor, Tensor]:
        """The block on norm(x + residual) [T, hidden], and x + residual; `adapters` are those of the rows."""
        active, total = self.gate_up.gated_after_norm(x, residual, norm, adapters)
        return self.down.forward(active, adapters), total
