"""The product with a weight matrix, and the layout of weights that is fastest for it on a CPU.

On a CUDA device up to 128 rows are multiplied by our own kernels (`linear_tiles` has their figures), more by cuBLAS. On
a CPU oneDNN multiplies faster by weights in its own blocked layout: 2 AMD EPYC cores (AVX2), float32, all products of
SmolLM2-135M, milliseconds against torch's plain linear: 1 row 33 (42), 8 rows 44 (98), 32 rows 82 (191), 512 rows
1,046 (1,249).
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor
from torch.nn import functional

from lmesh_kernels.ops.linear_tiles import WANTED, describe, device_facts, product_tile, row_tile, suits

log = logging.getLogger(__name__)

# The layout is made for a number of rows; this one is close to the best from 1 to 512.
_LAYOUT_ROWS = 32


def pack(weight: Tensor) -> Tensor | None:
    """A copy of weight [outputs, inputs] in the fastest layout for its device, or None where plain is the fastest.

    The copy does not follow later changes of `weight`: who swaps weights packs again.
    """
    if weight.device.type != "cpu" or weight.dtype != torch.float32 or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, _LAYOUT_ROWS)
    except (RuntimeError, NotImplementedError) as error:  # an operator of torch's own, not of its public interface
        log.warning("weights stay in the plain layout: this torch has no packed product (%s)", error)
        return None
    return packed


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    packed: Tensor | None = None,
    *,
    out: Tensor | None = None,
    batch_invariant: bool = False,
) -> Tensor:
    """x [T, inputs] times weight [outputs, inputs] transposed, plus bias [outputs]: [T, outputs], in `out` if given.

    `packed` is what `pack` made of the same weight. `batch_invariant`: a row's result does not depend on T, bit by bit;
    only for 16-bit tensors on a CUDA device, ValueError elsewhere.
    """
    if packed is not None and not batch_invariant:
        return placed(torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], ""), out)
    if not suits(x, weight, out):
        if batch_invariant:
            raise ValueError(f"no batch-invariant product for {describe(x)} and {describe(weight)}: {WANTED}")
        return placed(linear_reference(x, weight, bias), out)
    device = device_facts(x.device)
    rows, outputs, inputs = len(x), *weight.shape
    if rows == 1 and not batch_invariant:
        from lmesh_kernels.ops.linear_row_kernels import row_product  # needs triton, which CPUs do without

        y = x.new_empty(1, outputs) if out is None else out
        row_product(x, weight, bias, y, row_tile(outputs, inputs), pdl=device.pdl)
        return y
    tile = product_tile(rows, outputs, device, always=batch_invariant)
    if tile is None:
        return linear_reference(x, weight, bias) if out is None else _torch_into(x, weight, bias, out)
    from lmesh_kernels.ops.linear_tile_kernels import tile_product

    y = x.new_empty(rows, outputs) if out is None else out
    tile_product(x, weight, bias, y, tile, gated=False, pdl=device.pdl)
    return y


def placed(result: Tensor, out: Tensor | None) -> Tensor:
    """The result itself, or copied into `out`."""
    return result if out is None else out.copy_(result)


def _torch_into(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    return torch.mm(x, weight.T, out=out) if bias is None else torch.addmm(bias, x, weight.T, out=out)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `linear`, in plain torch."""
    return functional.linear(x, weight, bias)
