"""Root-mean-square norm, with the residual addition that precedes it in a decoder layer."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Norm of x (+ residual) over the last dimension, scaled by weight.

    x, residual [..., D]; weight [D]. The mean square is taken in float32.
    Returns (normed, sum): sum is x + residual, or x itself without a residual: the next residual.
    """
    return rms_norm_reference(x, weight, eps, residual)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `rms_norm`, in plain torch."""
    total = x if residual is None else x + residual
    wide = total.float()
    scale = torch.rsqrt(wide.pow(2).mean(dim=-1, keepdim=True) + eps)
    # Rounded to x's dtype before the weight, as the checkpoints' own code does.
    return weight * (wide * scale).to(x.dtype), total
