"""A projection whose weights are buffers: filled in place when a model loads, and never by gradient here."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lmesh_kernels.ops.linear import linear, pack
from lmesh_kernels.ops.segmented_lora import AdapterRows, add_adapters_


class Linear(nn.Module):
    """y = x @ weight.T + bias; fused projections are one of these with their parts stacked by rows."""

    weight: Tensor
    bias: Tensor | None

    def __init__(self, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        # Shapes only: the decoder lays all slots out in one allocation.
        self.register_buffer("weight", torch.empty(outputs, inputs, device="meta"))
        self.register_buffer("bias", torch.empty(outputs, device="meta") if bias else None)
        self._packed: Tensor | None = None
        self.slot = ""  # its name in the decoder, by which adapters find it

    def pack(self) -> None:
        """Copies the weights into the fastest layout of their device, for every product from now on."""
        self._packed = pack(self.weight)

    def forward(self, x: Tensor, adapters: AdapterRows = ()) -> Tensor:
        """x [T, inputs], and which of its rows have adapters; returns [T, outputs]."""
        y = linear(x, self.weight, self.bias, self._packed)
        if adapters:
            add_adapters_(y, x, self.slot, adapters, self.bias)
        return y
