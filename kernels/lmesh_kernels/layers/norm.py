"""RMS norm as a module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmesh_kernels.ops.rms_norm import rms_norm


class RMSNorm(nn.Module):
    """Norm over the hidden dimension, with the residual stream carried along."""

    weight: Tensor

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.empty(size, device="meta"))

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x, residual [T, size]; returns (norm of their sum, their sum)."""
        return rms_norm(x, self.weight, self.eps, residual)
