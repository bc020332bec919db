"""The whole feed-forward block as one node of a training pass: norm, gate and up, silu * mul, down, residual.

Kept for the backward pass: the stream, a number a row, gate and up before the activation, and the adapters' thin
products. The activated product is made again where its gradient is, and gate and up are overwritten by theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from lmesh_kernels.ops.dora import adapted_linear
from lmesh_kernels.ops.product import Product, product, product_add_sums, product_backward, product_pass_back
from lmesh_kernels.ops.rms_norm import inverse_rms, rms_norm_backward, rms_norm_train, scaled
from lmesh_kernels.ops.silu_mul import silu_mul_backward_, silu_mul_train
from lmesh_kernels.ops.trained import Weight, value


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, norm: Weight, eps: float, wide: Product, down: Product) -> Tensor:  # noqa: ANN401
        rstd = inverse_rms(total, eps)
        gate_up, thin = product(scaled(total, rstd, value(norm)), wide)
        out, thin_down = product(silu_mul_train(gate_up), down, residual=total)
        ctx.save_for_backward(total, rstd, gate_up, thin, thin_down)
        ctx.norm, ctx.wide, ctx.down = norm, wide, down
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, None, None, None, None]:  # noqa: ANN401
        total, rstd, gate_up, thin, thin_down = ctx.saved_tensors
        dhidden, passed = product_pass_back(dout, thin_down, ctx.down)
        product_add_sums(dout, silu_mul_backward_(dhidden, gate_up), thin_down, passed, ctx.down)
        dx = product_backward(gate_up, scaled(total, rstd, value(ctx.norm)), thin, ctx.wide)
        return rms_norm_backward(dx, total, rstd, ctx.norm, add=dout), None, None, None, None


def mlp_train(total: Tensor, norm: Weight, eps: float, wide: Product, down: Product) -> Tensor:
    """total [T, hidden] plus down(silu(gate) * up) of its norm; `wide` gives gate, then up."""
    if wide.unfused or down.unfused:
        return mlp_reference(total, norm, eps, wide, down)
    out: Tensor = _Mlp.apply(total, norm, eps, wide, down)  # type: ignore[no-untyped-call]
    return out


def mlp_reference(total: Tensor, norm: Weight, eps: float, wide: Product, down: Product) -> Tensor:
    """As `mlp_train`, composed of torch's operations."""
    x = rms_norm_train(total, norm, eps)
    gate, up = adapted_linear(x, wide.weight, wide.bias, wide.low, wide.dropout).chunk(2, dim=-1)
    return total + adapted_linear(silu(gate) * up, down.weight, down.bias, down.low, down.dropout)
