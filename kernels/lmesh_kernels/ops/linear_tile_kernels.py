"""Rows by a weight matrix in tiles, in Triton, on the matrix units; silu(gate) * up in the same pass where wanted.

Operands come through tensor descriptors: on Hopper its copy engine then fills the pipeline (64 rows, 16384 x 2048:
18.7 us, by addresses 22.5), elsewhere the compiler makes addresses of them. A row's sums are made in the order of the
inputs whatever the tile, so they do not depend on how many rows there are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from lmesh_kernels.ops.linear_tiles import ProductTile, launch_options


@triton.jit
def _add(v, w, sums, SWAPPED: tl.constexpr):
    # Weights on the left fill the matrix unit's fixed side of 64, and x may have as few as 16 rows.
    if SWAPPED:
        sums = tl.dot(w, tl.trans(v), sums, input_precision="ieee")
    else:
        sums = tl.dot(v, tl.trans(w), sums, input_precision="ieee")
    return sums


@triton.jit
def _biased(sums, own, SWAPPED: tl.constexpr):
    if SWAPPED:
        sums = tl.trans(sums)
    return sums + own[None, :]


# `outputs` is left to be specialised: known to be a multiple of 16 it lets results be written 16 bytes at a time, half
# the time of 256 rows.
@triton.jit(do_not_specialize=["rows", "has_bias"])
def _tile(
    x,
    weight,
    bias,
    y,
    rows,
    outputs,
    inputs,
    y_stride,
    has_bias,
    GATED: tl.constexpr,
    SWAPPED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    # Tiles of the same weights run side by side: only the first of them reads the weights from memory.
    row_tiles = tl.cdiv(rows, BLOCK_M)
    first_row = (tl.program_id(0) % row_tiles) * BLOCK_M
    first_output = (tl.program_id(0) // row_tiles) * BLOCK_N
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = first_row + tl.arange(0, BLOCK_M)
    output = first_output + tl.arange(0, BLOCK_N)
    known = output < outputs
    # Ahead of the loop: behind it, 64 rows of a gated 6144 x 1024 took 7.7 us and not 6.3, with no bias to load at all.
    own = tl.load(bias + output, mask=known & (has_bias != 0), other=0.0).to(tl.float32)
    sums = tl.zeros((BLOCK_N, BLOCK_M) if SWAPPED else (BLOCK_M, BLOCK_N), dtype=tl.float32)
    if GATED:
        own_up = tl.load(bias + outputs + output, mask=known & (has_bias != 0), other=0.0).to(tl.float32)
        up = tl.zeros((BLOCK_N, BLOCK_M) if SWAPPED else (BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, inputs, BLOCK_K):
            w = weight.load([first_output, start])
            w_up = weight.load([outputs + first_output, start])
            v = x.load([first_row, start])
            sums = _add(v, w, sums, SWAPPED)
            up = _add(v, w_up, up, SWAPPED)
        gate = _biased(sums, own, SWAPPED)
        sums = gate / (1.0 + tl.exp(-gate)) * _biased(up, own_up, SWAPPED)
    else:
        for start in range(0, inputs, BLOCK_K):
            w = weight.load([first_output, start])
            v = x.load([first_row, start])
            sums = _add(v, w, sums, SWAPPED)
        sums = _biased(sums, own, SWAPPED)
    target = y + row.to(tl.int64)[:, None] * y_stride + output[None, :]
    tl.store(target, sums.to(y.dtype.element_ty), mask=(row < rows)[:, None] & known[None, :])


def tile_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, tile: ProductTile, *, gated: bool, pdl: bool
) -> None:
    """out [T, outputs] = x [T, inputs] times weight transposed, plus bias; silu of one half times the other if `gated`.

    Rows of x and of weight begin at 16 bytes, weight [outputs, or 2 * outputs, inputs] is contiguous. Under `pdl`
    everything the kernel reads may be the output of the kernel before it.
    """
    rows, inputs = x.shape
    outputs = out.shape[1]
    _tile[(triton.cdiv(rows, tile.block_m) * triton.cdiv(outputs, tile.block_n),)](
        TensorDescriptor.from_tensor(x, [tile.block_m, tile.block_k]),
        TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k]),
        out if bias is None else bias,
        out,
        rows,
        outputs,
        inputs,
        out.stride(0),
        int(bias is not None),
        GATED=gated,
        SWAPPED=tile.swapped,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_K=tile.block_k,
        PDL=pdl,
        **launch_options(tile.warps, tile.stages, pdl),
    )
