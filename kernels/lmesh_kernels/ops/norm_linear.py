"""Residual addition and RMS norm with the product that follows: qkv of a decoder layer, or the head."""

from __future__ import annotations

from torch import Tensor

from lmesh_kernels.ops.linear import linear, linear_reference
from lmesh_kernels.ops.linear_tiles import MOST_NORMED, device_facts, norm_tile, suits
from lmesh_kernels.ops.rms_norm import rms_norm, rms_norm_reference


def norm_linear(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None = None,
    packed: Tensor | None = None,
    *,
    out: Tensor | None = None,
    total: Tensor | None = None,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """The product of norm(x + residual) with weight [outputs, inputs], plus bias [outputs].

    x, residual [T, inputs]; norm_weight [inputs]. Returns (y [T, outputs], x + residual [T, inputs], or x itself
    without a residual). `out` and `total`, where given, are what they are written to; `total` must be neither x nor
    the residual. One row of at most `MOST_NORMED` inputs on a CUDA device is one launch: every program makes the norm
    anew, under the time its weights take to come. `packed` and `batch_invariant` are as in `linear`.
    """
    if not fused(x, residual, weight, out, total) or batch_invariant:
        normed, stream = rms_norm(x, norm_weight, eps, residual)
        y = linear(normed, weight, bias, packed, out=out, batch_invariant=batch_invariant)
        return y, stream if residual is None or total is None else total.copy_(stream)
    return normed_row(x, residual, norm_weight, eps, weight, bias, out, total, gated=False)


def norm_linear_reference(
    x: Tensor, residual: Tensor | None, norm_weight: Tensor, eps: float, weight: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `norm_linear`, in plain torch."""
    normed, stream = rms_norm_reference(x, norm_weight, eps, residual)
    return linear_reference(normed, weight, bias), stream


def fused(
    x: Tensor, residual: Tensor | None, weight: Tensor, out: Tensor | None = None, total: Tensor | None = None
) -> bool:
    """Whether norm and product are one launch."""
    return (
        len(x) == 1
        and x.shape[-1] <= MOST_NORMED
        and suits(x, weight, out)
        and all(t is None or t.is_contiguous() for t in (residual, out, total))
    )


def normed_row(
    x: Tensor,
    residual: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor | None,
    total: Tensor | None,
    *,
    gated: bool,
) -> tuple[Tensor, Tensor]:
    """The one launch, for what `fused` accepts; `gated` as `gated_linear` has it."""
    from lmesh_kernels.ops.linear_row_kernels import normed_row_product  # needs triton, which CPUs do without

    device = device_facts(x.device)
    outputs, inputs = weight.shape
    y = x.new_empty(1, outputs // 2 if gated else outputs) if out is None else out
    stream = x if residual is None else x.new_empty(1, inputs) if total is None else total
    tile = norm_tile(outputs, inputs, device, gated=gated)
    normed_row_product(x, residual, norm_weight, eps, weight, bias, y, stream, tile, gated=gated, pdl=device.pdl)
    return y, stream
