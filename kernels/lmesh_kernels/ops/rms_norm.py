"""Root-mean-square norm, with the residual addition that precedes it in a decoder layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmesh_kernels.ops.backend import takes_triton
from lmesh_kernels.ops.trained import Trained, Weight, value


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Norm of x (+ residual) over the last dimension, scaled by weight.

    x, residual [..., D]; weight [D]. The mean square is taken in float32.
    Returns (normed, sum): sum is x + residual, or x itself without a residual: the next residual.
    """
    if takes_triton(x):
        from lmesh_kernels.ops.rms_norm_kernels import rms_norm_triton

        return rms_norm_triton(x, weight, eps, residual)
    return rms_norm_reference(x, weight, eps, residual)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `rms_norm`, in plain torch."""
    total = x if residual is None else x + residual
    wide = total.float()
    scale = torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    # Rounded to x's dtype before the weight, as the checkpoints' own code does.
    return weight * (wide * scale).to(x.dtype), total


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean of squares + eps) over the last dimension, [..., 1] float32: what the backward pass keeps."""
    if x.dtype == torch.float32:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().mul_(1.0 / x.shape[-1])
    else:
        squares = x.float().square_().mean(dim=-1, keepdim=True)
    rstd: Tensor = squares.add_(eps).rsqrt_()
    return rstd


def scaled(x: Tensor, rstd: Tensor, weight: Tensor) -> Tensor:
    """The normed x of `rstd` = `inverse_rms`(x), a new tensor."""
    return (x * rstd).to(x.dtype).mul_(weight) if x.dtype == torch.float32 else weight * (x.float() * rstd).to(x.dtype)


def rms_norm_backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Weight) -> Tensor:
    """The gradient of x [..., D]; adds the weight's to its sum where it is trained. May overwrite dy.

    With n = x * rstd and g = dy * weight: dx = rstd * (g - n * mean(g * n)).
    """
    wide, direct = x.float(), dy.float()
    if isinstance(weight, Trained):
        weight.add((direct * wide).mul_(rstd).flatten(0, -2).sum(dim=0))
    g = direct.mul_(value(weight)) if direct is dy else direct * value(weight)
    inner = torch.linalg.vecdot(g, wide).unsqueeze(-1)
    # rstd * g - x * (rstd^3 * inner / D)
    along = rstd.pow(3).mul_(inner).mul_(-1.0 / x.shape[-1])
    return g.mul_(rstd).addcmul_(wide, along).to(x.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Weight, eps: float) -> Tensor:  # noqa: ANN401 - no type of autograd's
        rstd = inverse_rms(x, eps)
        ctx.save_for_backward(x, rstd)
        ctx.weight = weight
        return scaled(x, rstd, value(weight))

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        x, rstd = ctx.saved_tensors
        return rms_norm_backward(dy.clone(), x, rstd, ctx.weight), None, None


def rms_norm_train(x: Tensor, weight: Weight, eps: float) -> Tensor:
    """As `rms_norm` without a residual, one node of a training pass; keeps x and a number a row."""
    normed: Tensor = _Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return normed
