"""A projection whose weights are buffers: filled in place when a model loads, and never by gradient here."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmesh_kernels.layers.norm import RMSNorm
from lmesh_kernels.ops.gated_linear import norm_gated_linear
from lmesh_kernels.ops.linear import linear, pack
from lmesh_kernels.ops.norm_linear import norm_linear
from lmesh_kernels.ops.segmented_lora import NO_ADAPTERS, AdapterRows, add_adapters_
from lmesh_kernels.ops.silu_mul import silu_mul
from lmesh_kernels.quant.nf4_matrix import Nf4Matrix


class Linear(nn.Module):
    """y = x @ weight.T + bias; fused projections are one of these with their parts stacked by rows."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.inputs, self.outputs = inputs, outputs
        self.quantised: Nf4Matrix | None = None
        # Shapes only: the decoder lays all slots out in one allocation.
        self.register_buffer("weight", torch.empty(outputs, inputs, device="meta"))
        self.register_buffer("bias", torch.empty(outputs, device="meta") if bias else None)
        self._packed: Tensor | None = None
        self.batch_invariant = False  # a row's bits may not depend on how many others there are
        self.slot = ""  # its name in the decoder, by which adapters find it

    def quantise(self, dtype: torch.dtype, device: torch.device) -> None:
        """Gives the weight's slot up for a quantised matrix, still empty."""
        self.register_buffer("weight", None)
        self.quantised = Nf4Matrix(self.outputs, self.inputs, dtype, device)

    def pack(self) -> None:
        """Copies the weights into the fastest layout of their device, for every product from now on."""
        if self.weight is not None:
            self._packed = pack(self.weight)

    def matrix(self) -> Tensor:
        """The weights [outputs, inputs]; unfolded anew where they are quantised."""
        if self.quantised is not None:
            return self.quantised.dense()
        assert self.weight is not None
        return self.weight

    def forward(self, x: Tensor, adapters: AdapterRows = NO_ADAPTERS) -> Tensor:
        """x [T, inputs], and which of its rows have adapters; returns [T, outputs]."""
        y = linear(x, self.matrix(), self.bias, self._packed, batch_invariant=self.batch_invariant)
        if adapters:
            add_adapters_(y, x, self.slot, adapters, self.bias)
        return y

    def after_norm(
        self, x: Tensor, residual: Tensor | None, norm: RMSNorm, adapters: AdapterRows = NO_ADAPTERS
    ) -> tuple[Tensor, Tensor]:
        """The product of norm(x + residual), and x + residual [T, inputs]: in as few launches as the device can."""
        if adapters:
            normed, total = norm.forward(x, residual)
            return self.forward(normed, adapters), total
        weights = (self.matrix(), self.bias, self._packed)
        return norm_linear(x, residual, norm.weight, norm.eps, *weights, batch_invariant=self.batch_invariant)

    def gated_after_norm(
        self, x: Tensor, residual: Tensor | None, norm: RMSNorm, adapters: AdapterRows = NO_ADAPTERS
    ) -> tuple[Tensor, Tensor]:
        """silu(first half) * second half [T, outputs / 2] of `after_norm`'s product, and x + residual."""
        if adapters:  # they add to both halves before the activation
            y, total = self.after_norm(x, residual, norm, adapters)
            return silu_mul(y), total
        weights = (self.matrix(), self.bias, self._packed)
        return norm_gated_linear(x, residual, norm.weight, norm.eps, *weights, batch_invariant=self.batch_invariant)
