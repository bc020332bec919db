"""The Triton form of `segmented_lora`: two launches a product, however many adapters its rows run with.

An adapter is found through its directory, a row of integers a product: where its factors lie on the device, and their
shapes. A tile is up to `height` rows of one adapter, which may lie anywhere in the batch. The first launch makes
x @ a.T for the tiles' rows, the second adds each part's product to its columns of y. In the manner of SGMV (Chen et al.
2023, arXiv 2310.18547), with ranks that need not be alike.

On an H100, q, k and v of a 4096-wide model in bfloat16, adapters of rank 16, where the base's own product takes 22 us:
64 rows of 4 adapters 32 us (the reference 431), of 32 adapters 49 us (3494); 4096 rows of 4 adapters 153 us (741; base
261). What is left: the first launch walks all inputs in one program a tile, and wants them split.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lmesh_kernels.ops.segmented_plan import ENTRY, MOST_PARTS, PART, SegmentPlan

_BLOCK_RANKS = 32
_BLOCK_INPUTS = 64
_BLOCK_OUTPUTS = 64


@triton.jit
def _shrink(
    x,
    h,
    order,
    tiles,
    directories,
    slot,
    inputs,
    x_stride,
    h_stride,
    ENTRY: tl.constexpr,
    HEIGHT: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
) -> None:
    tile = tiles + tl.program_id(0) * 3
    segment, first, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    entry = tl.load(directories + segment).to(tl.pointer_type(tl.int64)) + slot * ENTRY
    ranks = tl.load(entry + 1).to(tl.int32)
    begin = tl.program_id(1) * BLOCK_RANKS
    if (begin < ranks) & (count > 0):
        a = tl.load(entry).to(tl.pointer_type(x.dtype.element_ty))
        place = tl.arange(0, HEIGHT)
        rank = begin + tl.arange(0, BLOCK_RANKS)
        row = tl.load(order + first + place, mask=place < count, other=0).to(tl.int64)
        total = tl.zeros((HEIGHT, BLOCK_RANKS), dtype=tl.float32)
        for start in range(0, inputs, BLOCK_INPUTS):
            column = start + tl.arange(0, BLOCK_INPUTS)
            inside = column[None, :] < inputs
            left = tl.load(
                x + row[:, None] * x_stride + column[None, :], mask=(place < count)[:, None] & inside, other=0.0
            )
            right = tl.load(
                a + rank[:, None] * inputs + column[None, :], mask=(rank < ranks)[:, None] & inside, other=0.0
            )
            total += tl.dot(left, tl.trans(right), input_precision="ieee")
        target = h + (first + place)[:, None] * h_stride + rank[None, :]
        tl.store(target, total.to(h.dtype.element_ty), mask=(place < count)[:, None] & (rank < ranks)[None, :])


@triton.jit
def _expand(
    y,
    h,
    bias,
    order,
    tiles,
    directories,
    slot,
    outputs,
    y_stride,
    h_stride,
    HAS_BIAS: tl.constexpr,
    ENTRY: tl.constexpr,
    PART: tl.constexpr,
    MOST_PARTS: tl.constexpr,
    HEIGHT: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
) -> None:
    tile = tiles + tl.program_id(0) * 3
    segment, first, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    entry = tl.load(directories + segment).to(tl.pointer_type(tl.int64)) + slot * ENTRY
    if (tl.load(entry + 1) > 0) & (count > 0):
        place = tl.arange(0, HEIGHT)
        column = tl.program_id(1) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
        row = tl.load(order + first + place, mask=place < count, other=0).to(tl.int64)
        target = y + row[:, None] * y_stride + column[None, :]
        mine = (place < count)[:, None] & (column < outputs)[None, :]
        values = tl.load(target, mask=mine, other=0.0).to(tl.float32)
        for index in tl.static_range(MOST_PARTS):
            part = entry + 2 + index * PART
            start, wide = tl.load(part + 3).to(tl.int32), tl.load(part + 4).to(tl.int32)
            local = column - start
            inside = (local >= 0) & (local < wide)
            # A part that is not there is 0 wide.
            if (
                (wide > 0)
                & (start < (tl.program_id(1) + 1) * BLOCK_OUTPUTS)
                & (start + wide > tl.program_id(1) * BLOCK_OUTPUTS)
            ):
                b = tl.load(part).to(tl.pointer_type(h.dtype.element_ty))
                ranks, above = tl.load(part + 1).to(tl.int32), tl.load(part + 2).to(tl.int32)
                scale = tl.load(part + 5).to(tl.int32).to(tl.float32, bitcast=True)
                total = tl.zeros((HEIGHT, BLOCK_OUTPUTS), dtype=tl.float32)
                for begin in range(0, ranks, BLOCK_RANKS):
                    rank = begin + tl.arange(0, BLOCK_RANKS)
                    known = (rank < ranks)[None, :]
                    left = tl.load(
                        h + (first + place)[:, None] * h_stride + above + rank[None, :],
                        mask=(place < count)[:, None] & known,
                        other=0.0,
                    )
                    right = tl.load(b + local[:, None] * ranks + rank[None, :], mask=inside[:, None] & known, other=0.0)
                    total += tl.dot(left, tl.trans(right), input_precision="ieee")
                values = tl.where(inside[None, :], values + scale * total, values)
                place_of_factor = tl.load(part + 6)
                if place_of_factor != 0:
                    factors = place_of_factor.to(tl.pointer_type(h.dtype.element_ty))
                    factor = tl.load(factors + local, mask=inside, other=1.0).to(tl.float32)
                    if HAS_BIAS:
                        own = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
                        values = own[None, :] + (values - own[None, :]) * factor[None, :]
                    else:
                        values = values * factor[None, :]
        tl.store(target, values.to(y.dtype.element_ty), mask=mine)


def add_adapters_triton_(y: Tensor, x: Tensor, slot: str, plan: SegmentPlan, bias: Tensor | None) -> None:
    """As `segmented_lora.add_adapters_`; y [T, outputs] and x [T, inputs] have rows of stride-1 elements."""
    number = plan.numbers.get(slot)
    if number is None or not plan.num_tiles:
        return
    h = torch.empty(plan.num_rows, plan.most_ranks, dtype=x.dtype, device=x.device)
    tables = (plan.order, plan.tiles, plan.directories, number)
    ranks = triton.cdiv(plan.most_ranks, _BLOCK_RANKS)
    _shrink[(plan.num_tiles, ranks)](
        x,
        h,
        *tables,
        x.shape[1],
        x.stride(0),
        h.stride(0),
        ENTRY=ENTRY,
        HEIGHT=plan.height,
        BLOCK_RANKS=_BLOCK_RANKS,
        BLOCK_INPUTS=_BLOCK_INPUTS,
    )
    _expand[(plan.num_tiles, triton.cdiv(y.shape[1], _BLOCK_OUTPUTS))](
        y,
        h,
        y if bias is None else bias,
        *tables,
        y.shape[1],
        y.stride(0),
        h.stride(0),
        HAS_BIAS=bias is not None,
        ENTRY=ENTRY,
        PART=PART,
        MOST_PARTS=MOST_PARTS,
        HEIGHT=plan.height,
        BLOCK_RANKS=_BLOCK_RANKS,
        BLOCK_OUTPUTS=_BLOCK_OUTPUTS,
    )
