"""Adapters on slices of a fused product: y[:, start:start+outputs] += scale * (x @ a.T) @ b.T, and its gradients.

The a of all sites of one product lie in one matrix, so that x is read once for all of them. The d x f gradient of
the weight is never formed: da = (scale * dy @ b).T @ x.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmesh_kernels.ops.dropout import Dropout
from lmesh_kernels.ops.trained import Trained, Weight, value


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """One site of a product."""

    site: int  # its number in the model: what tells dropout's masks apart
    start: int  # first column of its slice of y
    first: int  # first row of its a in the product's
    b: Weight  # [outputs, rank]
    scale: float
    magnitude: Weight | None = None  # [outputs]; DoRA's, which `ops.dora` and `ops.segmented_lora` compute

    @property
    def columns(self) -> slice:
        """Of y."""
        return slice(self.start, self.start + value(self.b).shape[0])

    @property
    def ranks(self) -> slice:
        """Of x @ a.T, and rows of a."""
        return slice(self.first, self.first + value(self.b).shape[1])


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRank:
    """The adapters of one fused product."""

    a: Weight  # [ranks of all parts, inputs]
    parts: tuple[Part, ...]

    @property
    def has_magnitudes(self) -> bool:
        """Whether one of them is a DoRA."""
        return any(part.magnitude is not None for part in self.parts)


def inner(x: Tensor, low: LowRank, dropout: Dropout | None) -> Tensor:
    """x [T, inputs] times a, [T, ranks]; with dropout each site drops elements of its own."""
    if dropout is None:
        return x @ value(low.a).t()
    out = x.new_empty(x.shape[0], value(low.a).shape[0])
    for part in low.parts:
        torch.mm(dropout.apply(x, part.site), value(low.a)[part.ranks].t(), out=out[:, part.ranks])
    return out


def add_outer_(y: Tensor, u: Tensor, low: LowRank) -> None:
    """Adds the adapters' products to y [T, all outputs], in place; u is what `inner` gave."""
    for part in low.parts:
        columns = y[:, part.columns]
        torch.addmm(columns, u[:, part.ranks], value(part.b).t(), alpha=part.scale, out=columns)


@dataclass(frozen=True, slots=True, eq=False)
class Passed:
    """What `pass_back` made and `add_sums` reads."""

    du: Tensor  # [T, ranks], the gradient of `inner`
    masks: tuple[Tensor, ...]  # dropout's factors of x, a part


def pass_back(dy: Tensor, u: Tensor, low: LowRank, dropout: Dropout | None, dx: Tensor) -> Passed:
    """Adds what the adapters pass on to dx [T, inputs], in place. Does not need their input."""
    du, a = torch.empty_like(u), value(low.a)
    for part in low.parts:
        du[:, part.ranks] = (dy[:, part.columns] @ value(part.b)).mul_(part.scale)
    if dropout is None:
        dx.addmm_(du, a)
        return Passed(du, ())
    masks = tuple(dropout.mask(dx, part.site) for part in low.parts)
    for part, mask in zip(low.parts, masks, strict=True):
        dx.add_((du[:, part.ranks] @ a[part.ranks]).mul_(mask))
    return Passed(du, masks)


def add_sums(dy: Tensor, x: Tensor, u: Tensor, passed: Passed, low: LowRank) -> None:
    """Adds the factors' gradients to their sums."""
    for part in low.parts:
        # The scale is applied to the thin factor, not to the wide gradient.
        if isinstance(part.b, Trained):
            part.b.add_product(dy[:, part.columns].t(), u[:, part.ranks] * part.scale)
    if not isinstance(low.a, Trained):
        return
    if not passed.masks:
        low.a.add_product(passed.du.t(), x)
    for part, mask in zip(low.parts, passed.masks, strict=False):
        low.a.grad[part.ranks].add_(passed.du[:, part.ranks].t().float() @ (x * mask).float())
