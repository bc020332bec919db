"""A fused product with its adapters and its gradients: the inside of the training nodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmesh_kernels.ops import low_rank
from lmesh_kernels.ops.dropout import Dropout
from lmesh_kernels.ops.linear import linear
from lmesh_kernels.ops.low_rank import LowRank
from lmesh_kernels.ops.trained import Trained, Weight, value


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Product:
    """x @ weight.T + bias, plus what adapters add at slices of the output."""

    weight: Weight  # [outputs, inputs]
    bias: Weight | None = None  # [outputs]
    low: LowRank | None = None
    dropout: Dropout | None = None  # of what the adapters read
    packed: Tensor | None = None  # `ops.linear.pack` of a frozen weight

    @property
    def unfused(self) -> bool:
        """Whether it takes the composed form: DoRA."""
        return self.low is not None and self.low.has_magnitudes


def product(x: Tensor, to: Product, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(y [T, outputs] (+ residual), the adapters' thin product that `product_backward` reads)."""
    weight, bias = value(to.weight), None if to.bias is None else value(to.bias)
    if residual is None:
        y = linear(x, weight, bias, to.packed)
    else:
        y = torch.addmm(residual, x, weight.t())
        if bias is not None:
            y += bias
    if to.low is None:
        return y, x.new_empty(0)
    thin = low_rank.inner(x, to.low, to.dropout)
    low_rank.add_outer_(y, thin, to.low)
    return y, thin


def product_backward(dy: Tensor, x: Tensor, thin: Tensor, to: Product) -> Tensor:
    """Adds the gradients of what is trained to their sums; returns that of x [T, inputs]."""
    dx = dy @ value(to.weight)
    if isinstance(to.weight, Trained):
        to.weight.add_product(dy.t(), x)
    if isinstance(to.bias, Trained):
        to.bias.add(dy.sum(dim=0, dtype=torch.float32))
    if to.low is not None:
        low_rank.backward(dy, x, thin, to.low, to.dropout, dx)
    return dx
