"""Root-mean-square norm, with the residual addition that precedes it in a decoder layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmesh_kernels.ops.backend import takes_triton
from lmesh_kernels.ops.row_blocks import row_blocks
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
    if x.dtype != torch.float32:
        return weight * (x.float() * rstd).to(x.dtype)
    out = torch.empty_like(x)
    for rows in row_blocks(out, 2):
        torch.mul(x[rows], rstd[rows], out=out[rows]).mul_(weight)
    return out


def rms_norm_backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Weight, add: Tensor | None = None) -> Tensor:
    """The gradient of x [..., D] (+ add); adds the weight's to its sum where it is trained. May overwrite dy.

    With n = x * rstd and g = dy * weight: dx = rstd * (g - n * mean(g * n)).
    """
    wide, direct = x.float(), dy.float()
    if isinstance(weight, Trained):
        weight.add((direct * wide).mul_(rstd).flatten(0, -2).sum(dim=0))
    for rows in row_blocks(direct, 4):
        part, read, scale = direct[rows].mul_(value(weight)), wide[rows], rstd[rows]
        inner = torch.linalg.vecdot(part, read).unsqueeze(-1)
        # rstd * g - x * (rstd^3 * inner / D)
        along = scale.pow(3).mul_(inner).mul_(-1.0 / x.shape[-1])
        part.mul_(scale).addcmul_(read, along)
        if add is not None and x.dtype == torch.float32:
            part.add_(add[rows])
    out = direct.to(x.dtype)
    return out if add is None or x.dtype == torch.float32 else out.add_(add)


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
