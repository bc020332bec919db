"""The node after attention in a layer's training pass: the output projection, added to the residual stream."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmesh_kernels.ops.dora import adapted_linear
from lmesh_kernels.ops.product import Product, product, product_backward


class _AttnOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, attended: Tensor, total: Tensor, to: Product) -> Tensor:  # noqa: ANN401
        out, thin = product(attended, to, residual=total)
        ctx.save_for_backward(attended, thin)
        ctx.to = to
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: ANN401
        attended, thin = ctx.saved_tensors
        return product_backward(dout, attended, thin, ctx.to), dout, None


def attn_out_train(attended: Tensor, total: Tensor, to: Product) -> Tensor:
    """total [T, hidden] plus the projection of attended [T, q]."""
    if to.unfused:
        return attn_out_reference(attended, total, to)
    out: Tensor = _AttnOut.apply(attended, total, to)  # type: ignore[no-untyped-call]
    return out


def attn_out_reference(attended: Tensor, total: Tensor, to: Product) -> Tensor:
    """As `attn_out_train`, composed of torch's operations."""
    return total + adapted_linear(attended, to.weight, to.bias, to.low, to.dropout)
