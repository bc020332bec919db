"""The first node of a layer's training pass: norm of the residual stream, and the fused projection to q, k and v.

Kept for the backward pass: the stream, a number a row, and the adapters' thin products. The normed rows are made
again there: a pass over memory, where keeping them would cost as much as the stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmesh_kernels.ops.dora import adapted_linear
from lmesh_kernels.ops.product import Product, product, product_backward
from lmesh_kernels.ops.rms_norm import inverse_rms, rms_norm_backward, rms_norm_train, scaled
from lmesh_kernels.ops.trained import Weight, value


class _Qkv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, norm: Weight, eps: float, to: Product) -> Tensor:  # noqa: ANN401
        rstd = inverse_rms(total, eps)
        qkv, thin = product(scaled(total, rstd, value(norm)), to)
        ctx.save_for_backward(total, rstd, thin)
        ctx.norm, ctx.to = norm, to
        return qkv

    @staticmethod
    def backward(ctx: Any, dqkv: Tensor) -> tuple[Tensor, None, None, None]:  # noqa: ANN401
        total, rstd, thin = ctx.saved_tensors
        x = scaled(total, rstd, value(ctx.norm))
        dx = product_backward(dqkv, x, thin, ctx.to)
        return rms_norm_backward(dx, total, rstd, ctx.norm), None, None, None


def qkv_train(total: Tensor, norm: Weight, eps: float, to: Product) -> Tensor:
    """total [T, hidden], the residual stream; norm [hidden]. Returns [T, q + k + v], which may be overwritten."""
    if to.unfused:
        return qkv_reference(total, norm, eps, to)
    qkv: Tensor = _Qkv.apply(total, norm, eps, to)  # type: ignore[no-untyped-call]
    return qkv


def qkv_reference(total: Tensor, norm: Weight, eps: float, to: Product) -> Tensor:
    """As `qkv_train`, composed of torch's operations."""
    return adapted_linear(rms_norm_train(total, norm, eps), to.weight, to.bias, to.low, to.dropout)
