"""A tensor under training: the value that the forward pass reads, and the float32 sum of its gradients.

The nodes of a training pass add to the sum themselves, in the backward pass. So gradients are summed in float32
whatever the dtype of the pass, no second copy of them is made to be added, and a whole run's sums can lie in one
allocation that is cleared, measured and reduced over ranks at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lmesh_kernels.quant.nf4_matrix import Nf4Matrix


@dataclass(frozen=True, slots=True, eq=False)
class Trained:
    """`value` in the dtype of the pass, and `grad`, float32 of the same shape."""

    value: Tensor
    grad: Tensor

    def add(self, gradient: Tensor) -> None:
        """Adds a gradient of the value's shape."""
        self.grad.add_(gradient)

    def add_product(self, left: Tensor, right: Tensor) -> None:
        """Adds left [m, k] @ right [k, n] to a sum of [m, n], without the product in between where dtypes allow."""
        add_product_(self.grad, left, right)


Weight = Tensor | Trained | Nf4Matrix
"""What a product reads: frozen, under training, or frozen and quantised."""


def add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total [m, n] float32 += left [m, k] @ right [k, n], whose products are summed in float32."""
    if left.dtype == torch.float32:
        total.addmm_(left, right)
    elif left.device.type == "cuda":
        total.add_(torch.mm(left, right, out_dtype=torch.float32))
    else:
        total.add_(left.float() @ right.float())


def value(weight: Weight) -> Tensor:
    """The tensor to compute with; a quantised one is unfolded each time, and lives as long as it is held."""
    if isinstance(weight, Nf4Matrix):
        return weight.dense()
    return weight.value if isinstance(weight, Trained) else weight


class _Tracked(torch.autograd.Function):
    """Lets autograd reach a `Trained`: the value, whose gradient is added to the sum."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, trained: Trained) -> Tensor:  # noqa: ANN401 - autograd's context has no type
        ctx.trained = trained
        return trained.value.view_as(trained.value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None]:  # noqa: ANN401
        ctx.trained.add(gradient)
        return None, None


def tracked(weight: Weight) -> Tensor:
    """The tensor for a composition of torch's own operations, which autograd differentiates."""
    if not isinstance(weight, Trained):
        return value(weight)
    anchor = torch.empty(0, device=weight.value.device, requires_grad=True)
    tensor: Tensor = _Tracked.apply(anchor, weight)  # type: ignore[no-untyped-call]
    return tensor
