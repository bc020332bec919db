"""Many adapters in one batch: each adds its own low-rank product to its own rows, whatever its rank.

The base's product is made once for all rows. Adapters are not padded to a common rank, and rows without an adapter
are not touched, so a batch of the base alone costs and gives what it did without adapters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmesh_kernels.ops.low_rank import LowRank, add_outer_, inner
from lmesh_kernels.ops.segmented_plan import SegmentPlan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ServedProduct:
    """An adapter at one fused product. `factors` are DoRA's, by part: magnitude / |W + scale * b @ a|, [outputs]."""

    low: LowRank
    factors: tuple[Tensor | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterSegment:
    """Rows of a batch that run with one adapter, whose products go by the names of the decoder's modules."""

    rows: slice | Tensor  # [n] int64, where they do not lie in one piece
    products: Mapping[str, ServedProduct]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdapterRows:
    """Rows of one batch that run with adapters; no row is in two segments. On a CUDA device `plan` says it instead."""

    segments: tuple[AdapterSegment, ...] = ()
    plan: SegmentPlan | None = None

    def __bool__(self) -> bool:
        return bool(self.segments) or self.plan is not None


NO_ADAPTERS = AdapterRows()


def add_adapters_(y: Tensor, x: Tensor, slot: str, adapters: AdapterRows, bias: Tensor | None) -> None:
    """Adds to y [T, outputs], in place, what adapters make of x [T, inputs] at the product called `slot`.

    y is x @ weight.T + bias: DoRA's factors scale all of it but the bias [outputs].
    """
    if adapters.plan is None:
        add_adapters_reference_(y, x, slot, adapters.segments, bias)
    else:
        from lmesh_kernels.ops.segmented_lora_kernels import add_adapters_triton_  # needs triton, which CPUs do without

        add_adapters_triton_(y, x, slot, adapters.plan, bias)


def add_adapters_reference_(
    y: Tensor, x: Tensor, slot: str, segments: Sequence[AdapterSegment], bias: Tensor | None
) -> None:
    """As `add_adapters_`, in plain torch: two thin products a segment and site."""
    for segment in segments:
        product = segment.products.get(slot)
        if product is None:
            continue
        if isinstance(segment.rows, slice):
            _apply(y[segment.rows], x[segment.rows], product, bias)
        else:
            own = y.index_select(0, segment.rows)
            _apply(own, x.index_select(0, segment.rows), product, bias)
            y.index_copy_(0, segment.rows, own)


def _apply(y: Tensor, x: Tensor, product: ServedProduct, bias: Tensor | None) -> None:
    add_outer_(y, inner(x, product.low, None), product.low)
    for part, factor in zip(product.low.parts, product.factors, strict=True):
        if factor is None:
            continue
        columns = y[:, part.columns]
        if bias is None:
            columns.mul_(factor)
        else:
            own = bias[part.columns]
            torch.addcmul(own, columns - own, factor, out=columns)
