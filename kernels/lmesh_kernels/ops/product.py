"""A fused product with its adapters and its gradients: the inside of the training nodes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmesh_kernels.ops import low_rank
from lmesh_kernels.ops.dropout import Dropout
from lmesh_kernels.ops.linear import linear
from lmesh_kernels.ops.low_rank import LowRank, Passed
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
    dx, passed = product_pass_back(dy, thin, to)
    product_add_sums(dy, x, thin, passed, to)
    return dx


def product_pass_back(dy: Tensor, thin: Tensor, to: Product) -> tuple[Tensor, Passed | None]:
    """(the gradient of x [T, inputs], what `product_add_sums` reads): the half of the backward pass that needs no x."""
    dx = dy @ value(to.weight)
    return dx, None if to.low is None else low_rank.pass_back(dy, thin, to.low, to.dropout, dx)


def product_add_sums(dy: Tensor, x: Tensor, thin: Tensor, passed: Passed | None, to: Product) -> None:
    """The other half: adds the gradients of what is trained to their sums."""
    if isinstance(to.weight, Trained):
        to.weight.add_product(dy.t(), x)
    if isinstance(to.bias, Trained):
        to.bias.add(dy.sum(dim=0, dtype=torch.float32))
    if to.low is not None and passed is not None:
        low_rank.add_sums(dy, x, thin, passed, to.low)
